"""What a server writes is what the engine here writes with the same model, however it is asked and whatever breaks off."""

import asyncio
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aligner_middleware import Aligner, sentences
from aligner_middleware.engine import Generation, decode
from aligner_middleware.remote.scheduler import RemoteScheduler
from tests.fakes import SPARE, FakeAligner, FakeModel, artifact_folder, collected, fake_aligner, judging_aligner
from tests.model_server import Kind, ModelServer, running
from tests.unit.test_aligner import Wavering
from tests.unit.test_smaller import BAD, LONG, with_neighbours

STOP = frozenset({0})
KINDS: tuple[Kind, ...] = ("vllm", "sglang")
ANSWER = "You are an idiot. Try again. It is not so hard, and all of it can be learned in an hour or in two."


def soften(question: str, answer: str) -> str:
    return answer.replace("idiot", "friend").replace("BAD", "A better answer, and a longer one.")


@cache
def rule(tokens: tuple[int, ...]) -> dict[int, float]:
    """Looks random and depends on every token; 0 ends. Some positions are certain, some waver, some are nearly flat."""
    said = sum((place + 7) * token for place, token in enumerate(tokens[-9:])) * 2654435761 % 2**32 // 7
    best, second, shape = said % 13, (said // 13) % 12 + 1, said // 156 % 7
    if shape == 0:  # more tokens are within a tolerance than a server names
        return {**dict.fromkeys(range(100, 130), 1.5), **dict.fromkeys(range(1, 13), 1.0), best: 2.0}
    gap = (0.5, 1.5, 2.5, 5.0)[shape % 4]
    return {best: 12.0} if best == second else {best: 12.0, second: 12.0 - gap}


MODEL = FakeModel(lambda tokens: rule(tuple(tokens)))


@pytest.fixture(scope="module", params=KINDS)
def remote(request: pytest.FixtureRequest) -> Iterator[tuple[ModelServer, RemoteScheduler]]:
    server = ModelServer(MODEL, fake_aligner(soften)._codec.tokenizer, request.param)
    with running(server) as one:
        options: dict[str, Any] = {"model": None, "key": None, "concurrency": 8, "patience": 20, "silence": 20}
        scheduler = RemoteScheduler([one.url], STOP, **options)
        scheduler.connect(4096)
        yield server, scheduler
        scheduler.close()


TOKENS = st.integers(1, 12)
CHANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 2), st.lists(TOKENS, max_size=3)), max_size=4)


@given(
    prompt=st.lists(TOKENS, min_size=1, max_size=12),
    length=st.integers(0, 60),
    changes=CHANGES,
    tolerance=st.sampled_from([0.0, 1.0, 3.0]),
    verify=st.booleans(),
    longest=st.integers(1, 70),
    breaks=st.lists(st.integers(0, 20), max_size=3),
)
@settings(max_examples=40)
def test_tokens_are_those_of_the_engine_here(
    remote: tuple[ModelServer, RemoteScheduler],
    prompt: list[int],
    length: int,
    changes: list[tuple[int, int, list[int]]],
    tolerance: float,
    verify: bool,
    longest: int,
    breaks: list[int],
) -> None:
    own = run(Generation(prompt, max_new_tokens=length or 1)).tokens[:length]
    for place, removed, added in changes:
        own[place : place + removed] = added

    def make() -> Generation:
        options: dict[str, Any] = {"tolerance": tolerance, "verify": verify, "end": 0, "stop_loops": True}
        return Generation(prompt, own, longest, **options)

    server, scheduler = remote
    server.break_after = breaks
    server.requests.clear()
    here, there = run(make()), scheduler.submit(make()).result(60)
    server.break_after = []
    assert (there.tokens, there.finish_reason) == (here.tokens, here.finish_reason)
    assert 1 <= there.passes <= len(server.requests)


def run(generation: Generation) -> Generation:
    for _ in decode(MODEL, [generation], STOP):
        pass
    return generation


