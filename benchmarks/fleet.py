"""A simulation, in SimPy, of servers with continuous batching behind a router; for `scale.py` and `scale_check.py`.

In each step a server's running sequences decode a token each, and prompts are prefilled in chunks up to a budget of tokens.
"""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

import simpy

AGAIN, TAIL = 0.2, 32  # share of requests whose prompt was read before; tokens of it that are new
PROBE, MISSES = 1.0, 2  # seconds between health checks; failed ones until a server counts as down
WARM_UP = 2.0  # seconds that are not measured


@dataclass(frozen=True)
class Work:
    """What one answer costs: tokens of the prompt, and the passes that write after the verdict (0 where it is kept)."""

    prompt: int
    passes: int = 0


@dataclass(frozen=True)
class Machine:
    """A server's times, in seconds, and sizes, in tokens.

    Attributes:
        per_token: To compute a token.
        weights: To read all weights once.
        per_context: To read the keys and values of a token.
        overhead: Of each step.
        kv: Keys and values that fit.
        budget: Of a step.
        rows: Sequences that run at once.
    """

    per_token: float
    weights: float = 0.0
    per_context: float = 0.0
    overhead: float = 0.0
    kv: int = 1 << 60
    budget: int = 2048
    rows: int = 256

    def step(self, prefilled: int, decoding: int, context: int) -> float:
        """Give the seconds of a step: of its arithmetic or its reading, whichever takes longer."""
        reading = self.weights + self.per_context * context
        return self.overhead + max(self.per_token * (prefilled + decoding), reading)


@dataclass(eq=False)
class Request:
    """An answer on its way; times in seconds."""

    at: float
    work: Work
    key: int  # of its prompt, and where it is at home
    router: Router
    left: int = 0  # tokens to prefill
    passes: int = 0  # to decode
    server: int = -1
    done: float = -1.0


class Server:
    """A GPU with continuous batching and a cache of prefixes, the latest used last."""

    def __init__(self, env: simpy.Environment, machine: Machine) -> None:
        self.machine, self.alive, self.busy, self.hits = machine, True, 0.0, 0
        self._env = env
        self._queue: deque[Request] = deque()
        self._running: list[Request] = []
        self._reserved = self._cached = 0
        self._prefixes: OrderedDict[int, int] = OrderedDict()
        self._wake = env.event()
        env.process(self._run())

    def submit(self, request: Request) -> None:
        """Queue a request."""
        request.left, request.passes = request.work.prompt, request.work.passes
        self._queue.append(request)
        if not self._wake.triggered:
            self._wake.succeed()

    def _run(self) -> Generator[simpy.Event, None, None]:
        while self.alive:
            if not self._queue and not self._running:
                self._wake = self._env.event()
                yield self._wake
            decoding = [one for one in self._running if not one.left]
            chunks = self._chunks(self.machine.budget - len(decoding))
            context = sum(one.work.prompt for one in decoding)
            seconds = self.machine.step(sum(size for _, size in chunks), len(decoding), context)
            yield self._env.timeout(seconds)
            if self.alive:
                self.busy += self.machine.per_token * (sum(size for _, size in chunks) + len(decoding))
                self._end(decoding, chunks)

    def _chunks(self, budget: int) -> list[tuple[Request, int]]:
        """Choose the tokens to prefill, and begin requests for which there is room."""
        chunks = [(one, min(one.left, budget)) for one in self._running if one.left][:1]
        budget -= sum(size for _, size in chunks)
        while budget > 0 and self._queue and len(self._running) < self.machine.rows and self._admit(self._queue[0]):
            one = self._queue.popleft()
            self._running.append(one)
            chunks.append((one, min(one.left, budget)))
            budget -= chunks[-1][1]
        return chunks

    def _admit(self, one: Request) -> bool:
        need = one.work.prompt + one.work.passes
        while self._prefixes and self._reserved + self._cached + need > self.machine.kv:
            self._cached -= self._prefixes.popitem(last=False)[1]
        if self._running and self._reserved + need > self.machine.kv:
            return False
        self._reserved += need
        if one.key in self._prefixes:
            self.hits += 1
            one.left = min(one.left, TAIL)
        return True

    def _end(self, decoding: list[Request], chunks: list[tuple[Request, int]]) -> None:
        for one in decoding:
            one.passes -= 1
        for one, size in chunks:
            one.left -= size
        ended = [one for one in self._running if not one.left and not one.passes]
        self._running = [one for one in self._running if one.left or one.passes]
        for one in ended:
            self._reserved -= one.work.prompt + one.work.passes
            self._cached += one.work.prompt - self._prefixes.pop(one.key, 0)
            self._prefixes[one.key] = one.work.prompt
            one.done = self._env.now
            one.router.ended(one)


Policy = Callable[["Router", Request], int]


class Router:
    """Chooses servers by what it knows: the requests that it sent itself and that are not done."""

    def __init__(self, servers: list[Server], up: list[int], policy: Policy, rng: random.Random) -> None:
        self.up, self.rng, self.turn = up, rng, rng.randrange(len(servers))
        self.load = [0] * len(servers)
        self.sent: list[set[Request]] = [set() for _ in servers]
        self._servers, self._policy = servers, policy

    def send(self, request: Request) -> None:
        """Give a request to a server."""
        request.server = self._policy(self, request)
        self.load[request.server] += 1
        self.sent[request.server].add(request)
        self._servers[request.server].submit(request)

    def ended(self, request: Request) -> None:
        """Take note of a request that is done, or lost."""
        self.load[request.server] -= 1
        self.sent[request.server].discard(request)


