"""The options of an alignment: their names, their values, and the checks of both.

`AlignmentOptions` is a mixin: whatever derives from it takes each option as a field, so that LangChain's
`configurable_fields` sets it per call. It knows nothing of messages and corrects nothing.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from aligner_middleware.errors import InputError, did_you_mean
from aligner_middleware.strength import LEVELS, OnDoubt, Strength

if TYPE_CHECKING:
    from aligner_middleware.aligner import Aligner
    from aligner_middleware.correction import Correction
else:  # pydantic evaluates the types of fields. These would load the engine; `_load` checks the aligner instead.
    Aligner = Correction = Any

Mode = Literal["correct", "shadow"]
LongAnswer = Literal["raise", "passthrough", "piecewise"]
OnError = Literal["raise", "passthrough"]
MissingQuestion = Literal["raise", "passthrough"]

# Options whose values are words; the first is the default of those that no validator sees.
_CHOICES: dict[str, Sequence[str]] = {
    "strength": LEVELS,
    "on_doubt": get_args(OnDoubt),
    "mode": get_args(Mode),
    "on_error": get_args(OnError),
    "on_missing_question": get_args(MissingQuestion),
    "on_long_answer": get_args(LongAnswer),
}
_SHOWN = ("by_sentence", "instruction", "timeout", "max_answer_tokens")  # beside these, in a description


class AlignmentOptions(BaseModel):
    """An aligner, and when and how it is used.

    Attributes:
        aligner: The aligner; a name or a folder is loaded by `Aligner.load`.
        question: The question, or a function from the input to its question; `on_missing_question` applies where it
            returns `None`, and `on_error` where it raises. Without it the question is found.
        dialogue: Whether the question is the whole conversation, as lines of User and Assistant, instead of its last human
            message. The default aligner was trained on single questions.
        when: Whether to correct at all, from question and answer.
        strength: How willingly it corrects: `low`, `medium`, `high`, or the score above which it does; see
            `Aligner.correct`.
        by_sentence: Whether a stream shows sentences as soon as the answer up to their end is kept, while the rest is still
            being written. They stay, whatever comes later (docs/verdicts.md). It needs an aligner with verdicts, and is
            refused together with what only the whole answer can decide: `when`, `fallback`, and `mode="shadow"`.
        on_doubt: What to do with a correction that a safeguard objects to: `passthrough` (return the original answer),
            `raise` (an error, to which `on_error` applies), or `keep` (return the correction; JSON is never replaced by
            text that is no JSON).
        instruction: How to correct, for an aligner that was trained with instructions, such as "more empathic"; `None` for
            the aligner's own, an empty text for none.
        mode: `shadow` decides and reports, and changes nothing: the answer is returned as it is, chunk by chunk where it is
            streamed, and no error is raised.
        on_error: What to do where a correction fails: `raise`, or `passthrough` (return the original answer, marked as not
            aligned).
        fallback: A text that replaces the answer where a correction fails; nothing is raised then, since it takes
            precedence over `on_error="raise"`. Together with `on_error="passthrough"`, which would return the original
            answer, it is refused.
        on_missing_question: What to do with an answer whose question is not known: `raise`, or `passthrough`.
        timeout: Seconds after which a correction is given up, to which `on_error` applies; in a stream they count from the
            end of the answer.
        max_answer_tokens: Longest answer without its reasoning, in the aligner's tokens; `None` for what fits into its
            context.
        on_long_answer: What to do with a longer one: `raise` (an error, to which `on_error` applies), `passthrough`, or
            `piecewise`: correct it paragraph by paragraph, each with the end of what stands before it.
        keep_original: Whether `response_metadata["aligner"]` holds the original text.
        on_correction: Called with every correction, changed or not, in the thread or task of its call; its errors are
            logged.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, defer_build=True)  # a mixin is never made itself

    aligner: Aligner
    question: str | Callable[[Any], str | None] | None = None
    dialogue: bool = False
    when: Callable[[str, str], bool] | None = None
    strength: Strength = "medium"
    by_sentence: bool = False
    on_doubt: OnDoubt = "passthrough"
    instruction: str | None = None
    mode: Mode = "correct"
    on_error: OnError = "raise"
    fallback: str | None = None
    on_missing_question: MissingQuestion = "raise"
    timeout: float | None = Field(default=None, gt=0, allow_inf_nan=False, strict=True)
    max_answer_tokens: int | None = Field(default=None, ge=1)
    on_long_answer: LongAnswer = "raise"
    keep_original: bool = False
    on_correction: Callable[[Correction], None] | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_options(cls, options: Any) -> Any:
        if isinstance(options, dict):
            check_options(options)
        return options

    @field_validator("aligner", mode="before")
    @classmethod
    def _load(cls, aligner: Any) -> Any:
        from aligner_middleware.aligner import Aligner

        if isinstance(aligner, (str, Path)):
            return Aligner.load(aligner)
        if not isinstance(aligner, Aligner):
            raise ValueError("Input should be an instance of Aligner")
        return aligner

    @field_validator("strength")
    @classmethod
    def _check_range(cls, strength: Strength, info: ValidationInfo) -> Strength:
        highest = 1 if "aligner" in info.data and info.data["aligner"].has_verdicts else math.inf
        if isinstance(strength, float) and not 0 <= strength <= highest:
            raise ValueError(
                f"expected a score from 0 to 1, or {', '.join(LEVELS)}" if highest == 1 else "expected at least 0"
            )
        return strength

    @field_validator("instruction")
    @classmethod
    def _check_instruction(cls, instruction: str | None, info: ValidationInfo) -> str | None:
        if instruction and "aligner" in info.data:
            info.data["aligner"].instruction_for(instruction)
        return instruction

    @field_validator("by_sentence")
    @classmethod
    def _check_verdicts(cls, by_sentence: bool, info: ValidationInfo) -> bool:
        if by_sentence and "aligner" in info.data and not info.data["aligner"].has_verdicts:
            raise ValueError("expected an aligner that gives verdicts, which this one does not")
        return by_sentence

    def described(self) -> str:
        """Describe in a few words the aligner and the options that differ from their defaults."""
        fields = AlignmentOptions.model_fields
        values = {name: getattr(self, name) for name in (*_CHOICES, *_SHOWN)}
        shown = [f"{name}={value!r}" for name, value in values.items() if value != fields[name].default]
        return ", ".join([repr(self.aligner), *shown])