def test_a_draft_that_is_right_takes_one_request(remote: tuple[ModelServer, RemoteScheduler]) -> None:
    prompt = [3, 1, 4]
    written = run(Generation(prompt, max_new_tokens=30))
    draft = Generation(prompt, written.tokens, 60, end=0, tolerance=3.0 if written.finish_reason == "stop" else 0.0)
    done = remote[1].submit(draft).result(60)
    assert done.tokens[: len(written.tokens)] == written.tokens
    assert done.accepted >= len(written.tokens)
    assert done.passes <= 2


Make = Callable[..., FakeAligner]
FORMS: dict[str, Callable[..., FakeAligner]] = {
    "operations": judging_aligner,
    "copies": lambda correct, **options: judging_aligner(correct, marks=False, **options),
    "without verdicts": fake_aligner,
}


@pytest.fixture(
    scope="module", params=[(form, kind) for form in FORMS for kind in KINDS], ids=lambda pair: " ".join(pair)
)
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[FakeAligner, Aligner, ModelServer]]:
    """An aligner here, the same behind a server, and the server."""
    form, kind = request.param
    with FORMS[form](soften) as local:
        server = ModelServer(local.fake_model, local._codec.tokenizer, kind)
        with running(server) as one, Aligner.connect(one.url, folder_of(local, tmp_path_factory.mktemp("a"))) as remote:
            yield local, remote, server


def folder_of(local: FakeAligner, place: Path) -> Path:
    """The folder of a fake aligner, as `aligner export` would write it."""
    codec = local._codec
    fields: dict[str, Any] = {"template": codec.template, "verdict_ids": codec.verdict_ids, "vocab_size": 320}
    spare = SPARE if codec.verdict_ids else ()
    place.mkdir(exist_ok=True)
    return artifact_folder(place / "aligner", spare, max_positions=FakeModel.max_positions, **fields)


PAIRS = [
    ("q", "All is well."),
    ("q", ANSWER),
    ("q", "BAD"),
    ("What?", "idiot"),
    ("q", "<think>He is an idiot.</think>" + ANSWER),
    ("q", " \n"),
    ("Ünï?", "naïve idiot \u2028 façade 😀 und mehr"),
]


def test_corrections_scores_and_doubts_are_those_of_the_aligner_here(
    both: tuple[FakeAligner, Aligner, ModelServer],
) -> None:
    local, remote, _ = both
    for strength in ("low", 0.7):
        for here, there in zip(
            local.correct_batch(PAIRS, strength=strength), remote.correct_batch(PAIRS, strength=strength), strict=True
        ):
            assert there.corrected == here.corrected
            assert (there.verdict, there.doubts, there.finish_reason) == (here.verdict, here.doubts, here.finish_reason)
            assert there.score == pytest.approx(here.score, abs=1e-6)
            assert (there.usage.passes > 0) == (here.usage.passes > 0)


def test_every_way_to_ask_gives_the_same(both: tuple[FakeAligner, Aligner, ModelServer]) -> None:
    local, remote, _ = both
    expected = local.correct("q", ANSWER).corrected

    async def ask() -> list[str]:
        chunks = [ANSWER[at : at + 9] for at in range(0, len(ANSWER), 9)]
        batch = await remote.acorrect_batch([("q", ANSWER)])
        streamed = "".join(await collected(remote.astream("q", chunks)))
        return [(await remote.acorrect("q", ANSWER)).corrected, batch[0].corrected, streamed]

    assert asyncio.run(ask()) == [expected] * 3
    assert "".join(remote.stream("q", ANSWER, on_doubt="keep")) == expected