def anyone(router: Router, request: Request) -> int:
    """Choose at random."""
    return router.rng.choice(router.up)


def in_turn(router: Router, request: Request) -> int:
    """Choose one after the other."""
    router.turn += 1
    return router.up[router.turn % len(router.up)]


def least(router: Router, request: Request) -> int:
    """Choose the server with the fewest outstanding requests; one of them at random."""
    fewest = min(router.load[one] for one in router.up)
    return router.rng.choice([one for one in router.up if router.load[one] == fewest])


def better_of_two(router: Router, request: Request) -> int:
    """Choose the less loaded of two at random."""
    return min(router.rng.choices(router.up, k=2), key=router.load.__getitem__)


def at_home(router: Router, request: Request) -> int:
    """Choose the server at which a prompt is at home; the least loaded where that has more than 1.25 means and 4."""
    home = request.key % len(router.load)
    mean = sum(router.load[one] for one in router.up) / len(router.up)
    return home if home in router.up and router.load[home] <= 1.25 * mean + 4 else least(router, request)


POLICIES: dict[str, Policy] = {
    "random": anyone,
    "round robin": in_turn,
    "better of two": better_of_two,
    "least outstanding": least,
    "least loaded, prefix affinity": at_home,
}


@dataclass(frozen=True)
class Scenario:
    """A load on some servers.

    Attributes:
        rate: Requests a second, on average, Poisson.
        servers: How many.
        burst: In one second of ten the rate is so many times the average.
        again: Share of requests whose prompt was read up to some seconds before.
        routers: How many choose, each knowing its own requests only.
        event: `dies` or `drains`: what one server does after half of the time.
        seconds: How long requests arrive, after the warm-up.
    """

    rate: float
    servers: int
    policy: str = "least outstanding"
    burst: float = 1.0
    again: float = AGAIN
    routers: int = 1
    event: str = ""
    seconds: float = 20.0
    seed: int = 0


@dataclass
class Result:
    """Latencies in seconds, share of the servers' arithmetic in use, of prompts that were cached, and requests sent again."""

    latencies: list[float] = field(repr=False)
    use: float = 0.0
    cached: float = 0.0
    resent: int = 0

    def percentile(self, share: float) -> float:
        """Give a percentile."""
        ordered = sorted(self.latencies)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    def row(self) -> dict[str, float]:
        """Give what a table shows."""
        points = {f"p{100 * share:g}": round(self.percentile(share), 4) for share in (0.5, 0.95, 0.99)}
        return points | {"use": round(self.use, 3), "cached": round(self.cached, 3), "resent": self.resent}


class Simulation:
    """One run: call `run` once."""

    def __init__(self, machine: Machine, works: Sequence[Work], scenario: Scenario) -> None:
        self._works, self._of = works, scenario
        self._rng = random.Random(scenario.seed)
        self._env = simpy.Environment()
        self._servers = [Server(self._env, machine) for _ in range(scenario.servers)]
        self._up = list(range(scenario.servers))
        policy = POLICIES[scenario.policy]
        self._routers = [Router(self._servers, self._up, policy, self._rng) for _ in range(scenario.routers)]
        self._requests: list[Request] = []
        self._resent = 0

    def run(self) -> Result:
        """Let the requests arrive, and all of them end."""
        arrivals = self._env.process(self._arrive())
        if self._of.event:
            self._env.process(self._happen())
        self._env.run(arrivals)
        busy = sum(server.busy for server in self._servers) / self._env.now / len(self._servers)
        hits = sum(server.hits for server in self._servers)
        self._env.run()  # all that is under way ends
        measured = [one.done - one.at for one in self._requests if one.at >= WARM_UP]
        return Result(measured, busy, hits / len(self._requests), self._resent)

    def _arrive(self) -> Generator[simpy.Event, None, None]:
        of, recent = self._of, deque[Request](maxlen=max(1, int(self._of.rate * 2)))
        while self._env.now < WARM_UP + of.seconds:
            factor = of.burst if self._env.now % 10 < 1 else (10 - of.burst) / 9
            yield self._env.timeout(self._rng.expovariate(of.rate * factor))
            earlier = self._rng.choice(recent) if recent and self._rng.random() < of.again else None
            work, key = (
                (earlier.work, earlier.key) if earlier else (self._rng.choice(self._works), self._rng.getrandbits(60))
            )
            request = Request(self._env.now, work, key, self._rng.choice(self._routers))
            self._requests.append(request)
            recent.append(request)
            request.router.send(request)

    def _happen(self) -> Generator[simpy.Event, None, None]:
        """Let the first server die, which health checks notice; or take it out, and let it finish."""
        yield self._env.timeout(WARM_UP + self._of.seconds / 2)
        if self._of.event == "dies":
            self._servers[0].alive = False
            yield self._env.timeout(PROBE * (MISSES - self._rng.random()))
        self._up.remove(0)
        if self._of.event == "dies":
            for router in self._routers:
                for request in list(router.sent[0]):
                    router.ended(request)
                    router.send(request)
                    self._resent += 1
