"""Multi-round RLHF (paper, section 4): a policy answers, the aligner corrects, and the pairs train the next policy.

Ordinary rounds learn from preferences over answers that the policy no longer gives, and drift. Here each round's pairs are
made of the policy's present answers. `round_files` describes the folder of a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from aligner_middleware.aligner import Aligner
from aligner_middleware.data.locks import exclusive_lock
from aligner_middleware.data.progress import Report, ignore
from aligner_middleware.data.prompts import Prompt, digest
from aligner_middleware.errors import ConfigError
from aligner_middleware.evaluation.pairwise import PairwiseJudge
from aligner_middleware.evaluation.policy_metrics import PolicyMetrics, evaluate_policy
from aligner_middleware.evaluation.stop_rules import StopRules
from aligner_middleware.rlhf.preferences import make_preferences
from aligner_middleware.rlhf.round_files import RoundFiles, claim_run, read_json_lines, write_answers
from aligner_middleware.rlhf.round_results import Round, Rounds, write_rounds
from aligner_middleware.training.config import PolicyConfig
from aligner_middleware.training.policy import Policy, has_chat_template
from aligner_middleware.training.policy_training import remove_checkpoints, train_policy


def run_rounds(
    prompts: Sequence[Prompt],
    held_out: Sequence[Prompt],
    folder: Path,
    aligner: Aligner,
    judge: PairwiseJudge,
    config: PolicyConfig | None = None,
    *,
    rounds: int = 3,
    rules: StopRules | None = None,
    fixed: bool = False,
    report: Report = ignore,
) -> Rounds:
    """Run rounds, or continue those in a folder.

    Called again with the same prompts and settings, an interrupted run resumes; more rounds or other stop rules may be
    asked for.

    Args:
        prompts: Training prompts, which the policies answer; answers that they hold are not used.
        held_out: Prompts that are only scored.
        folder: For all files of the run.
        aligner: Corrects the answers.
        judge: Compares each policy's held-out answers with the first policy's.
        config: The policy, and how it is trained.
        rounds: How many rounds.
        rules: When to stop.
        fixed: Have every round learn from the pairs of the first: the control, which stands for ordinary rounds.
        report: Called as each part of a round advances, with a stage such as `round 1, answers`.

    Raises:
        ConfigError: If there are no training or no held-out prompts, or one prompt is both; if the folder holds a run with
            other settings.
        BuildError: If the base model is missing, or the folder holds other files than a run's.
        JobError: If a file cannot be read or written, or another process works on the run.
        UpstreamError: If the judge fails; finished parts stay.
    """
    questions, unseen = _questions(prompts), _questions(held_out)
    _check_prompts(questions, unseen)
    run = _Run(folder, questions, unseen, aligner, judge, config or PolicyConfig(), rules or StopRules(), fixed, report)
    with exclusive_lock(folder):
        claim_run(folder, run.settings())
        result = run.rounds(rounds)
        write_rounds(result, folder)
    return result


@dataclass(frozen=True)
class _Run:
    """A run of rounds.

    Attributes:
        folder: For all its files.
        questions: Training prompts.
        unseen: Held-out prompts.
        aligner, judge, config, rules, fixed, report: As in `run_rounds`.
    """

    folder: Path
    questions: Sequence[str]
    unseen: Sequence[str]
    aligner: Aligner
    judge: PairwiseJudge
    config: PolicyConfig
    rules: StopRules
    fixed: bool
    report: Report

    def settings(self) -> dict[str, Any]:
        """Give the settings that may not change when the run resumes."""
        return {
            "policy": self.config.model_dump(mode="json"),
            "aligner": self.aligner.identity,
            "judge": self.judge.name,
            "prompts": digest([Prompt(question=question) for question in self.questions]),
            "held_out": digest([Prompt(question=question) for question in self.unseen]),
            "fixed": self.fixed,
        }

    def rounds(self, count: int) -> Rounds:
        """Run so many rounds after the first policy, or fewer if one breaks a rule."""
        results = [self._first_policy()]
        while len(results) <= count and not results[-1].broken:
            results.append(self._round(len(results), results))
        return Rounds(results, self.fixed)

    def _first_policy(self) -> Round:
        result = Round(0, 0, 0, self._measure(0), [])
        self._files(0).write_scores(result)
        return result

    def _round(self, number: int, earlier: Sequence[Round]) -> Round:
        pairs, kept = self._make_pairs(1 if self.fixed else number)
        if pairs < self.rules.min_pairs:
            few = f"the aligner changed {pairs} answers, under {self.rules.min_pairs}: there is nothing left to learn"
            return Round(number, pairs, kept, None, [few])
        self._train(number)
        metrics = self._measure(number)
        history = [result.metrics for result in earlier if result.metrics]
        result = Round(number, pairs, kept, metrics, self.rules.broken([*history, metrics]))
        self._files(number).write_scores(result)
        return result

    def _make_pairs(self, number: int) -> tuple[int, int]:
        """Have the policy of the round before answer, and the aligner correct; count changed and kept answers."""
        files = self._files(number)
        if not files.answers.is_file():
            policy = Policy(self.config, self._files(number - 1).adapter)
            report = self._reporter(number, "answers")
            answers = policy.answer(self.questions, sampled=True, seed=self.config.seed + number, report=report)
            write_answers(files.answers, self.questions, answers)
        if not (files.preferences.is_file() and files.sft.is_file()):
            rows = [row for row in read_json_lines(files.answers) if row["answer"]]
            make_preferences(
                [Prompt(question=row["question"], answer=row["answer"]) for row in rows],
                files.preferences,
                self.aligner,
                form="messages" if has_chat_template(self.config) else "text",
                sft=files.sft,
                upstream_name=f"{self.config.base}, round {number - 1}",
                report=self._reporter(number, "corrections"),
            )
        return len(read_json_lines(files.preferences)), len(read_json_lines(files.sft))

    def _train(self, number: int) -> None:
        """Train the round's policy."""
        adapter = self._files(number).adapter
        assert adapter is not None
        if adapter.is_dir():
            remove_checkpoints(adapter)
            return
        source = self._files(1 if self.fixed else number)
        rows = read_json_lines(source.preferences)
        if self.config.method == "sft":
            corrections = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
            rows = corrections + read_json_lines(source.sft)
        start, report = self._files(number - 1).adapter, self._reporter(number, self.config.method)
        train_policy(rows, adapter, self.config, start=start, report=report)

    def _measure(self, number: int) -> PolicyMetrics:
        """Have a policy answer the held-out prompts, and judge it."""
        files = self._files(number)
        done = files.read_scores()
        if done is not None and done.metrics is not None:
            return done.metrics
        policy = Policy(self.config, files.adapter)
        if not files.held_out.is_file():
            report = self._reporter(number, "held-out answers")
            write_answers(files.held_out, self.unseen, policy.answer(self.unseen, sampled=False, report=report))
        answers = [row["answer"] for row in read_json_lines(files.held_out)]
        first = [row["answer"] for row in read_json_lines(self._files(0).held_out)]
        return evaluate_policy(self.unseen, answers, first, self.judge, policy.divergence(self.unseen, answers))

    def _files(self, number: int) -> RoundFiles:
        return RoundFiles(self.folder, number)

    def _reporter(self, number: int, part: str) -> Report:
        return lambda progress: self.report(replace(progress, stage=f"round {number}, {part}"))


def _questions(prompts: Sequence[Prompt]) -> list[str]:
    return list(dict.fromkeys(prompt.question for prompt in prompts))


def _check_prompts(questions: Sequence[str], unseen: Sequence[str]) -> None:
    if not (questions and unseen):
        raise ConfigError(
            f"rounds need prompts to learn from and other prompts to score: {len(questions)} and {len(unseen)} are given"
        )
    if both := set(questions) & set(unseen):
        raise ConfigError(f"{len(both)} held-out prompts are trained on, such as {min(both)[:60]!r}: leave them out")
