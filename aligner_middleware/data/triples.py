"""Question-answer-correction triples: read from JSON lines in the formats that people have, checked row by row."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from aligner_middleware.data.files import read_lines
from aligner_middleware.data.json_lines import parse_json, text_at
from aligner_middleware.errors import DataError, JobError

LONGEST_INSTRUCTION = 2000  # characters
Instruction = Annotated[
    str | None, Field(max_length=LONGEST_INSTRUCTION), AfterValidator(lambda text: (text or "").strip() or None)
]
"""How a row's answer is to be corrected, if the row says that; a blank one is none."""


class Triple(BaseModel):
    """One training row. Where `correction` equals `answer`, the row teaches to leave a good answer alone.

    Attributes:
        question, answer: Texts, none of them empty.
        correction: The better answer; empty where nobody has written one yet. Such a row teaches only that the answer is bad.
        category: What the row is about, for reports by category.
        instruction: How the answer is to be corrected, if the row says that.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    question: str = Field(min_length=1)
    answer: str = Field(min_length=1)
    correction: str
    category: str = ""
    instruction: Instruction = None

    @property
    def keeps(self) -> bool:
        """Whether the answer is right as it is."""
        return self.answer == self.correction

    def identity(self) -> Triple:
        """Give the row of the warm-up stage: the answer, whatever it says, as its own correction."""
        return self.model_copy(update={"correction": self.answer})

    def corrected(self) -> Triple:
        """Give the row that comes of answering with the correction: nothing is left to change."""
        return self.model_copy(update={"answer": self.correction})


class LeftOut(NamedTuple):
    """A row that is good JSON but teaches nothing: its line in the file, from 1, and the reason."""

    line: int
    reason: str


@dataclass(frozen=True)
class Rows:
    """What a file held.

    Attributes:
        triples: The rows to train on, in the file's order.
        left_out: The others.
    """

    triples: list[Triple]
    left_out: list[LeftOut]


class _Unusable(Exception):
    """A row gives no triple; the text says why."""


def read_rows(path: Path) -> Rows:
    """Read triples from JSON lines, plain or gzipped, whose rows have any of these forms.

    - `question`, `answer`, `correction`: ours, and the published Aligner data. `category` is optional, and so is
      `instruction`, which says how this answer is to be corrected.
    - `question`, `answer`, `kind`: answers that are labelled. `keep` and `refusal` are kept; `bad` is corrected to `better`,
      or teaches its verdict alone where there is none. `instruction` is optional.
    - `prompt`, `chosen`, `rejected`: TRL's preference rows, as texts or as lists of messages. The rejected text is the
      answer, the chosen one its correction.
    - `chosen`, `rejected` alone: whole dialogues, as lists of messages or as Anthropic's "Human: … Assistant: …" texts.
      The question is the person's last turn.
    - `prompt`, `response_0`, `response_1` with `is_response_0_safe`, `is_response_1_safe` and `better_response_id`:
      PKU-SafeRLHF. An unsafe response is corrected to the safe one; of two safe ones the better is kept.
    - `prompt`, `response`, `is_safe`: BeaverTails. A safe response is kept; an unsafe one has no correction, and is left out.

    Raises:
        DataError: If a line is not JSON, has none of these forms or holds a lone surrogate; the message names file and line.
        JobError: If the file cannot be read, or gives no triple.
    """
    triples: list[Triple] = []
    left_out: list[LeftOut] = []
    for number, line in read_lines(path):
        try:
            triples.append(_parse(path, number, line))
        except _Unusable as exc:
            left_out.append(LeftOut(number, str(exc)))
    if not triples:
        reason = f"all its rows were left out, the first because {left_out[0].reason}" if left_out else "it is empty"
        raise JobError(path, f"holds no triples to train on: {reason}")
    return Rows(triples, left_out)


def with_identity(triples: Sequence[Triple], share: float, seed: int = 0) -> list[Triple]:
    """Add rows whose answer is another row's correction, and which are to be kept.

    Args:
        triples: Rows of the correction stage.
        share: Wanted share of added rows in the result, 0 to 1. There are at most as many as rows that correct.
        seed: Of the choice.
    """
    candidates = [row.corrected() for row in triples if row.correction and not row.keeps]
    wanted = len(candidates) if share == 1 else min(len(candidates), round(len(triples) * share / (1 - share)))
    return [*triples, *random.Random(seed).sample(candidates, wanted)]


def _parse(path: Path, number: int, line: str) -> Triple:
    try:
        row = parse_json(line)
    except ValueError as exc:
        raise DataError(str(path), number, f"is not JSON: {exc}") from exc
    if not isinstance(row, dict):
        raise DataError(str(path), number, "is not a JSON object")
    form = next((form for form in _FORMATS if form[0] <= row.keys()), None)
    if form is None:
        raise DataError(
            str(path),
            number,
            f"has the keys {', '.join(sorted(row)) or 'none'}: expected question, answer and correction, "
            "or prompt, chosen and rejected, or another form that `aligner train --help` names",
        )
    keys, convert = form
    try:
        fields = convert(row)
        blank = [name for name, value in fields.items() if isinstance(value, str) and not value.strip()]
        if blank and not (blank == ["correction"] and convert is _labelled):
            raise _Unusable("a text is empty")
        triple = Triple.model_validate(fields | {"category": row.get("category") or ""})
        "".join((triple.question, triple.answer, triple.correction, triple.instruction or "")).encode()
    except ValidationError as exc:
        error = exc.errors()[0]
        raise DataError(str(path), number, f"{'.'.join(map(str, error['loc']))}: {error['msg']}") from exc
    except UnicodeEncodeError as exc:
        raise DataError(str(path), number, "holds a lone surrogate, which is not valid text") from exc
    except ValueError as exc:
        raise DataError(str(path), number, str(exc)) from exc
    except (KeyError, TypeError, IndexError, AttributeError) as exc:
        raise DataError(str(path), number, f"has {', '.join(sorted(keys))}, but not as expected: {exc!r}") from exc
    return triple


def _triple(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("question", "answer", "correction")} | _instruction(row)


def _labelled(row: dict[str, Any]) -> dict[str, Any]:
    if row["kind"] not in ("keep", "refusal", "bad"):
        raise _Unusable(f"its kind is {row['kind']!r}, none of keep, refusal and bad")
    correction = (row.get("better") or "") if row["kind"] == "bad" else row["answer"]
    return {"question": row["question"], "answer": row["answer"], "correction": correction} | _instruction(row)


def _instruction(row: dict[str, Any]) -> dict[str, Any]:
    """Take the instruction of a row of ours; elsewhere the word may name a question."""
    return {"instruction": row["instruction"]} if row.get("instruction") else {}


def _safe_rlhf(row: dict[str, Any]) -> dict[str, Any]:
    responses = [row["response_0"], row["response_1"]]
    safe = [_flag(row, "is_response_0_safe"), _flag(row, "is_response_1_safe")]
    if not any(safe):
        raise _Unusable("neither response is safe")
    if all(safe):
        kept = responses[_flag(row, "better_response_id")]
        return {"question": row["prompt"], "answer": kept, "correction": kept}
    good = safe.index(True)
    return {"question": row["prompt"], "answer": responses[1 - good], "correction": responses[good]}


def _beaver_tails(row: dict[str, Any]) -> dict[str, Any]:
    if not _flag(row, "is_safe"):
        raise _Unusable("the response is unsafe and has no correction")
    return {"question": row["prompt"], "answer": row["response"], "correction": row["response"]}


def _flag(row: dict[str, Any], key: str) -> bool:
    value = row[key]
    if value is None:
        raise _Unusable(f"{key} is null")
    if value not in (False, True):  # 0 and 1 are equal to these
        raise ValueError(f"{key} is {value!r}, expected true or false, or 0 or 1")
    return bool(value)


def _preference(row: dict[str, Any]) -> dict[str, Any]:
    question = _last_turn(row, "prompt", "user")
    answer, correction = (_last_turn(row, name, "assistant") for name in ("rejected", "chosen"))
    return {"question": question, "answer": answer, "correction": correction}


def _dialogues(row: dict[str, Any]) -> dict[str, Any]:
    chosen, rejected = _messages(row, "chosen"), _messages(row, "rejected")
    if chosen[:-1] != rejected[:-1]:
        raise _Unusable("the two dialogues part before their last turn")
    return _preference({"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]})


def _last_turn(row: dict[str, Any], key: str, role: str) -> str:
    messages = row[key]
    if not isinstance(messages, list):
        return text_at(row, key).strip()
    if not messages or messages[-1]["role"] != role:
        raise _Unusable(f"its last turn is not the {role}'s")
    return text_at(messages[-1], "content").strip()


def _messages(row: dict[str, Any], key: str) -> list[dict[str, str]]:
    dialogue = row[key]
    if isinstance(dialogue, list):
        return dialogue
    turns = []
    for turn in ("\n\n" + text_at(row, key).strip()).split("\n\nHuman:")[1:]:
        question, *replies = turn.split("\n\nAssistant:")
        turns.append({"role": "user", "content": question.strip()})
        turns += [{"role": "assistant", "content": reply.strip()} for reply in replies]
    if not turns:
        raise _Unusable("it is no dialogue of Human and Assistant")
    return turns


# The first form whose keys are all there is the row's.
_FORMATS: list[tuple[set[str], Callable[[dict[str, Any]], dict[str, Any]]]] = [
    ({"question", "answer", "correction"}, _triple),
    ({"question", "answer", "kind"}, _labelled),
    ({"prompt", "response_0", "response_1", "is_response_0_safe", "is_response_1_safe"}, _safe_rlhf),
    ({"prompt", "response", "is_safe"}, _beaver_tails),
    ({"prompt", "chosen", "rejected"}, _preference),
    ({"chosen", "rejected"}, _dialogues),
]
