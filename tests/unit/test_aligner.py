"""`Aligner` over a model whose corrections are known."""

import _thread
import asyncio
import inspect
import math
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from aligner_middleware import (
    Aligner,
    AlignerError,
    ArtifactError,
    DoubtError,
    InputError,
    PromptTooLongError,
)
from aligner_middleware.calibration import Calibration
from tests.fakes import FakeModel, artifact_folder, byte_tokenizer, fake_aligner, judging_aligner

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60)


def soften(question: str, answer: str) -> str:
    return answer.replace("idiot", "friend")


@given(TEXT.filter(str.strip), TEXT)
def test_a_good_answer_comes_back_byte_for_byte_in_one_pass(question: str, answer: str) -> None:
    correction = fake_aligner(lambda q, a: a).correct(question, answer)
    assert correction.corrected == answer
    assert not correction.changed
    assert correction.usage.passes == (1 if answer.strip() else 0)


def test_a_bad_answer_is_corrected_and_says_what_it_cost() -> None:
    correction = fake_aligner(soften).correct("Which way?", "Left, idiot, then right.")
    assert correction.corrected == "Left, friend, then right."
    assert correction.changed
    assert correction.original == "Left, idiot, then right."
    assert correction.usage.decoded_tokens == len(correction.corrected) - correction.usage.accepted_tokens
    assert correction.usage.decoded_tokens < len("friend, then right.")  # ", then right." was found in the answer again
    assert correction.usage.draft_tokens == len(correction.original)


@pytest.mark.parametrize("answer", ["Fine.", "No, idiot.", "日本 idiot 👩‍👩‍👧", "<|im_end|> idiot"])
def test_draft_batch_and_stream_agree(answer: str) -> None:
    with_draft, without = fake_aligner(soften), fake_aligner(soften, draft=False)
    expected = soften("", answer)
    assert with_draft.correct("q", answer).corrected == expected
    assert without.correct("q", answer).corrected == expected
    assert [c.corrected for c in with_draft.correct_batch([("q", answer), ("r", "idiot")])] == [expected, "friend"]
    assert "".join(with_draft.stream("q", answer)) == expected
    assert "".join(with_draft.stream("q", iter(answer))) == expected
    assert asyncio.run(with_draft.acorrect("q", answer)).corrected == expected


# What is written for the answer "Wait, idiot, it is hot.", and the safeguards that object.
HOT = "Wait, idiot, it is hot."
DOUBTFUL: dict[str, tuple[str, tuple[str, ...]]] = {
    "white space": ("Wait,  idiot, it is hot.", ("spacing",)),
    "another script": ("Wait, друг, it is hot.", ("script",)),
    "nothing": ("", ("empty",)),
    "an open fence": ("Please wait:\n```\nit is hot.", ("structure",)),
}


@pytest.mark.parametrize(("written", "doubts"), DOUBTFUL.values(), ids=DOUBTFUL)
def test_a_doubtful_correction_leaves_the_answer_as_it_is(written: str, doubts: tuple[str, ...]) -> None:
    aligner = fake_aligner(lambda q, a: written)
    correction = aligner.correct("q", HOT)
    assert (correction.corrected, correction.proposed, correction.doubts) == (HOT, written, doubts)
    assert not correction.changed
    kept = aligner.correct("q", HOT, on_doubt="keep")
    assert (kept.corrected, kept.proposed, kept.doubts) == (written, None, doubts)
    for way in (aligner.correct, lambda *given, **options: list(aligner.stream(*given, **options))):
        with pytest.raises(DoubtError, match="the correction is doubtful") as caught:
            way("q", HOT, on_doubt="raise")
        assert caught.value.doubts == doubts


def test_a_correction_that_nobody_doubts_says_so() -> None:
    correction = fake_aligner(soften).correct("q", HOT, on_doubt="raise")
    assert (correction.doubts, correction.proposed, correction.verdict, correction.score) == ((), None, None, None)


def test_a_wrong_on_doubt_is_refused() -> None:
    with pytest.raises(InputError, match="did you mean 'passthrough'"):
        fake_aligner(soften).correct("q", "a", on_doubt="passthru")  # type: ignore[arg-type]


def test_a_correction_that_was_cut_off_is_none() -> None:
    aligner = fake_aligner(lambda q, a: "It is well known that this is so.", max_new_tokens=7)
    correction = aligner.correct("q", "a")
    assert correction.corrected == "a"
    assert correction.proposed == "It is w"
    assert correction.finish_reason == "length"
    assert correction.doubts == ("cut_off",)
    assert aligner.correct("q", "a", on_doubt="keep").corrected == "It is w"


