"""The files of a run of rounds.

A folder for each round keeps its answers, pairs, adapter and scores:

rounds.json                 the run's settings
summary.json                its results
round-0/                    the first policy: held_out.jsonl, scores.json
round-1/answers.jsonl       answers of the policy of the round before
preferences.jsonl   corrections and answers; sft.jsonl: answers that needed none
adapter/            the policy that learnt from them
held_out.jsonl      its answers to the held-out prompts
scores.json         its metrics, and the stop rules that it breaks
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aligner_middleware.data.files import read_lines, write_lines, write_text
from aligner_middleware.data.folders import FolderKind, check_owned
from aligner_middleware.errors import ConfigError, JobError
from aligner_middleware.rlhf.round_results import Round

_SETTINGS_FILE = "rounds.json"
_RUN = FolderKind("a run of aligner rounds", _SETTINGS_FILE, ("*", "*/"))  # other files may lie in it: none is deleted


@dataclass(frozen=True)
class RoundFiles:
    """The files of a round.

    Attributes:
        run: The run's folder.
        number: 0 for the first policy.
    """

    run: Path
    number: int

    @property
    def folder(self) -> Path:
        """The round's folder."""
        return self.run / f"round-{self.number}"

    @property
    def answers(self) -> Path:
        """Answers of the policy of the round before to the training prompts."""
        return self.folder / "answers.jsonl"

    @property
    def preferences(self) -> Path:
        """Pairs of corrections and answers."""
        return self.folder / "preferences.jsonl"

    @property
    def sft(self) -> Path:
        """Answers that needed no correction."""
        return self.folder / "sft.jsonl"

    @property
    def held_out(self) -> Path:
        """Answers of the round's policy to the held-out prompts."""
        return self.folder / "held_out.jsonl"

    @property
    def adapter(self) -> Path | None:
        """The folder of the round's policy; `None` for the first policy, which is the base model."""
        return self.folder / "adapter" if self.number > 0 else None

    def write_scores(self, result: Round) -> None:
        """Write the round's results; the round is then finished."""
        write_text(self._scores, json.dumps(result.as_json(), indent=2))

    def read_scores(self) -> Round | None:
        """Read the round's results; `None` where it is not finished.

        Raises:
            JobError: If the file is damaged.
        """
        if not self._scores.is_file():
            return None
        try:
            return Round.from_json(json.loads(self._scores.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError) as exc:
            raise JobError(self._scores, f"is damaged: {exc}; delete it, and repeat the command") from exc

    @property
    def _scores(self) -> Path:
        return self.folder / "scores.json"


def claim_run(folder: Path, settings: dict[str, Any]) -> None:
    """Make a run's folder, or check that the existing one belongs to a run with these settings.

    Raises:
        BuildError: If the folder holds other files than a run's.
        ConfigError: If its run has other settings; the message names them.
        JobError: If its settings cannot be read or written.
    """
    check_owned(folder, _RUN)
    path = folder / _SETTINGS_FILE
    if not path.is_file():
        write_text(path, json.dumps(settings, indent=2))
        return
    try:
        known = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as exc:
        raise JobError(path, f"holds no settings of a run: {exc}; name another folder") from exc
    now = json.loads(json.dumps(settings))
    names = sorted(name for name in {*known, *now} if known.get(name) != now.get(name))
    if names:
        raise ConfigError(
            f"{folder} holds a run with other settings ({', '.join(names)}): repeat that one, or name another folder"
        )


def write_answers(path: Path, questions: Sequence[str], answers: Sequence[str]) -> None:
    """Write answers as JSON lines of `question` and `answer`."""
    rows = zip(questions, answers, strict=True)
    write_lines(path, ({"question": question, "answer": answer} for question, answer in rows))


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read rows that this package wrote."""
    return [json.loads(line) for _, line in read_lines(path)]
