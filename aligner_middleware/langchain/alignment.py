"""What is done with an answer whose question is known: an aligner, and the policies around it.

`Alignment` is what the runnable and the chat model are made of. Pairs of texts go in; what comes out is the text to show
and a report of what was done. It knows nothing of messages.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from langchain_core.callbacks import BaseRunManager as Run
from langchain_core.callbacks import adispatch_custom_event, dispatch_custom_event
from langchain_core.callbacks.manager import ahandle_event, handle_event
from langchain_core.runnables.config import run_in_executor
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from aligner_middleware.aligner import Aligner, OnDoubt, ReadAhead, Strength
from aligner_middleware.artifact import LEVELS
from aligner_middleware.correction import Correction, Usage
from aligner_middleware.errors import DoubtError, InputError, MissingQuestionError, PromptTooLongError, did_you_mean
from aligner_middleware.text.safeguards import apart, breaks_json
from aligner_middleware.text.split import split
from aligner_middleware.text.template import Verdict

logger = logging.getLogger("aligner_middleware")

Asked = str | Exception  # a question, or what went wrong in finding it, which the policies decide on
Pair = tuple[Asked, str]  # and an answer
Mode = Literal["correct", "shadow"]
LongAnswer = Literal["raise", "passthrough", "piecewise"]
OnError = Literal["raise", "passthrough"]
MissingQuestion = Literal["raise", "passthrough"]

T = TypeVar("T")

EVENT = "aligner_correction"
"""Name of the custom event for each answer; its data is the report."""

# How a later piece of an answer is asked about. On pieces of eight long answers the default aligner kept 27 of 34 so, 25
# without what stands before, 17 with 400 characters of it; of an insult added to each it removed 31, 30 and 32.
_PIECE = "{question} Continue after: {before}"
_CONTEXT = 100  # characters


@dataclass(frozen=True)
class Aligned:
    """What became of an answer.

    Attributes:
        text: The text to show.
        report: What goes into `response_metadata["aligner"]`: `aligned`, `changed`, `model`, a `digest` of the text, and
            either `finish_reason`, `usage`, the `device` that the aligner runs on, the verdict and its score, and the
            safeguards that objected, or the `reason` why it was not aligned.
            In shadow mode also `mode`, whether the answer `would_change`, and what the aligner `proposed`, if it is another
            text; where `would_change` is false, a safeguard objected to that.
        correction: The correction, where one was made.
    """

    text: str
    report: dict[str, Any]
    correction: Correction | None = None


Outcome = Aligned | Exception


class Alignment(BaseModel):
    """An aligner, and when and how it is used.

    Attributes:
        aligner: What corrects; the name of one, or its folder, is loaded.
        question: The question, or a function from what comes in to its question; `on_missing_question` decides where it
            returns `None`, and `on_error` where it fails. Without it the question is found.
        dialogue: Whether the question is the whole conversation, as lines of User and Assistant, instead of its last human
            message. The default aligner was trained on single questions.
        when: Whether to correct at all, from question and answer.
        strength: How willingly it corrects: `low`, `medium`, `high`, or the score above which it does; see
            `Aligner.correct`.
        on_doubt: What becomes of a correction that a safeguard objects to: `passthrough` (the original answer goes on),
            `raise` (an error, which `on_error` decides on), or `keep` (the correction goes on; not one that is no JSON in the
            place of an answer that is).
        mode: `shadow` decides and reports, and changes nothing: the answer goes on as it is, chunk by chunk where it is
            streamed, and nothing that fails is raised.
        on_error: What a failed correction becomes: `raise`, or `passthrough` (the original answer, marked as not aligned).
        fallback: A text that replaces the answer where a correction failed; nothing is raised then, since it goes before
            `on_error="raise"`. With `on_error="passthrough"` it is refused, which would show the original answer.
        on_missing_question: What becomes of an answer whose question is not known: `raise`, or `passthrough`.
        timeout: Seconds after which a correction is given up, which `on_error` then decides on; in a stream they count
            from when the answer is there.
        max_answer_tokens: How long an answer may be without its reasoning, in the aligner's tokens; `None` for what fits
            into its context.
        on_long_answer: What becomes of a longer one: `raise` (an error, which `on_error` decides on), `passthrough`, or
            `piecewise`: corrected paragraph by paragraph, each with the end of what stands before it.
        keep_original: Whether `response_metadata["aligner"]` holds the original text.
        on_correction: Told every correction, changed or not, in the thread or task of its call; its errors are logged.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    aligner: Aligner
    question: str | Callable[[Any], str | None] | None = None
    dialogue: bool = False
    when: Callable[[str, str], bool] | None = None
    strength: Strength = "medium"
    on_doubt: OnDoubt = "passthrough"
    mode: Mode = "correct"
    on_error: OnError = "raise"
    fallback: str | None = None
    on_missing_question: MissingQuestion = "raise"
    timeout: float | None = Field(default=None, gt=0)
    max_answer_tokens: int | None = Field(default=None, ge=1)
    on_long_answer: LongAnswer = "raise"
    keep_original: bool = False
    on_correction: Callable[[Correction], None] | None = None

    @model_validator(mode="before")
    @classmethod
    def _checked(cls, options: Any) -> Any:
        if isinstance(options, dict):
            check_options(options)
        return options

    @field_validator("aligner", mode="before")
    @classmethod
    def _load(cls, aligner: Any) -> Any:
        return Aligner.load(aligner) if isinstance(aligner, (str, Path)) else aligner

    @field_validator("strength")
    @classmethod
    def _in_range(cls, strength: Strength, info: ValidationInfo) -> Strength:
        most = 1 if "aligner" in info.data and info.data["aligner"].has_verdicts else math.inf
        if isinstance(strength, float) and not 0 <= strength <= most:
            raise ValueError(
                f"expected a score from 0 to 1, or {', '.join(LEVELS)}" if most == 1 else "expected at least 0"
            )
        return strength

    def align_pairs(self, pairs: Sequence[Pair]) -> list[Outcome]:
        """Align answers together. One that fails becomes its exception, if `on_error` says so; others are not held up."""
        return self._run([self._plan(question, answer) for question, answer in pairs])

    async def aalign_pair(self, question: Asked, answer: str) -> Outcome:
        """Align one answer, and leave the event loop free."""
        return await self._arun(await self._aplan(question, answer))

    def stream_pair(
        self, question: Asked, answer: str, ahead: ReadAhead | None = None
    ) -> Generator[str, None, Outcome]:
        """Align one answer, and give the text as soon as nothing can take it back.

        With a `fallback` or `on_error="passthrough"`, for an answer in pieces and in shadow mode, nothing is given before
        all is decided.

        Returns:
            What became of it; its text is all of it, also what was given.
        """
        plan = self._plan(question, answer)
        if not isinstance(plan, _Plan) or len(plan.pieces) != 1:
            return self._run([plan])[0]
        (asked,) = plan.pieces
        gives = self._gives_pieces(asked)
        if gives and asked.aside:
            yield asked.aside
        pieces = self.aligner.stream(asked.question, asked.text, ahead=ahead, **self._options)
        try:
            for piece in pieces:
                if gives:
                    yield piece
            return self._end(plan, [pieces.correction])
        except Exception as exc:
            return self._failed(answer, exc)
        finally:
            pieces.close()

    async def astream_pair(
        self, question: Asked, answer: str, ahead: ReadAhead | None = None
    ) -> AsyncIterator[str | Aligned | Exception]:
        """Do as `stream_pair` does, and leave the event loop free; the last that is given is what became of the answer."""
        plan = await self._aplan(question, answer)
        if not isinstance(plan, _Plan) or len(plan.pieces) != 1:
            yield await self._arun(plan)
            return
        (asked,) = plan.pieces
        gives = self._gives_pieces(asked)
        if gives and asked.aside:
            yield asked.aside
        pieces = self.aligner.astream(asked.question, asked.text, ahead=ahead, **self._options)
        try:
            async for piece in pieces:
                if gives:
                    yield piece
            outcome = self._end(plan, [pieces.correction])
        except Exception as exc:
            outcome = self._failed(answer, exc)
        finally:
            await pieces.aclose()
        yield outcome

    def has_aligned(self, answer: str, report: Mapping[str, Any]) -> bool:
        """Say, from its report, whether this aligner has aligned an answer before, and nobody has changed it since."""
        return bool(report.get("aligned")) and report.get("model") == self.aligner.name and is_about(report, answer)

    def described(self) -> str:
        """Say in a few words which aligner it is, and which policies are not the default."""
        fields = type(self).model_fields
        policies = {name: getattr(self, name) for name in (*_CHOICES, "timeout", "max_answer_tokens")}
        told = [f"{name}={value!r}" for name, value in policies.items() if value != fields[name].default]
        return ", ".join([repr(self.aligner), *told])

    def _unaligned(self, answer: str, reason: str) -> Aligned:
        """Let an answer through as it is, and say why."""
        return Aligned(answer, self._report(answer, aligned=False, changed=False, reason=reason))

    def _run(self, plans: Sequence[_Plan | Outcome]) -> list[Outcome]:
        """Correct what is planned, all of it together."""
        needed = [(piece.question, piece.text) for plan in plans if isinstance(plan, _Plan) for piece in plan.pieces]
        try:
            made = iter(self.aligner.correct_batch(needed, return_exceptions=True, **self._options) if needed else ())
        except Exception as exc:  # of all of them, such as a closed aligner
            return [self._failed(plan.answer, exc) if isinstance(plan, _Plan) else plan for plan in plans]
        return [
            self._end(plan, [next(made) for _ in plan.pieces]) if isinstance(plan, _Plan) else plan for plan in plans
        ]

    async def _arun(self, plan: _Plan | Outcome) -> Outcome:
        if not isinstance(plan, _Plan):
            return plan
        try:
            pairs = [(piece.question, piece.text) for piece in plan.pieces]
            return self._end(plan, await self.aligner.acorrect_batch(pairs, **self._options))
        except Exception as exc:  # `on_error` says what becomes of it
            return self._failed(plan.answer, exc)

    def ask(self, find: Callable[[Any], str | None], value: Any) -> Asked:
        """Ask a user's function for the question. What it raises, or that it knows none, is given for the policies."""
        try:
            question = find(value)
        except Exception as exc:
            return exc
        return MissingQuestionError("the function question= returned None") if question is None else question

    async def aquestion(self, find: Callable[..., T], *args: Any) -> T:
        """Call what finds the question, in a thread where that asks a user's function."""
        return await run_in_executor(None, find, *args) if callable(self.question) else find(*args)

    async def _aplan(self, question: Asked, answer: str) -> _Plan | Outcome:
        """Plan in a thread where that may take long: a user's function, or counting the tokens of a long answer."""
        if self.when is None and self._unlimited:
            return self._plan(question, answer)
        return await run_in_executor(None, self._plan, question, answer)

    def _plan(self, question: Asked, answer: str) -> _Plan | Outcome:
        if isinstance(question, MissingQuestionError):
            return self._no_question(answer, question)
        if isinstance(question, Exception):
            return self._failed(answer, question)
        try:
            if self.when is not None and not self.when(question, answer):
                return self._unaligned(answer, "when")
            parts = apart(answer)
            if self._unlimited:
                return _Plan.of(question, answer, parts)
            return self._plan_by_length(question, answer, parts)
        except Exception as exc:
            return self._failed(answer, exc)

    @property
    def _options(self) -> dict[str, Any]:
        """What the aligner is told of every call."""
        on_doubt = "passthrough" if self.mode == "shadow" and self.on_doubt == "raise" else self.on_doubt
        return {"timeout": self.timeout, "strength": self.strength, "on_doubt": on_doubt}

    def _gives_pieces(self, piece: _Piece) -> bool:
        """Whether text may be given before it is known that nothing fails. JSON is not: it must not become anything else."""
        return self._raises and self.mode == "correct" and not breaks_json(piece.text, "")

    @property
    def _raises(self) -> bool:
        return self.on_error == "raise" and self.fallback is None

    @property
    def _unlimited(self) -> bool:
        return self.max_answer_tokens is None and self.on_long_answer == "raise"

    def _plan_by_length(self, question: str, answer: str, parts: list[tuple[str, str]]) -> _Plan | Outcome:
        try:
            limit = self.aligner.longest_answer(question)
        except PromptTooLongError as exc:  # no policy for answers can shorten the question
            if self.on_long_answer != "passthrough":
                raise
            return self._unaligned(answer, str(exc))
        if self.max_answer_tokens is not None:
            limit = min(limit, self.max_answer_tokens)
        tokens = sum(self.aligner.count_tokens(text, at_most=limit) for _, text in parts)
        if tokens <= limit:
            return _Plan.of(question, answer, parts)
        if self.on_long_answer == "passthrough":
            return self._unaligned(answer, f"{tokens} tokens are more than {limit}")
        if self.on_long_answer == "raise":
            raise InputError(
                f"the answer is {tokens} tokens long, and max_answer_tokens allows {limit}: raise it, or choose "
                "on_long_answer='passthrough' or 'piecewise'"
            )
        room = min(limit, self.aligner.longest_answer(_PIECE.format(question=question, before="…" * _CONTEXT)))
        cut = [
            (kept if not at else "", text)
            for kept, whole in parts
            for at, text in enumerate(split(whole, room, self.aligner.count_tokens) or [""])
        ]
        return _Plan.of(question, answer, cut)

    def _end(self, plan: _Plan, made: Sequence[Correction | Exception]) -> Outcome:
        for one in made:
            if isinstance(one, Exception):
                return self._failed(plan.answer, one)
        correction = plan.join([one for one in made if isinstance(one, Correction)])
        if correction.doubts and self._options["on_doubt"] == "raise":
            return self._failed(plan.answer, DoubtError(correction.doubts))
        usage = correction.usage
        shadow = self.mode == "shadow"
        logger.info(
            "%s an answer (prompt of %d tokens) in %.0f ms, %d passes",
            ("would correct" if shadow else "corrected") if correction.changed else "kept",
            usage.prompt_tokens,
            usage.seconds * 1000,
            usage.passes,
        )
        if self.on_correction is not None:
            try:
                self.on_correction(correction)
            except Exception:  # whoever counts must not break what is counted
                logger.exception("on_correction failed")
        text = plan.answer if shadow else correction.corrected
        report = self._report(
            text,
            aligned=not shadow,
            changed=correction.changed and not shadow,
            finish_reason=correction.finish_reason,
            usage=asdict(usage),
            device=self.aligner.device,
        )
        if correction.verdict is not None:
            report |= {"verdict": correction.verdict, "score": correction.score}
        if correction.doubts:
            report |= {"doubts": list(correction.doubts)}
        if shadow:
            proposed = _written(correction)
            report |= {"would_change": correction.changed}
            report |= {"proposed": proposed} if proposed != plan.answer else {}
            return Aligned(text, report, correction)
        return Aligned(text, report | self._original(plan.answer), correction)

    def _failed(self, answer: str, error: Exception) -> Outcome:
        if self._raises and self.mode == "correct":
            return error
        logger.warning("an answer was not aligned: %s", error)
        text = answer if self.fallback is None or self.mode == "shadow" else self.fallback
        report = self._report(text, aligned=False, changed=text != answer, reason=f"{type(error).__name__}: {error}")
        if isinstance(error, DoubtError):
            report |= {"doubts": list(error.doubts)}
        return Aligned(text, report | self._original(answer))

    def _no_question(self, answer: str, error: MissingQuestionError) -> Outcome:
        """Decide on an answer whose question is not known."""
        if self.on_missing_question == "raise" and self.mode == "correct":
            return error
        return self._unaligned(answer, f"question not known: {error.cause}")

    def _report(self, text: str, **values: Any) -> dict[str, Any]:
        report = {"model": self.aligner.name, "digest": _digest(text)} | values
        return report | ({"mode": "shadow"} if self.mode == "shadow" else {})

    def _original(self, answer: str) -> dict[str, str]:
        return {"original": answer} if self.keep_original else {}