def test_a_correction_that_loops_ends_early_and_is_none() -> None:
    aligner = fake_aligner(lambda q, a: a + " On and on." * 200)
    correction = aligner.correct("q", HOT)
    assert correction.corrected == HOT
    assert (correction.finish_reason, correction.doubts) == ("loop", ("repeats",))
    assert (correction.proposed or "").startswith(HOT + " On and on. On and on.")
    assert len(correction.proposed or "") < len(HOT) + 60


def test_a_doubt_fails_its_own_pair_alone() -> None:
    aligner = fake_aligner(lambda q, a: "" if a == "bad" else soften(q, a))
    pairs = [("q", "idiot"), ("q", "bad"), ("q", "fine")]
    good, bad, fine = aligner.correct_batch(pairs, on_doubt="raise", return_exceptions=True)
    assert (good.corrected, fine.corrected) == ("friend", "fine")  # type: ignore[union-attr]
    assert isinstance(bad, DoubtError)
    with pytest.raises(DoubtError):
        aligner.correct_batch(pairs, on_doubt="raise")


class Unhurried(FakeModel):
    """Gives whoever iterates a stream time between two passes."""

    def append(self, *args: Any) -> Any:
        time.sleep(0.002)
        return super().append(*args)


def test_a_stream_gives_pieces_as_they_are_decided_only_where_doubts_are_kept() -> None:
    answer = " ".join(f"Go on to {place}, idiot." for place in ("Rome", "the mill", "your left", "bed"))
    unhurried = fake_aligner(soften, draft=False)
    unhurried.fake_model.__class__ = Unhurried
    pieces = list(unhurried.stream("q", answer, on_doubt="keep"))
    whole = list(fake_aligner(soften, draft=False).stream("q", answer))
    assert "".join(pieces) == "".join(whole) == soften("q", answer)
    assert len([piece for piece in pieces if piece]) > 1
    assert len([piece for piece in whole if piece]) == 1


def test_a_stream_takes_nothing_back() -> None:
    aligner = fake_aligner(lambda q, a: a + " On and on." * 200)
    assert "".join(aligner.stream("q", HOT)) == HOT
    assert "".join(aligner.stream("q", HOT, on_doubt="keep")).startswith(HOT + " On and on. On")


class Wavering(FakeModel):
    """Wants `!` for every `.` of the answer, by so many nats."""

    def __init__(self, model: FakeModel, gap: float) -> None:
        super().__init__(model.rule)
        self.gap = gap
        tokenizer = byte_tokenizer()
        self.dot, self.bang = tokenizer.encode(".!")
        self.rule = self.waver
        self.inner = model.rule

    def waver(self, tokens: list[int]) -> int | dict[int, float]:
        said = self.inner([self.dot if token == self.bang else token for token in tokens])
        return {self.dot: 50.0, self.bang: 50.0 + self.gap} if said == self.dot else said  # type: ignore[return-value]


@given(st.floats(0.01, 9), st.floats(0.01, 9), st.booleans())
@settings(max_examples=30)
def test_a_tolerance_leaves_what_is_hardly_less_likely(gap: float, tolerance: float, draft: bool) -> None:
    assume(abs(gap - tolerance) > 1e-3)
    answer = "One. Two of it. Three of it all."
    with fake_aligner(lambda q, a: answer, draft=draft) as aligner:
        aligner._scheduler._model = Wavering(aligner.fake_model, gap)
        correction = aligner.correct("q", answer, strength=tolerance)
        assert correction.corrected == (answer if gap <= tolerance else answer.replace(".", "!"))
        assert aligner.evidence("q", answer) == pytest.approx(gap, abs=1e-4)
        levels = Calibration().tolerances
        changed = {level for level in levels if aligner.correct("q", answer, strength=level).changed}
        assert changed == {level for level, least in levels.items() if gap > least}


def test_a_blank_answer_costs_nothing_and_a_blank_question_is_refused() -> None:
    aligner = fake_aligner(soften)
    assert aligner.correct("q", " \n").corrected == " \n"
    assert aligner.correct("q", "").usage.passes == 0
    with pytest.raises(InputError, match="question is blank"):
        aligner.correct("  ", "a")


def test_a_lone_surrogate_is_refused_by_place() -> None:
    with pytest.raises(InputError, match=r"answer holds a lone surrogate, '\\ud83d' at character 2"):
        fake_aligner(soften).correct("q", "ab\ud83d")


