"""One thread that runs every call's generations on servers: a task for each, in one event loop.

It takes the place of the engine's scheduler: what callers see of it is a `Runner`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from aligner_middleware.engine import Generation, Prefill
from aligner_middleware.engine.scheduler import settle
from aligner_middleware.engine.threads import BackgroundThread
from aligner_middleware.errors import AlignerError, ClosedError, RemoteError
from aligner_middleware.remote.client import Client
from aligner_middleware.remote.course import Course
from aligner_middleware.remote.detection import Served, Speak, at, detect, tokenize
from aligner_middleware.remote.servers import Servers

T = TypeVar("T")

_of_parents: list[asyncio.AbstractEventLoop] = []
# Event loops that a forked process finds and must not even collect: closing one would change what its parent waits for.

_AHEAD = 64  # tokens of an unfinished prompt by which it must have grown to be sent again


class RemoteScheduler(BackgroundThread):
    """Runs generations on servers. It is a `RemoteModel`.

    Args:
        urls: Addresses of the servers' OpenAI API, such as `http://localhost:8000/v1`; at least one.
        stop: Tokens that end a sequence.
        model: Name of the model that they serve; `None` for the first.
        key: API key; `None` for none.
        concurrency: Most requests to each server at once; more wait here.
        patience: Seconds for which a request is repeated that fails in passing.
        silence: Seconds that a server may take for a reply, or be silent in a stream.
        speak: As `detect` takes it.

    Attributes:
        max_positions, device: See `RemoteModel`; known after `connect`.
        model: Name of the model; known after `connect`.
    """

    max_positions: int
    device: str
    model: str

    def __init__(
        self,
        urls: Sequence[str],
        stop: frozenset[int],
        *,
        model: str | None,
        key: str | None,
        concurrency: int,
        patience: float,
        silence: float,
        speak: Speak | None = None,
    ) -> None:
        self._speak = speak
        self._urls = list(urls)
        self._stop_tokens = stop
        self._wanted = model
        self._key = key
        self._concurrency = concurrency
        self._patience = patience
        self._silence = silence
        self._served: list[Served | None] = [None] * len(urls)
        super().__init__()

    def connect(self, max_positions: int) -> None:
        """Ask all servers what they are.

        Args:
            max_positions: Context of the aligner, in tokens; that of the servers may be smaller.

        Raises:
            RemoteError: If none can be reached, or one serves something else.
        """
        found = self._wait_for(self._detect)
        served = [one for one in found if isinstance(one, Served)]
        for one in found:
            if isinstance(one, RemoteError) and not (one.temporary and served):
                raise one
        names = {one.model for one in served}
        if len(names) > 1:
            raise RemoteError(
                f"these servers serve different models, {', '.join(sorted(names))}: name the one by model="
            )
        self._served = [one if isinstance(one, Served) else None for one in found]
        self.model = served[0].model
        self.max_positions = min([max_positions, *(one.max_positions for one in served if one.max_positions)])
        kinds = ", ".join(dict.fromkeys(one.kind for one in served))
        self.device = f"{kinds} at {' '.join(self._urls)}"
        self._forget_servers()

    def tokenize(self, text: str) -> dict[str, list[int]]:
        """Let each server that can encode a text, special tokens by their names, and give the ids by its address."""

        async def encode() -> list[list[int] | None]:
            return await asyncio.gather(*(tokenize(self._client, url, self.model, text) for url in urls))

        urls = [url for url, served in zip(self._urls, self._served, strict=True) if served]
        encoded = zip(urls, self._wait_for(encode), strict=True)
        return {url: ids for url, ids in encoded if ids is not None}

    def submit(self, generation: Generation, on_step: Callable[[], None] = lambda: None) -> Future[Generation]:
        """See `Runner`."""
        future: Future[Generation] = Future()
        self._begin(lambda: self._run_call(generation, on_step), future, on_step)
        return future

    def prefill(self, prefill: Prefill) -> None:
        """See `Runner`. The server's prefix cache holds what was sent."""
        self._tell(lambda: self._note(prefill))

    def abandon(self, prefill: Prefill) -> None:
        """See `Runner`."""
        loop = self._loop
        if loop is not None and not self._closed:
            with contextlib.suppress(RuntimeError):  # it has ended meanwhile
                loop.call_soon_threadsafe(self._drop, prefill)

    def log_likelihoods(self, prompt: Sequence[int], targets: Sequence[Sequence[int]]) -> list[tuple[float, bool]]:
        """See `Runner`; each target takes one request."""

        async def likelihoods() -> list[tuple[float, bool]]:
            return await asyncio.gather(*(self._likelihood(prompt, target) for target in targets))

        return self._wait_for(likelihoods)

    # --- the thread -------------------------------------------------------------------------------------

    def _begin_anew(self) -> None:
        super()._begin_anew()
        if (loop := getattr(self, "_loop", None)) is not None:
            _of_parents.append(loop)
        self._loop: asyncio.AbstractEventLoop | None = None

    def _tell(self, message: Callable[[], None]) -> None:
        """Have a function called in the event loop, which is started where there is none."""
        with self._lock:
            if self._closed:
                raise ClosedError("this aligner was closed")
            if self._idle or self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._over = asyncio.Event()
                self._tasks: dict[asyncio.Task[None], Future[Any]] = {}
                self._prefills: dict[Prefill, asyncio.Task[None]] = {}
                self._client = Client(self._key, self._silence)
                self._forget_servers()
                try:
                    self._start()
                except BaseException:
                    self._loop.close()
                    raise
            self._loop.call_soon_threadsafe(message)

    def _forget_servers(self) -> None:
        known = list(zip(self._urls, self._served, strict=True))
        self._servers = Servers(self._client, known, self._concurrency, self._speak)

    def _stop(self) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended
                self._loop.call_soon_threadsafe(self._over.set)

    def _work(self) -> None:
        assert self._loop is not None
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:  # type: ignore[arg-type, return-value]
            runner.run(self._serve())

    async def _serve(self) -> None:
        async with self._client:
            await self._over.wait()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}  # calls, reading ahead, and looking for servers
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _begin(
        self, work: Callable[[], Coroutine[Any, Any, Any]], future: Future[Any], on_end: Callable[[], None]
    ) -> None:
        """Run a coroutine as a task, whose outcome is the future's; cancelling the future cancels it."""

        async def run() -> None:
            try:
                outcome = await work()
            except asyncio.CancelledError:
                outcome = ClosedError("this aligner was closed while a correction was under way")
            except Exception as exc:
                outcome = exc
            settle(future, outcome)
            on_end()

        def begin() -> None:
            if not future.cancelled():
                task = asyncio.create_task(run())
                self._tasks[task] = future
                task.add_done_callback(lambda _: self._tasks.pop(task))
                future.add_done_callback(lambda _: self._cancel(task) if future.cancelled() else None)

        self._tell(begin)

    def _cancel(self, task: asyncio.Task[None]) -> None:
        with contextlib.suppress(RuntimeError):  # its loop has ended
            task.get_loop().call_soon_threadsafe(task.cancel)

    def _wait_for(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a coroutine in the thread, and block until it is done."""
        future: Future[T] = Future()
        self._begin(work, future, lambda: None)
        try:
            return future.result()
        finally:
            future.cancel()  # after an interrupt from the keyboard

    # --- in the event loop ------------------------------------------------------------------------------

    async def _detect(self) -> list[Served | BaseException]:
        calls = (detect(self._client, url, self._wanted, self._speak) for url in self._urls)
        return await asyncio.gather(*calls, return_exceptions=True)

    async def _run_call(self, generation: Generation, on_step: Callable[[], None]) -> Generation:
        if generation.prefill is not None and (task := self._prefills.pop(generation.prefill, None)):
            await asyncio.wait({task})  # what it reads now is in the cache then, and not read twice
        course = Course(
            generation,
            self._client,
            self._servers,
            stop=self._stop_tokens,
            max_positions=self.max_positions,
            on_step=on_step,
            patience=self._patience,
        )
        await course.run()
        return generation

    def _note(self, prefill: Prefill) -> None:
        if prefill not in self._prefills:
            task = self._prefills[prefill] = asyncio.create_task(self._read(prefill))
            task.add_done_callback(lambda _: self._prefills.get(prefill) is task and self._prefills.pop(prefill))

    async def _read(self, prefill: Prefill) -> None:
        """Let a server read the known part of a prompt, and again when it has grown."""
        with contextlib.suppress(AlignerError):  # its generation will fail in the same way, and be reported
            while len(prompt := list(prefill.prompt)) >= len(prefill.cached_tokens) + _AHEAD:
                server = self._servers.choose(prompt)
                if server.full or server.served is None or len(prompt) >= self.max_positions:
                    return
                if not server.served.dialect.by_tokens:
                    return  # what it would read it does not keep
                async with server.place() as served:
                    path, body = served.dialect.verify(prompt, 0, ())
                    await self._client.post(at(server.url, path), body)
                prefill.cached_tokens = prompt

    def _drop(self, prefill: Prefill) -> None:
        if task := self._prefills.pop(prefill, None):
            task.cancel()

    async def _likelihood(self, prompt: Sequence[int], target: Sequence[int]) -> tuple[float, bool]:
        ids = [*prompt, *target[:-1]]
        server = self._servers.choose(prompt)
        async with server.place() as served:
            path, body = served.dialect.verify(ids, len(target) - 1, target[-1:])
            content = await self._client.post(at(server.url, path), body)
        positions = served.dialect.verified(content, ids, len(target) - 1)
        try:
            total = sum(logs[token] for logs, token in zip(positions, target, strict=True))
        except KeyError as exc:
            raise RemoteError(f"{server.url} does not give the log probability of token {exc}") from exc
        greedy = all(max(logs, key=logs.__getitem__) == token for logs, token in zip(positions, target, strict=True))
        return total, greedy