# Options whose values are words.
_CHOICES: dict[str, Sequence[str]] = {
    "strength": LEVELS,
    "on_doubt": get_args(OnDoubt),
    "mode": get_args(Mode),
    "on_error": get_args(OnError),
    "on_missing_question": get_args(MissingQuestion),
    "on_long_answer": get_args(LongAnswer),
}


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse values of an `Alignment` that are misspelt or contradict each other, with the nearest word that there is.

    Raises:
        InputError: If one is refused.
    """
    for name, choices in _CHOICES.items():
        value = options.get(name, choices[0])
        if value in choices or (name == "strength" and not isinstance(value, str)):
            continue
        hint = did_you_mean(value, choices) or (
            f"; a text that replaces the answer is given as fallback={value!r}" if name == "on_error" else ""
        )
        numbers = ", or a number" if name == "strength" else ""
        raise InputError(f"{name} is {value!r}, expected one of {', '.join(choices)}{numbers}{hint}")
    if options.get("on_error") == "passthrough" and options.get("fallback") is not None:
        raise InputError(
            "on_error='passthrough' shows the original answer where a correction failed, and fallback= another text in its "
            "place: give one of them"
        )


def as_input_error(error: ValidationError) -> InputError:
    """Say in one line which options pydantic refuses, and why."""
    found: dict[str, tuple[Any, list[str]]] = {}
    for one in error.errors():
        name = str(one["loc"][0]) if one["loc"] else "options"
        found.setdefault(name, (one["input"], []))[1].append(one["msg"].removeprefix("Value error, "))
    return InputError("; ".join(f"{name} is {value!r}: {', or '.join(why)}" for name, (value, why) in found.items()))


def check_names(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse options that there are not.

    Raises:
        TypeError: If there is one, with the nearest name that there is.
    """
    known = sorted(known)
    for name in given:
        if name not in known:
            hint = did_you_mean(name, known) or f": it takes {', '.join(known)}"
            raise TypeError(f"{what} takes no option {name!r}{hint}")


