"""Which server gets an answer."""

import asyncio
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from aligner_middleware.errors import RemoteError
from aligner_middleware.remote.detection import Served
from aligner_middleware.remote.servers import Servers
from aligner_middleware.remote.vllm import VLLM


class Nobody:
    """A client that reaches no server."""

    async def get(self, url: str) -> Any:
        raise RemoteError(f"{url} is away", temporary=True)


def servers_of(loads: list[int], down: set[int]) -> Servers:
    known = [(f"http://server-{number}/v1", Served("vLLM", "m", None, VLLM("m"))) for number in range(len(loads))]
    servers = Servers(Nobody(), known, 8)  # type: ignore[arg-type]
    for number, (server, load) in enumerate(zip(servers._all, loads, strict=True)):
        server.running, server.down = load, number in down
    return servers


@given(
    loads=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    down=st.sets(st.integers(0, 5)),
    prompt=st.lists(st.integers(0, 9), min_size=1, max_size=60),
    end=st.lists(st.integers(0, 9), max_size=5),
)
@settings(max_examples=50)
def test_it_is_in_service_little_loaded_and_the_same_for_equal_beginnings(
    loads: list[int], down: set[int], prompt: list[int], end: list[int]
) -> None:
    async def choose() -> None:
        servers = servers_of(loads, down)
        chosen = servers.choose(prompt)
        up = [server for server in servers._all if not server.down]
        assert chosen in (up or servers._all)
        assert chosen.running <= min(server.running for server in up or servers._all) + 2
        assert servers.choose([*prompt[:48], *end] if len(prompt) >= 48 else prompt) is chosen

    asyncio.run(choose())


def test_many_questions_are_spread_over_servers_with_equal_load() -> None:
    async def count() -> list[int]:
        servers = servers_of([0, 0, 0], set())
        counts = [0, 0, 0]
        for number in range(300):
            counts[servers._all.index(servers.choose([number]))] += 1
        return counts

    assert min(asyncio.run(count())) > 60