def test_nul_bytes_pass_through() -> None:
    assert fake_aligner(soften).correct("q", "a\x00b").corrected == "a\x00b"


def test_a_tolerance_is_found_with_drawn_tokens_too() -> None:
    answer = "One. Two of it. Three of it all."
    with fake_aligner(lambda q, a: answer, temperature=0.7, seed=1) as aligner:
        aligner._scheduler._model = Wavering(aligner.fake_model, 2.5)
        assert aligner.evidence("q", answer) == pytest.approx(2.5, abs=1e-4)


@pytest.mark.parametrize("make", [fake_aligner, judging_aligner, partial(judging_aligner, marks=False)])
def test_a_question_longer_than_the_context_is_what_the_error_names(make: Callable[..., Aligner]) -> None:
    question = "Why? " * 1000
    with make(soften) as aligner:
        for ask in (
            lambda: aligner.correct(question, "idiot"),
            lambda: aligner.longest_answer(question),
            lambda: list(aligner.stream(question, "idiot")),
            lambda: asyncio.run(aligner.acorrect(question, "idiot")),
        ):
            with pytest.raises(
                PromptTooLongError, match="the question is 5000 tokens long, and the aligner reads 4096"
            ):
                ask()
        with pytest.raises(PromptTooLongError, match="question and answer are"):
            aligner.correct("Why?", "idiot " * 1000)
        assert aligner.longest_answer("Why?") > 1000


@given(st.integers(0, 4200))
def test_the_longest_answer_is_one_token_or_more_or_the_question_is_refused(length: int) -> None:
    for aligner in QUIET:
        try:
            longest = aligner.longest_answer("q" * length)
        except PromptTooLongError as exc:
            assert length > 1000
            assert exc.tokens == length
        else:
            assert longest >= 1


QUIET = [fake_aligner(soften), judging_aligner(soften)]


def test_a_text_that_cannot_fit_is_refused_before_a_single_token_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    aligner, long = fake_aligner(soften), "word " * 400_000

    def encode(text: str) -> list[int]:
        raise AssertionError(f"{len(text)} characters were encoded")

    monkeypatch.setattr(aligner._codec.tokenizer, "encode", encode)
    for ask in (
        lambda: aligner.correct("q", long),
        lambda: aligner.correct("q", "<think>So.</think>" + long),
        lambda: aligner.evidence("q", long),
        lambda: aligner.log_likelihood("q", long, ["a"]),
        lambda: aligner.log_likelihood("q", "a", ["a", long]),
        lambda: list(aligner.stream("q", [long[:1_000_000], long[1_000_000:]])),
        lambda: asyncio.run(aligner.acorrect("q", long)),
        lambda: asyncio.run(streamed(aligner, "q", long)),
    ):
        with pytest.raises(
            PromptTooLongError, match=r"question and answer are 2000\d\d\d characters long.* 4096 tokens"
        ):
            ask()
    for ask in (lambda: aligner.correct(long, "a"), lambda: aligner.longest_answer(long)):
        with pytest.raises(PromptTooLongError, match="the question is 2000000 characters long"):
            ask()
    assert aligner.correct("q", " " * 2_000_000).corrected == " " * 2_000_000


async def streamed(aligner: Aligner, question: str, answer: str) -> str:
    async def chunks() -> AsyncIterator[str]:
        for at in range(0, len(answer), 100_000):
            yield answer[at : at + 100_000]
            await asyncio.sleep(0)

    return "".join([piece async for piece in aligner.astream(question, chunks())])


