"""The options of an aligner and of a call: their types, their checks, and the limits that a strength stands for."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aligner_middleware.calibration import Calibration
from aligner_middleware.data.triples import LONGEST_INSTRUCTION
from aligner_middleware.engine import GREEDY, Sampler
from aligner_middleware.errors import InputError, did_you_mean
from aligner_middleware.strength import LEVELS, Strength
from aligner_middleware.text.checks import check_text
from aligner_middleware.text.template import PromptTemplate


@dataclass(frozen=True)
class Settings:
    """How an aligner decodes. `Aligner` explains each setting.

    Raises:
        InputError: If one is out of range.
    """

    max_new_tokens: int | None = None
    draft: bool = True
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    instruction: str | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise InputError(
                f"temperature is {self.temperature}, expected at least 0; top_p is {self.top_p}, expected above 0, up to 1"
            )
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {self.max_new_tokens}, expected at least 1")

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that a correction depends on."""
        drawn = {"temperature": self.temperature, "top_p": self.top_p, "seed": self.seed} if self.temperature else {}
        told = {"instruction": self.instruction.strip()} if self.instruction and self.instruction.strip() else {}
        return {"max_new_tokens": self.max_new_tokens} | drawn | told

    def instruction_for(self, given: str | None, template: PromptTemplate) -> str:
        """Give the instruction of a call, without white space around it; empty for none.

        Args:
            given: The call's own; `None` for the aligner's, and an empty text for none.
            template: The aligner's prompt.

        Raises:
            InputError: If it is not valid text or too long; or if the prompt has no place for one, or needs one.
        """
        instruction = (self.instruction if given is None else given) or ""
        check_text("instruction", instruction)
        instruction = instruction.strip()
        if len(instruction) > LONGEST_INSTRUCTION:
            raise InputError(
                f"the instruction is {len(instruction)} characters long, expected at most {LONGEST_INSTRUCTION}: shorten it"
            )
        if instruction and not template.takes_instruction:
            raise InputError(
                f"this aligner was not trained with instructions (its prompt template {template.name!r} has no place for "
                f"one): leave out the instruction {instruction!r:.80}, or train an aligner on rows with instructions "
                "(docs/training.md)"
            )
        if template.needs_instruction and not instruction:
            raise InputError(
                f"every prompt of the template {template.name!r} holds an instruction: give one, such as "
                "instruction='Harmlessness: The response should avoid content that is offensive'"
            )
        return instruction

    def sampler(self, question: str, answer: str) -> Sampler:
        """Make the sampler of one correction; with a seed, equal pairs get equal samplers."""
        if self.temperature == 0:
            return GREEDY
        own = None if self.seed is None else zlib.crc32(f"{self.seed}\0{question}\0{answer}".encode())
        return Sampler(self.temperature, self.top_p, own)


def limits(strength: Strength, calibration: Calibration, *, has_verdicts: bool) -> tuple[float, float]:
    """Give the threshold on the log odds and the tolerance of a strength, both in nats.

    Args:
        strength: A level; the score above which an answer is corrected; without verdicts, the tolerance itself.
        calibration: The levels.
        has_verdicts: Whether the aligner gives verdicts.

    Raises:
        InputError: If it is an unknown level, or a number out of range.
    """
    if isinstance(strength, str):
        check_choice("strength", strength, LEVELS)
        return calibration.log_odds(calibration.levels[strength]), calibration.tolerances[strength]
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not strength >= 0:
        raise InputError(f"strength is {strength!r}, expected {', '.join(LEVELS)}, or a number of at least 0")
    if not has_verdicts:
        return 0.0, float(strength)
    if strength > 1:
        raise InputError(f"strength is {strength}, expected a score from 0 to 1, or {', '.join(LEVELS)}")
    return calibration.log_odds(strength), calibration.tolerances["medium"]


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a value that is not one of the choices.

    Raises:
        InputError: If it is not; the message names the nearest choice.
    """
    if value not in choices:
        raise InputError(f"{name} is {value!r}, expected one of {', '.join(choices)}{did_you_mean(value, choices)}")


def check_verdicts(has_verdicts: bool, **options: object) -> None:
    """Refuse options, by their names, that only an aligner with verdicts can have.

    Raises:
        InputError: If one is given, and the aligner gives no verdicts.
    """
    for name, value in options.items():
        if value and not has_verdicts:
            raise InputError(
                f"{name} needs an aligner that gives verdicts, which this one does not: leave it out, or train one with "
                "verdicts (docs/verdicts.md)"
            )


def check_released(released: str, answer: object) -> None:
    """Refuse a text as the released one that is not the beginning of a whole answer.

    Raises:
        InputError: If it is not, or ends with white space, which a correction may change.
    """
    if released and not (isinstance(answer, str) and answer.startswith(released) and not released[-1].isspace()):
        expected = "the beginning of an answer that is given as a whole, without white space at its end"
        raise InputError(f"released is {released!r}, expected {expected}")
