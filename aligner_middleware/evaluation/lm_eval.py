"""Does an aligner harm ability? Any task of lm-evaluation-harness, on a model with and without an aligner behind it.

An `AlignedLM` is one of lm-eval's own models around another, so every task, metric and command of lm-eval takes it. Needs
the `[harness]` extra.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from langchain_core.runnables import Runnable
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, CachingLM
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager
from pydantic import BaseModel, ConfigDict

from aligner_middleware.aligner import Aligner
from aligner_middleware.artifact import HOME_ADVICE
from aligner_middleware.data.disk import disk_errors
from aligner_middleware.data.upstream import Answered, ask_with_retries, brief
from aligner_middleware.errors import AlignerError, InputError, UpstreamError


class AlignedLM(LM):
    """A model of lm-eval with an aligner behind it: the combined model π' of the paper's section 2.

    Generated answers are corrected. Choices, which are scored by likelihood, get that of the combined model,
    π'(c | x) = Σ over c' of μ(c | c', x) π(c' | x), the sum over the choices of the same question: how likely the aligner
    turns the model's choice c' into c. Where a task scores one text alone this is log π(c | x) + log μ(c | c, x), a lower
    bound.

    The question that the aligner is told is the last user message where lm-eval applies a chat template, and the whole
    prompt, examples included, where it does not.

    Args:
        lm: The model.
        aligner: What corrects its answers.

    Attributes:
        changed: Generated answers that were changed.
        passed: Questions and answers that did not fit into the aligner's context, or were blank, and were left as they are.
    """

    def __init__(self, lm: LM | CachingLM, aligner: Aligner) -> None:
        super().__init__()
        self.changed = 0
        self.passed = 0
        self._lm: Any = lm
        self._aligner = aligner
        self._asked: dict[str, str] = {}

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Generate answers and correct them; a correction ends at the task's stop texts too."""
        answers = self._lm.generate_until(requests)
        pairs = [(self._question(request.args[0]), answer) for request, answer in zip(requests, answers, strict=True)]
        found = []
        for request, (_, answer), made in zip(
            requests, pairs, self._aligner.correct_batch(pairs, return_exceptions=True), strict=True
        ):
            if isinstance(made, InputError):
                self.passed += 1
                found.append(answer)
            elif isinstance(made, Exception):
                raise made
            else:
                self.changed += made.changed
                found.append(_until(made.corrected, request.args[1].get("until")) if made.changed else answer)
        return found

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Score choices by the combined model."""
        alone = self._lm.loglikelihood(requests)
        groups: dict[tuple[Any, ...], list[int]] = {}
        for at, request in enumerate(requests):
            groups.setdefault((request.task_name, request.doc_id, request.args[0]), []).append(at)
        found = list(alone)
        for (_, _, context), rows in groups.items():
            choices = [requests[row].args[1].strip() for row in rows]
            try:
                together = self._combine(self._question(context), choices, [alone[row] for row in rows])
            except InputError:
                self.passed += 1
                continue
            for row, scores in zip(rows, together, strict=True):
                found[row] = scores
        return found

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Refuse: a text that answers nothing has no correction.

        Raises:
            InputError: Always.
        """
        raise InputError(
            f"task {requests[0].task_name} measures the likelihood of texts that answer no question: an aligner has no part "
            "in it; take tasks with questions (multiple_choice, generate_until)"
        )

    def _combine(
        self, question: str, choices: Sequence[str], alone: Sequence[tuple[float, bool]]
    ) -> list[tuple[float, bool]]:
        corrected = [self._aligner.log_likelihood(question, choice, choices) for choice in choices]
        found = []
        for at in range(len(choices)):
            terms = [model[0] + row[at][0] for model, row in zip(alone, corrected, strict=True)]
            greedy = any(model[1] and row[at][1] for model, row in zip(alone, corrected, strict=True))
            found.append((_log_sum(terms), greedy))
        return found

    def _question(self, context: str) -> str:
        return self._asked.get(context, context)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Let the model write the messages as its prompt, and remember what was asked last."""
        prompt = str(self._lm.apply_chat_template(chat_history, add_generation_prompt=add_generation_prompt))
        asked = [message["content"] for message in chat_history if message["role"] == "user"]
        if asked:
            self._asked[prompt] = asked[-1]
        return prompt

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Give the model's own template."""
        template: str | None = self._lm.chat_template(chat_template)
        return template

    @property
    def tokenizer_name(self) -> str:
        """Name of the model's tokenizer."""
        return str(self._lm.tokenizer_name)