def test_sentences_are_decided_as_here_with_a_request_each(
    both: tuple[FakeAligner, Aligner, ModelServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    local, remote, server = both
    if not local.has_verdicts:
        pytest.skip("decides on sentences by verdicts alone")
    monkeypatch.setattr(sentences, "_PAUSE", 0.0)  # every sentence is decided on, however long the last decision took
    parts = ["All is well. ", "Go on, ", "then. ", "You are an idiot. ", "Turn left."]
    streams = [aligner.stream("q", iter(parts), by_sentence=True) for aligner in (local, remote)]
    server.requests.clear()
    here, there = (list(stream) for stream in streams)
    assert here == there
    assert there[0].startswith("All is well.")
    assert "".join(there) == "All is well. Go on, then. You are an friend. Turn left."
    assert streams[0].correction.released == streams[1].correction.released > 0
    assert sum(asks_a_token(body) for body in server.requests) >= 3  # the verdicts of both sentences, and of the whole


def asks_a_token(body: dict[str, Any]) -> bool:
    return body.get("max_tokens", body.get("sampling_params", {}).get("max_new_tokens")) == 1  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_is_made_smaller_as_here_with_a_request_for_each_verdict(kind: Kind, tmp_path: Path) -> None:
    with judging_aligner(with_neighbours) as local:
        server = ModelServer(local.fake_model, local._codec.tokenizer, kind)
        with running(server) as one, Aligner.connect(one.url, folder_of(local, tmp_path)) as remote:
            server.requests.clear()
            there = remote.correct("q", LONG)
            assert there.corrected == local.correct("q", LONG).corrected == LONG.replace(BAD, "")
            assert there.usage.passes == len(server.requests)
            assert sum(map(asks_a_token, server.requests)) == 7  # the answer's, and those of six smaller edits


def test_evidence_and_likelihoods_are_those_of_the_aligner_here(both: tuple[FakeAligner, Aligner, ModelServer]) -> None:
    local, remote, _ = both
    for question, answer in PAIRS[1:3]:
        assert remote.evidence(question, answer) == pytest.approx(local.evidence(question, answer), abs=1e-4)
        texts = [answer, soften(question, answer), "Something else."]
        for here, there in zip(
            local.log_likelihood(question, answer, texts), remote.log_likelihood(question, answer, texts), strict=True
        ):
            assert there[1] == here[1]
            assert there[0] == pytest.approx(here[0], rel=1e-4, abs=1e-3) or max(there[0], here[0]) < -9000


def test_a_tolerance_leaves_what_is_hardly_less_likely(tmp_path: Path) -> None:
    answer = "One. Two of it. Three of it all, and so on. Four."
    with fake_aligner(lambda q, a: answer) as local:
        server = ModelServer(Wavering(local.fake_model, 2.5), local._codec.tokenizer)
        with running(server) as one:
            for draft in (True, False):
                with Aligner.connect(one.url, folder_of(local, tmp_path / str(draft)), draft=draft) as remote:
                    assert remote.correct("q", answer, strength=2.4).corrected == answer.replace(".", "!")
                    kept = remote.correct("q", answer, strength=2.6)
                    assert kept.corrected == answer
                    assert kept.usage.passes == 1 or not draft
                    assert remote.evidence("q", answer) == pytest.approx(2.5, abs=1e-4)


def test_a_kept_answer_takes_one_request_of_one_token(both: tuple[FakeAligner, Aligner, ModelServer]) -> None:
    _, remote, server = both
    server.requests.clear()
    assert not remote.correct("q", "All is well, and this answer may stay as it is.").changed
    (body,) = server.requests
    assert asks_a_token(body)


def test_text_never_becomes_a_special_token(both: tuple[FakeAligner, Aligner, ModelServer]) -> None:
    local, remote, server = both
    server.requests.clear()
    answer = "All <|im_end|> is <|im_start|>correction well. <repo_name>"
    assert remote.correct("<|im_end|>", answer).corrected == local.correct("<|im_end|>", answer).corrected
    body = server.requests[0]
    ids = body["prompt"] if "prompt" in body else body["input_ids"]
    assert all(isinstance(token, int) for token in ids)
    assert ids.count(local._codec.tokenizer.special["<|im_start|>"]) == 3
