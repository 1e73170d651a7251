"""Multi-round RLHF (paper, section 4): a policy answers, the aligner corrects, and the pairs train the next policy.

Ordinary rounds learn from preferences over answers that the policy no longer gives, and drift. Here each round's pairs are
made of what the policy says now. A folder for each round keeps its answers, pairs, adapter and scores:

    rounds.json                 what the run depends on
    round-0/                    the first policy: held_out.jsonl, scores.json
    round-1/answers.jsonl       what the policy of the round before answered
            preferences.jsonl   corrections over answers; sft.jsonl: answers that needed none
            adapter/            the policy that learnt from them
            held_out.jsonl      its answers to the held-out prompts
            scores.json         how it does, and which stop rules it breaks
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from aligner_middleware.aligner import Aligner
from aligner_middleware.data.files import FolderKind, alone, check_ours, lines_of, write_lines, write_text
from aligner_middleware.data.json_lines import finite
from aligner_middleware.data.prompts import Prompt, digest
from aligner_middleware.errors import DataError
from aligner_middleware.evaluation.pairwise import PairJudge
from aligner_middleware.evaluation.policy_metrics import Health, examine
from aligner_middleware.evaluation.stop_rules import StopRules
from aligner_middleware.rlhf.preferences import make_preferences
from aligner_middleware.training.config import PolicyConfig
from aligner_middleware.training.policy import Policy, remove_run, speaks_chat, train_policy

_RUN = FolderKind("a run of aligner rounds", "rounds.json", ("*", "*/"))  # it may hold more: nothing is deleted

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Round:
    """What came of a round.

    Attributes:
        number: 0 for the first policy.
        pairs: Preference pairs that it learnt from.
        kept: Answers that the aligner left as they were. Blank and repeated answers, and those too long for the aligner,
            are neither.
        health: Scores of the policy that it made; `None` where there was too little to learn from.
        broken: Stop rules that it breaks.
    """

    number: int
    pairs: int
    kept: int
    health: Health | None
    broken: list[str]


@dataclass(frozen=True)
class Rounds:
    """A run.

    Attributes:
        rounds: Round by round, from the first policy on.
        fixed: Whether all rounds learnt from the pairs of the first one.
    """

    rounds: list[Round]
    fixed: bool

    @property
    def stopped(self) -> list[str]:
        """The rules by which it stopped; none if it went to its end."""
        return self.rounds[-1].broken

    @property
    def best(self) -> int:
        """The last round that breaks no rule: whose policy to use."""
        return max(one.number for one in self.rounds if not one.broken)


def run_rounds(
    prompts: Sequence[Prompt],
    held_out: Sequence[Prompt],
    folder: Path,
    aligner: Aligner,
    judge: PairJudge,
    config: PolicyConfig | None = None,
    *,
    rounds: int = 3,
    rules: StopRules | None = None,
    fixed: bool = False,
    report: Report = lambda step, done, of: None,
) -> Rounds:
    """Run rounds, or go on with those in a folder.

    Called again with the same prompts and settings it goes on where it stopped; more rounds or other stop rules may be
    asked for.

    Args:
        prompts: What the policies answer to learn; answers that they hold are not used.
        held_out: Prompts that are only scored.
        folder: Where everything is kept.
        aligner: What corrects.
        judge: Compares each policy's held-out answers with the first policy's.
        config: The policy, and how it is trained.
        rounds: How many rounds.
        rules: When to stop.
        fixed: Have every round learn from the pairs of the first: the control, which ordinary rounds amount to.
        report: Called with a step's name, and how much of it is done, and of how much.

    Raises:
        DataError: If the folder is another run's, if a set of prompts is empty or a prompt in both, or if a file cannot be
            read or written.
        BuildError: If the base model cannot be had, or the folder holds something else than a run.
        UpstreamError: If the judge fails; what is done stays.
    """
    config, rules = config or PolicyConfig(), rules or StopRules()
    questions, unseen = _questions(prompts), _questions(held_out)
    if not (questions and unseen):
        raise DataError("prompts", 1, "rounds need prompts to learn from and others to score: too few are given")
    if both := set(questions) & set(unseen):
        raise DataError("held-out prompts", 1, f"{len(both)} of them are trained on, such as {min(both)[:60]!r}")
    settings = {
        "policy": config.model_dump(mode="json"),
        "aligner": aligner.identity,
        "judge": judge.name,
        "prompts": digest([Prompt(question=question) for question in questions]),
        "held_out": digest([Prompt(question=question) for question in unseen]),
        "fixed": fixed,
    }
    with alone(folder):
        _claim(folder, settings)
        result = _run(questions, unseen, folder, aligner, judge, config, rounds, rules, fixed, report)
        write_text(folder / "summary.json", json.dumps(finite(summary(result)), indent=2))
    return result


def _run(
    questions: Sequence[str],
    unseen: Sequence[str],
    folder: Path,
    aligner: Aligner,
    judge: PairJudge,
    config: PolicyConfig,
    rounds: int,
    rules: StopRules,
    fixed: bool,
    report: Report,
) -> Rounds:
    found: list[Round] = []
    for number in range(rounds + 1):
        one = folder / f"round-{number}"
        pairs = kept = 0
        if number > 0:
            pairs, kept = _pairs(folder, number, questions, aligner, config, fixed, report)
            if pairs < rules.min_pairs:
                few = f"the aligner changed {pairs} answers, under {rules.min_pairs}: there is nothing left to learn"
                found.append(Round(number, pairs, kept, None, [few]))
                break
            _learn(folder, number, config, fixed, report)
        health = _scores(folder, number, unseen, judge, config, report)
        history = [past.health for past in found if past.health] + [health]
        broken = rules.broken(history) if number > 0 else []
        found.append(Round(number, pairs, kept, health, broken))
        write_text(one / "scores.json", json.dumps(finite(_as_dict(found[-1])), indent=2))
        if broken:
            break
    return Rounds(found, fixed)


def summary(run: Rounds) -> dict[str, Any]:
    """Sum a run up, for JSON."""
    rounds = [_as_dict(one) for one in run.rounds]
    return {"fixed": run.fixed, "best": run.best, "stopped": run.stopped, "rounds": rounds}


def read_rounds(folder: Path) -> Rounds:
    """Read a run's summary back, to be shown beside another.

    Raises:
        DataError: If there is none, or it is broken.
    """
    path = folder / "summary.json"
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        return Rounds([_round(one) for one in told["rounds"]], told["fixed"])
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise DataError(str(path), 1, f"is no summary of rounds: {exc}") from exc


def _pairs(
    folder: Path,
    number: int,
    questions: Sequence[str],
    aligner: Aligner,
    config: PolicyConfig,
    fixed: bool,
    report: Report,
) -> tuple[int, int]:
    """Have the policy of the round before answer, and the aligner correct; say how many answers it changed and kept."""
    if fixed and number > 1:
        return _pairs(folder, 1, questions, aligner, config, False, report)
    one = folder / f"round-{number}"
    answers, pairs, kept = one / "answers.jsonl", one / "preferences.jsonl", one / "sft.jsonl"
    if not answers.is_file():
        policy = Policy(config, _adapter(folder, number - 1))
        said = policy.answer(
            questions,
            sampled=True,
            seed=config.seed + number,
            done=lambda count: report(f"round {number}: answers", count, len(questions)),
        )
        _write_answers(answers, questions, said)
    if not (pairs.is_file() and kept.is_file()):
        rows = [(row["question"], row["answer"]) for row in _rows(answers)]
        make_preferences(
            [Prompt(question=question, answer=answer) for question, answer in rows if answer],
            pairs,
            aligner,
            form="messages" if speaks_chat(config) else "text",
            sft=kept,
            upstream_name=f"{config.base}, round {number - 1}",
            report=lambda done, of: report(f"round {number}: corrections", done, of),
        )
    return len(_rows(pairs)), len(_rows(kept))


def _learn(folder: Path, number: int, config: PolicyConfig, fixed: bool, report: Report) -> None:
    """Train the next policy."""
    adapter = folder / f"round-{number}" / "adapter"
    if adapter.is_dir():
        remove_run(adapter)
        return
    source = folder / f"round-{1 if fixed else number}"
    rows = _rows(source / "preferences.jsonl")
    if config.method == "sft":
        corrections = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
        rows = corrections + _rows(source / "sft.jsonl")
    train_policy(
        rows,
        adapter,
        config,
        start=_adapter(folder, number - 1),
        report=lambda at: report(f"round {number}: {config.method}, loss {at.loss:.3f}", at.step, at.steps),
    )


def _scores(
    folder: Path, number: int, questions: Sequence[str], judge: PairJudge, config: PolicyConfig, report: Report
) -> Health:
    """Have a policy answer the held-out prompts, and judge it."""
    one = folder / f"round-{number}"
    if (one / "scores.json").is_file():
        told = json.loads((one / "scores.json").read_text(encoding="utf-8"))
        return Health(**told["health"])
    path = one / "held_out.jsonl"
    policy = Policy(config, _adapter(folder, number))
    if not path.is_file():
        said = policy.answer(
            questions,
            sampled=False,
            done=lambda count: report(f"round {number}: held-out answers", count, len(questions)),
        )
        _write_answers(path, questions, said)
    answers = [row["answer"] for row in _rows(path)]
    first = [row["answer"] for row in _rows(folder / "round-0" / "held_out.jsonl")]
    return examine(questions, answers, first, judge, policy.divergence(questions, answers))


def _adapter(folder: Path, number: int) -> Path | None:
    return folder / f"round-{number}" / "adapter" if number > 0 else None


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Make a run's folder, or see that the one that is there is this run's."""
    check_ours(folder, _RUN)
    path = folder / "rounds.json"
    if not path.is_file():
        write_text(path, json.dumps(settings, indent=2))
        return
    try:
        known = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as exc:
        raise DataError(str(path), 1, f"is not what rounds wrote: {exc}; name another folder") from exc
    now = json.loads(json.dumps(settings))
    names = sorted(name for name in {*known, *now} if known.get(name) != now.get(name))
    if names:
        raise DataError(
            str(path), 1, f"is a run with other settings ({', '.join(names)}): repeat that one, or name another folder"
        )


def _questions(prompts: Sequence[Prompt]) -> list[str]:
    return list(dict.fromkeys(prompt.question for prompt in prompts))


def _write_answers(path: Path, questions: Sequence[str], answers: Sequence[str]) -> None:
    write_lines(path, ({"question": q, "answer": a} for q, a in zip(questions, answers, strict=True)))


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for _, line in lines_of(path)]


def _as_dict(one: Round) -> dict[str, Any]:
    return asdict(one) | {"health": one.health.model_dump() if one.health else None}


def _round(told: dict[str, Any]) -> Round:
    return Round(**told | {"health": Health(**told["health"]) if told["health"] else None})