class LangChainLM(LM):
    """A LangChain chat model as a model of lm-eval: for tasks that generate.

    Args:
        model: The chat model.
        name: What to call it.
        concurrency: Calls under way at once.
    """

    def __init__(self, model: Runnable[Any, Any], name: str, concurrency: int = 8) -> None:
        super().__init__()
        self._model = model
        self._name = name
        self._concurrency = concurrency

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Ask the chat model, each request by itself; answers end at the task's stop texts.

        Raises:
            UpstreamError: If it fails, again and again.
        """
        found, failed = [], []
        for at in range(0, len(requests), self._concurrency * 4):
            part = requests[at : at + self._concurrency * 4]
            said = ask_with_retries(self._model, [_messages(request.args[0]) for request in part], self._concurrency)
            for request, one in zip(part, said, strict=True):
                if isinstance(one, Answered):
                    found.append(_until(one.text, request.args[1].get("until")))
                    self.cache_hook.add_partial("generate_until", request.args, found[-1])
                else:
                    failed.append(one)
        if failed:
            raise UpstreamError(len(failed), brief(failed[0]))
        return found

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Refuse: chat models tell no likelihoods.

        Raises:
            InputError: Always.
        """
        raise InputError(
            f"task {requests[0].task_name} scores choices by their likelihood, which a chat model does not tell: "
            "take a task that generates, or a model of lm-eval that tells likelihoods (--lm hf)"
        )

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Refuse, for the same reason."""
        raise InputError(f"task {requests[0].task_name} wants likelihoods, which a chat model does not tell")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Write messages as JSON, to be read again when the chat model is asked."""
        return json.dumps(chat_history, ensure_ascii=False)

    @property
    def tokenizer_name(self) -> str:
        """Name of the chat model."""
        return self._name.replace("/", "__")


def load_lm(name: str, arguments: str, batch_size: int = 8) -> LM:
    """Load one of lm-eval's own models.

    Args:
        name: Its type, such as `hf`.
        arguments: As lm-eval takes them: `pretrained=FOLDER,dtype=bfloat16`.
        batch_size: How many prompts go through at once.

    Raises:
        InputError: If there is none of this type, or it cannot be loaded.
    """
    import lm_eval.models  # noqa: F401  # registers them
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind: Any = get_model(name)
        found: LM = kind.create_from_arg_string(arguments, {"batch_size": batch_size, "device": device})
    except Exception as exc:  # its models are many, and each fails in its own way
        raise InputError(f"lm-eval cannot load {name!r} with {arguments!r}: {brief(exc)}") from exc
    return found


class Ability(BaseModel):
    """A metric of a task, without and with the aligner.

    Attributes:
        samples: Rows of the task.
        stderr: Standard error of `without`, as lm-eval tells it; `None` where it does not.
    """

    model_config = ConfigDict(frozen=True)

    task: str
    metric: str
    samples: int
    without: float
    aligned: float
    stderr: float | None


class Abilities(BaseModel):
    """What came of some tasks.

    Attributes:
        rows: Every metric of every task.
        changed: Generated answers that the aligner changed.
        passed: Questions and answers that it could not take, and that were left as they are.
    """

    model_config = ConfigDict(frozen=True)

    rows: list[Ability]
    changed: int
    passed: int


