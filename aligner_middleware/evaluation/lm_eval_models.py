"""Models of lm-evaluation-harness: one with an aligner behind it, and a LangChain chat model. Needs the `[harness]` extra.

An `AlignedLM` is a model of lm-eval around another one, so every task, metric and command of lm-eval takes it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from langchain_core.runnables import Runnable
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, CachingLM
from lm_eval.api.registry import get_model

from aligner_middleware.aligner import Aligner
from aligner_middleware.data.upstream import Answered, ask_with_retries, brief
from aligner_middleware.errors import InputError, UpstreamError


class AlignedLM(LM):
    """A model of lm-eval with an aligner behind it: the combined model π' of the paper's section 2.

    Generated answers are corrected. Choices, which are scored by likelihood, get that of the combined model,
    π'(c | x) = Σ over c' of μ(c | c', x) π(c' | x), the sum over the choices c' of the same question, where μ is the
    aligner's probability of correcting c' to c. Where a task scores one text alone this is log π(c | x) + log μ(c | c, x),
    a lower bound.

    The aligner gets as the question the last user message where lm-eval applies a chat template, and the whole prompt,
    examples included, where it does not.

    Args:
        lm: The model.
        aligner: Corrects its answers.

    Attributes:
        changed: Number of generated answers that were changed.
        passed: Number of inputs left uncorrected, because they are blank or do not fit into the aligner's context.
    """

    def __init__(self, lm: LM | CachingLM, aligner: Aligner) -> None:
        super().__init__()
        self.changed = 0
        self.passed = 0
        self._lm: Any = lm
        self._aligner = aligner
        self._questions: dict[str, str] = {}

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Generate answers and correct them; a correction ends at the task's stop texts too."""
        answers = self._lm.generate_until(requests)
        pairs = [(self._question(request.args[0]), answer) for request, answer in zip(requests, answers, strict=True)]
        outcomes = self._aligner.correct_batch(pairs, return_exceptions=True)
        results = []
        for request, answer, outcome in zip(requests, answers, outcomes, strict=True):
            if isinstance(outcome, InputError):
                self.passed += 1
                results.append(answer)
            elif isinstance(outcome, Exception):
                raise outcome
            else:
                self.changed += outcome.changed
                stops = request.args[1].get("until")
                results.append(_until(outcome.corrected, stops) if outcome.changed else answer)
        return results

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Score choices by the combined model."""
        uncorrected = self._lm.loglikelihood(requests)
        groups: dict[tuple[Any, ...], list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault((request.task_name, request.doc_id, request.args[0]), []).append(index)
        results = list(uncorrected)
        for (_, _, context), rows in groups.items():
            choices = [requests[row].args[1].strip() for row in rows]
            try:
                combined = self._combine(self._question(context), choices, [uncorrected[row] for row in rows])
            except InputError:
                self.passed += 1
                continue
            for row, scores in zip(rows, combined, strict=True):
                results[row] = scores
        return results

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Refuse: a text that is no answer has no correction.

        Raises:
            InputError: Always.
        """
        raise InputError(
            f"task {requests[0].task_name} measures the likelihood of texts that answer no question, which no aligner "
            "changes: choose tasks with questions (multiple_choice, generate_until)"
        )

    def _combine(
        self, question: str, choices: Sequence[str], uncorrected: Sequence[tuple[float, bool]]
    ) -> list[tuple[float, bool]]:
        corrected = [self._aligner.log_likelihood(question, choice, choices) for choice in choices]
        results = []
        for index in range(len(choices)):
            terms = [model[0] + row[index][0] for model, row in zip(uncorrected, corrected, strict=True)]
            greedy = any(model[1] and row[index][1] for model, row in zip(uncorrected, corrected, strict=True))
            results.append((_log_sum(terms), greedy))
        return results

    def _question(self, context: str) -> str:
        return self._questions.get(context, context)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Let the model write the messages as its prompt, and remember the last user message of that prompt."""
        prompt = str(self._lm.apply_chat_template(chat_history, add_generation_prompt=add_generation_prompt))
        questions = [message["content"] for message in chat_history if message["role"] == "user"]
        if questions:
            self._questions[prompt] = questions[-1]
        return prompt

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Give the model's template."""
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
        name: Its name in the results.
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
            UpstreamError: If it fails after all retries.
        """
        results, failed = [], []
        for start in range(0, len(requests), self._concurrency * 4):
            part = requests[start : start + self._concurrency * 4]
            answers = ask_with_retries(self._model, [_messages(request.args[0]) for request in part], self._concurrency)
            for request, answer in zip(part, answers, strict=True):
                if isinstance(answer, Answered):
                    results.append(_until(answer.text, request.args[1].get("until")))
                    self.cache_hook.add_partial("generate_until", request.args, results[-1])
                else:
                    failed.append(answer)
        if failed:
            raise UpstreamError(len(failed), brief(failed[0]))
        return results

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Refuse: chat models give no likelihoods.

        Raises:
            InputError: Always.
        """
        raise InputError(
            f"task {requests[0].task_name} scores choices by their likelihood, which a chat model does not give: "
            "choose a task that generates, or a model of lm-eval that gives likelihoods (--lm hf)"
        )

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Refuse, for the same reason."""
        raise InputError(f"task {requests[0].task_name} needs likelihoods, which a chat model does not give")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Write messages as JSON; `generate_until` reads them again."""
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
        batch_size: Prompts in a pass.

    Raises:
        InputError: If there is none of this type, or it cannot be loaded.
    """
    import lm_eval.models  # noqa: F401  # registers them
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind: Any = get_model(name)
        model: LM = kind.create_from_arg_string(arguments, {"batch_size": batch_size, "device": device})
    except Exception as exc:  # its models are many, and each fails in its own way
        raise InputError(f"lm-eval cannot load {name!r} with {arguments!r}: {brief(exc)}") from exc
    return model


def _messages(prompt: str) -> str | list[tuple[str, str]]:
    """Read the messages that `LangChainLM.apply_chat_template` wrote; a prompt without a template is a text."""
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