def test_no_text_is_encoded_or_compared_in_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    aligner = judging_aligner(soften)
    threads: set[int] = set()
    encode, decode = aligner._codec.tokenizer.encode, aligner._codec.tokenizer.decode

    def seen(work: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def noted(given: Any) -> Any:
            threads.add(threading.get_ident())
            return work(given)

        return noted

    monkeypatch.setattr(aligner._codec.tokenizer, "encode", seen(encode))
    monkeypatch.setattr(aligner._codec.tokenizer, "decode", seen(decode))

    async def main() -> None:
        said = await aligner.acorrect("q", HOT)
        assert (
            [c.corrected for c in await aligner.acorrect_batch([("q", HOT)])] == [said.corrected] == [soften("", HOT)]
        )
        assert await streamed(aligner, "q", HOT) == said.corrected
        with pytest.raises(InputError):
            await aligner.acorrect("q", "ab\ud83d")

    asyncio.run(main())
    aligner.close()
    assert threads
    assert threading.get_ident() not in threads


def test_an_answer_of_100_000_characters_is_refused_with_figures() -> None:
    with pytest.raises(PromptTooLongError) as caught:
        fake_aligner(soften).correct("q", "a" * 100_000)
    assert caught.value.tokens > 100_000
    assert caught.value.limit == 4096


BAD_OPTIONS = [
    *(("timeout", value) for value in (0, -1, True, math.nan, math.inf, "3")),
    *(("strength", value) for value in ("hihg", -1, 2, True, math.nan, None)),
    *(("on_doubt", value) for value in ("kep", None, True)),
]


@pytest.mark.parametrize("way", ["stream", "astream", "correct", "correct_batch", "acorrect", "acorrect_batch"])
@pytest.mark.parametrize(("name", "value"), BAD_OPTIONS)
def test_a_bad_option_is_refused_before_anything_is_read(way: str, name: str, value: Any) -> None:
    taken = []

    def given() -> Iterator[Any]:
        taken.append(way)
        yield ("q", HOT) if "batch" in way else HOT

    async def main(aligner: Aligner) -> None:
        found = getattr(aligner, way)(*[given()] if "batch" in way else ["q", given()], **{name: value})
        if inspect.isawaitable(found):
            await found

    with judging_aligner(soften) as aligner:
        with pytest.raises(InputError, match=f"^{name} is {value!r}, expected "):
            asyncio.run(main(aligner))
        assert not taken
        assert aligner.correct("q", HOT, timeout=1e300).changed  # longer than any clock can measure


def test_one_bad_pair_does_not_hold_the_others_up() -> None:
    good, bad = fake_aligner(soften).correct_batch([("q", "idiot"), ("", "a")], return_exceptions=True)
    assert good.corrected == "friend"  # type: ignore[union-attr]
    assert isinstance(bad, InputError)


def test_no_correction_for_no_pairs() -> None:
    assert fake_aligner(soften).correct_batch([]) == []


def test_a_wrong_engine_is_refused() -> None:
    with pytest.raises(InputError, match="expected 'onnx' or 'torch'"):
        Aligner.load(engine="jax")  # type: ignore[arg-type]


def test_an_aligner_says_what_it_is_and_runs_on() -> None:
    assert repr(fake_aligner(soften)) == "Aligner('fake', precision unknown, on fake)"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"threads": 0}, InputError, "threads is 0, expected at least 1"),
        ({"threads": -1}, InputError, "threads is -1, expected at least 1"),
        ({"precision": "int9"}, InputError, "precision is 'int9'.* did you mean 'int4'|'int8'"),
        ({"precison": "int8"}, TypeError, r"Aligner\.load got .* 'precison'; did you mean 'precision'"),
        ({"unknown": 1}, TypeError, r"Aligner\.load got .* 'unknown'"),
        ({"engine": "torch", "threads": 2}, InputError, "ONNX Runtime's"),
        ({"engine": "torch", "providers": ["CPUExecutionProvider"]}, InputError, "ONNX Runtime's"),
        ({"precision": "float16"}, ArtifactError, "holds weights in int8, not in float16"),
        ({"providers": ["CPUExecutionProvidr"]}, ArtifactError, "did you mean 'CPUExecutionProvider'"),
        ({"providers": "CPUExecutionProvider"}, InputError, "expected a list of names"),
        ({"providers": []}, InputError, "expected a list of names"),
    ],
)
def test_an_option_that_cannot_be_is_refused(
    options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        Aligner.load(artifact_folder(tmp_path / "a"), **options)


@pytest.mark.parametrize("library", ["gevent.thread", "eventlet.green.thread"])
def test_green_threads_are_refused_with_a_sentence(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    aligner = fake_aligner(soften)

    def start_new_thread(*args: Any) -> None:
        raise AssertionError("a green thread was started")

    start_new_thread.__module__ = library
    monkeypatch.setattr(_thread, "start_new_thread", start_new_thread)
    name = library.partition(".")[0]
    for ask in (Aligner.load, lambda: aligner.correct("q", "a")):
        with pytest.raises(AlignerError, match=f"{name} has replaced threads by green ones.*thread=False"):
            ask()


def test_threads_patched_by_gevent_are_refused() -> None:
    pytest.importorskip("gevent")
    program = (
        "from gevent import monkey; monkey.patch_all()\n"
        "from aligner_middleware import Aligner, AlignerError\n"
        "try: Aligner.load()\n"
        "except AlignerError as exc: print(exc)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.startswith("gevent has replaced threads")