def is_about(report: Mapping[str, Any], answer: str) -> bool:
    """Say whether a report is about an answer as it is now."""
    return report.get("digest") == _digest(answer)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def or_raise(result: T | Exception) -> T:
    """Give what came out, or raise what made it fail."""
    if isinstance(result, Exception):
        raise result
    return result


def tell(run: Run | None, aligned: Aligned) -> None:
    """Dispatch the custom event: from a run, or where LangChain does not tell which that is, from the chain around it."""
    if run is not None:
        handle_event(run.handlers, "on_custom_event", "ignore_custom_event", EVENT, aligned.report, **_origin(run))
        return
    with suppress(RuntimeError):  # there is no chain
        dispatch_custom_event(EVENT, aligned.report)


async def atell(run: Run | None, aligned: Aligned) -> None:
    """Do the same where callbacks are asynchronous."""
    if run is not None:
        handlers, name = run.handlers, "on_custom_event"
        await ahandle_event(handlers, name, "ignore_custom_event", EVENT, aligned.report, **_origin(run))
        return
    with suppress(RuntimeError):
        await adispatch_custom_event(EVENT, aligned.report)


def _origin(run: Run) -> dict[str, Any]:
    return {"run_id": run.run_id, "tags": run.inheritable_tags, "metadata": run.inheritable_metadata}