def call_options(options: AlignmentOptions) -> dict[str, Any]:
    """Give the options that each call of the aligner takes."""
    on_doubt = "passthrough" if options.mode == "shadow" and options.on_doubt == "raise" else options.on_doubt
    prompt = {"strength": options.strength, "instruction": options.instruction}
    return {"timeout": options.timeout, "on_doubt": on_doubt, **prompt}


def raises(options: AlignmentOptions) -> bool:
    """Say whether a failed correction raises."""
    return options.on_error == "raise" and options.fallback is None and options.mode == "correct"


def limits_length(options: AlignmentOptions) -> bool:
    """Say whether an answer's tokens must be counted before it is corrected."""
    return options.max_answer_tokens is not None or options.on_long_answer != "raise"


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse values that are misspelt or contradict each other.

    Raises:
        InputError: If one is refused, with the nearest word that there is.
    """
    for name, choices in _CHOICES.items():
        value = options.get(name, choices[0])
        if value in choices or (name == "strength" and not isinstance(value, str | bool)):
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
    if options.get("by_sentence"):
        early = [f"{name}=" for name in ("when", "fallback") if options.get(name) is not None]
        if early or options.get("mode") == "shadow":
            raise InputError(
                "by_sentence=True shows text before the whole answer is decided, which cannot go together with "
                f"{early[0] if early else 'mode=shadow'!r}: leave one of them out"
            )


@cache
def option_names() -> frozenset[str]:
    """Name the options of `AlignerRunnable`, `wrap` and the middleware, those of `Aligner.load` among them."""
    from aligner_middleware.aligner import Aligner

    load = inspect.signature(Aligner.load).parameters.values()
    load_options = {parameter.name for parameter in load if parameter.kind is parameter.KEYWORD_ONLY}
    return frozenset({*AlignmentOptions.model_fields, "name", *load_options} - {"aligner"})


def check_names(owner: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse options that do not exist.

    Args:
        owner: Name of what takes the options, for the message.
        given: The names given.
        known: The names that exist.

    Raises:
        TypeError: If a name is unknown, with the nearest one that exists.
    """
    known = sorted(known)
    for name in given:
        if name not in known:
            hint = did_you_mean(name, known) or f": it takes {', '.join(known)}"
            raise TypeError(f"{owner} takes no option {name!r}{hint}")


def as_input_error(error: ValidationError) -> InputError:
    """Say in one line which options pydantic refuses, and why."""
    refused: dict[str, tuple[Any, list[str]]] = {}
    for detail in error.errors():
        name = str(detail["loc"][0]) if detail["loc"] else "options"
        refused.setdefault(name, (detail["input"], []))[1].append(detail["msg"].removeprefix("Value error, "))
    return InputError(
        "; ".join(f"{name} is {value!r}: {', or '.join(reasons)}" for name, (value, reasons) in refused.items())
    )