def measure_ability(
    lm: LM,
    aligner: Aligner,
    tasks: Sequence[str],
    cache: Path,
    *,
    include: Path | None = None,
    limit: int | None = None,
    fewshot: int | None = None,
    chat: bool = True,
    seed: int = 0,
) -> Abilities:
    """Run tasks of lm-eval on a model with and without an aligner; the model is asked once for both.

    Args:
        lm: The model.
        aligner: The aligner.
        tasks: Names of tasks or groups, of lm-eval's own or in `include`.
        cache: SQLite file, of this model's own, of what it said; a run that was killed goes on from it.
        include: Folder of further tasks, as lm-eval's YAML.
        limit: First rows of each task only.
        fewshot: Examples before each question; `None` for the task's own number.
        chat: Whether prompts are written as chat messages, examples as turns.
        seed: Of the choice of examples.

    Raises:
        InputError: If there is no such task, the model tells no likelihoods and the task wants them, or lm-eval fails.
        UpstreamError: If a chat model fails.
    """
    manager = TaskManager(include_path=str(include) if include else None)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        near = get_close_matches(unknown[0], manager.all_tasks, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise InputError(
            f"lm-eval has no task {', '.join(unknown)}{hint}: see `lm-eval ls tasks`, or name their folder"
        )
    options: dict[str, Any] = {
        "tasks": list(tasks),
        "limit": limit,
        "num_fewshot": fewshot,
        "apply_chat_template": chat,
        "fewshot_as_multiturn": chat,
        "task_manager": manager,
        "bootstrap_iters": 1000,
        "log_samples": False,
        "random_seed": seed,
        "numpy_random_seed": seed,
        "torch_random_seed": seed,
        "fewshot_random_seed": seed,
    }
    with disk_errors(cache.parent, HOME_ADVICE):
        cache.parent.mkdir(parents=True, exist_ok=True)
    without = _evaluate(lm, use_cache=str(cache), **options)
    aligned = AlignedLM(CachingLM(lm, f"{cache}_rank0.db"), aligner)  # the name that lm-eval has given it
    with_aligner = _evaluate(aligned, **options)
    rows = []
    for task, metrics in without["results"].items():
        samples = int(without.get("n-samples", {}).get(task, {}).get("effective", 0))
        for name, value in metrics.items():
            metric, _, key = name.partition(",")
            if isinstance(value, float | int) and key and not metric.endswith("_stderr"):
                stderr = metrics.get(f"{metric}_stderr,{key}")
                rows.append(
                    Ability(
                        task=task,
                        metric=metric if key == "none" else f"{metric}, {key}",
                        samples=samples,
                        without=value,
                        aligned=with_aligner["results"][task][name],
                        stderr=stderr if isinstance(stderr, float) else None,
                    )
                )
    return Abilities(rows=rows, changed=aligned.changed, passed=aligned.passed)


def _evaluate(lm: LM, **options: Any) -> Any:
    try:
        return simple_evaluate(model=lm, **options)
    except AlignerError:
        raise
    except Exception as exc:  # a task's files, a provider without a key
        raise InputError(f"lm-eval failed: {brief(exc)}") from exc


def _messages(prompt: str) -> str | list[tuple[str, str]]:
    """Read back what `LangChainLM.apply_chat_template` wrote; a prompt without a template is a text."""
    try:
        history = json.loads(prompt)
        return [(message["role"], message["content"]) for message in history]
    except (ValueError, TypeError, KeyError):
        return prompt


def _until(text: str, stops: str | Sequence[str] | None) -> str:
    """Cut a text off at the first of a task's stop texts."""
    for stop in [stops] if isinstance(stops, str) else stops or []:
        text = text.partition(stop)[0] if stop else text
    return text


def _log_sum(terms: Sequence[float]) -> float:
    """Add probabilities that are given by their logarithms."""
    peak = max(terms)
    return peak + math.log(sum(math.exp(term - peak) for term in terms)) if math.isfinite(peak) else peak