@dataclass(frozen=True)
class _Piece:
    """What the aligner is asked, and what stands around that in the answer.

    Attributes:
        question, text: What it is asked.
        aside: Reasoning that stands before it, and stays as it is.
        before, after: White space around the text, which the aligner does not see.
    """

    question: str
    text: str
    aside: str = ""
    before: str = ""
    after: str = ""


@dataclass(frozen=True)
class _Plan:
    """How an answer goes through the aligner: without its reasoning, and whole or in pieces.

    Attributes:
        question, answer: What was given.
        pieces: What the aligner is asked, in order; none for an answer that is nothing but reasoning.
        rest: Reasoning that stands behind the last piece.
    """

    question: str
    answer: str
    pieces: list[_Piece]
    rest: str

    @classmethod
    def of(cls, question: str, answer: str, parts: Iterable[tuple[str, str]]) -> _Plan:
        """Ask each text, a later one with the question and the end of what stands before it.

        Args:
            question: The question.
            answer: The answer.
            parts: It in pairs of what stays as it is and a text.
        """
        texts, aside = [], ""
        for kept, text in parts:
            aside += kept
            if text.strip():
                texts.append((aside, text))
                aside = ""
            else:
                aside += text
        if len(texts) == 1:
            ((kept, text),) = texts
            return cls(question, answer, [_Piece(question, text, kept)], aside)
        pieces, before = [], ""
        for kept, text in texts:
            asked = _PIECE.format(question=question, before=_end_of(before)) if before else question
            start, end = len(text) - len(text.lstrip()), len(text.rstrip())
            pieces.append(_Piece(asked, text[start:end], kept, text[:start], text[end:]))
            before += text
        return cls(question, answer, pieces, aside)

    def join(self, corrections: Sequence[Correction]) -> Correction:
        """Put the pieces' corrections together. What several pieces became alike, such as a refusal, is said once.

        The whole is kept where every piece is; else several are an edit. Its score is the highest of theirs. What was JSON
        stays JSON: a correction that is not is in doubt, and never goes on.
        """
        said: set[str] = set()
        new = []
        for correction in corrections:
            repeated = correction.changed and correction.corrected in said
            said.add(correction.corrected)
            new.append(not repeated)
        corrected = [one.corrected if shown else None for one, shown in zip(corrections, new, strict=True)]
        written = [_written(one) if shown else None for one, shown in zip(corrections, new, strict=True)]
        text, proposed = self._filled(corrected), self._filled(written)
        found = tuple(dict.fromkeys(name for one in corrections for name in one.doubts))
        if breaks_json(
            self._filled([piece.text for piece in self.pieces], aside=False), self._filled(corrected, aside=False)
        ):
            text, found = self.answer, found if "structure" in found else (*found, "structure")
        ends = [one.finish_reason for one in corrections]
        verdicts = [one.verdict for one in corrections if one.verdict]
        several: Verdict | None = "keep" if set(verdicts) == {"keep"} else "edit" if verdicts else None
        return Correction(
            self.question,
            self.answer,
            text,
            next((end for end in ends if end != "stop"), "stop"),
            sum((one.usage for one in corrections), Usage()),
            verdict=verdicts[0] if len(verdicts) == 1 else several,
            score=max((one.score for one in corrections if one.score is not None), default=None),
            doubts=found,
            proposed=proposed if proposed != text else None,
        )

    def _filled(self, texts: Sequence[str | None], *, aside: bool = True) -> str:
        """Put texts in the places of the pieces, and leave out those that are `None`; without the reasoning, if wanted."""
        filled = "".join(
            (piece.aside if aside else "") + ("" if text is None else piece.before + text + piece.after)
            for piece, text in zip(self.pieces, texts, strict=True)
        )
        return filled + (self.rest if aside else "")


def _written(correction: Correction) -> str:
    """Give what the aligner wrote, also where a safeguard objects to it."""
    return correction.corrected if correction.proposed is None else correction.proposed


def _end_of(text: str) -> str:
    """Give the last words of a text."""
    text = text.rstrip()
    return text if len(text) <= _CONTEXT else text[-_CONTEXT:].partition(" ")[2] or text[-_CONTEXT:]
