"""A policy: a chat model that answers prompts, and is compared with the model that it was before training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, set_seed

from aligner_middleware.checkpoints.base import base_folder
from aligner_middleware.data.progress import Progress, Report, ignore
from aligner_middleware.errors import BuildError
from aligner_middleware.training.config import PolicyConfig
from aligner_middleware.training.network import use_bfloat16


class Policy:
    """A chat model, or a model that continues texts, with or without a trained adapter.

    Args:
        config: Its base model, and how it answers.
        adapter: Folder of a round's adapter; `None` for the first policy.

    Raises:
        BuildError: If the base model is missing.
    """

    def __init__(self, config: PolicyConfig, adapter: Path | None = None) -> None:
        folder, _ = base_folder(config.base)
        self._config = config
        self._tokenizer = policy_tokenizer(folder)
        dtype = torch.bfloat16 if use_bfloat16(config.bfloat16) else torch.float32
        network: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        if adapter is not None:
            network = PeftModel.from_pretrained(network, str(adapter))
        self._network = network.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    def answer(self, questions: Sequence[str], *, sampled: bool, seed: int = 0, report: Report = ignore) -> list[str]:
        """Answer questions, each by itself.

        Args:
            questions: The questions.
            sampled: Whether to sample, as the config says, or to take the likeliest token each time.
            seed: Of sampling.
            report: Called after each batch, with the stage `answers`.

        Returns:
            The answers, without surrounding spaces. They may be empty.
        """
        answers = [""] * len(questions)
        done = 0
        set_seed(seed)
        for rows in self._batches(questions):
            texts = self._generate([questions[row] for row in rows], sampled)
            for row, text in zip(rows, texts, strict=True):
                answers[row] = text
            done += len(rows)
            report(Progress("answers", done, len(questions)))
        return answers

    def divergence(self, questions: Sequence[str], answers: Sequence[str]) -> float:
        """Measure how far this policy is from the first one.

        Returns:
            The Kullback-Leibler divergence KL(this ‖ first) over the whole vocabulary, mean over the answers' tokens, in
            nats; 0 for the first policy.
        """
        if not isinstance(self._network, PeftModel):
            return 0.0
        total, count = 0.0, 0
        for question, answer in zip(questions, answers, strict=True):
            prompt = self._encode(self._prompt(question))["input_ids"]
            tokens = self._tokenizer.encode(answer, add_special_tokens=False)
            if not tokens:
                continue
            ids = torch.tensor([[*prompt, *tokens]], device=self._network.device)
            now = self._log_probabilities(ids, len(prompt))
            with self._network.disable_adapter():
                first = self._log_probabilities(ids, len(prompt))
            total += float((now.exp() * (now - first)).sum())
            count += len(tokens)
        return total / count if count else 0.0

    def _generate(self, questions: Sequence[str], sampled: bool) -> list[str]:
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if sampled:
            temperature, top_p = self._config.temperature, self._config.top_p
            sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        prompts = [self._prompt(question) for question in questions]
        batch = self._encode(prompts, padding=True, return_tensors="pt").to(self._network.device)
        with torch.inference_mode():
            ids = self._network.generate(
                **batch,
                **sampling,
                max_new_tokens=self._config.answer_tokens,
                pad_token_id=self._tokenizer.pad_token_id,
            )
        texts = self._tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _log_probabilities(self, ids: torch.Tensor, prompt: int) -> torch.Tensor:
        """Give log-probabilities `[T, V]` of the tokens after a prompt of so many tokens, `ids` being `[1, prompt + T]`."""
        with torch.inference_mode():
            logits: torch.Tensor = self._network(ids).logits
            return logits[0, prompt - 1 : -1].float().log_softmax(-1)

    def _prompt(self, question: str) -> str:
        if self._tokenizer.chat_template is None:
            return question
        messages = [{"role": "user", "content": question}]
        return str(self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))

    def _encode(self, text: str | list[str], **options: Any) -> Any:
        plain = self._tokenizer.chat_template is None  # a chat template writes its special tokens itself
        return self._tokenizer(text, add_special_tokens=plain, return_token_type_ids=False, **options)

    def _batches(self, questions: Sequence[str]) -> Iterator[list[int]]:
        """Put questions of like length together."""
        order = sorted(range(len(questions)), key=lambda row: len(questions[row]))
        size = self._config.generation_batch
        return (order[start : start + size] for start in range(0, len(order), size))


def policy_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load a policy's tokenizer; it pads on the left, for generation.

    Raises:
        BuildError: If it names no end token.
    """
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, padding_side="left")  # type: ignore[no-untyped-call]
    if tokenizer.eos_token is None:
        raise BuildError(f"{folder}'s tokenizer names no eos_token: no answer would ever end")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def has_chat_template(config: PolicyConfig) -> bool:
    """Whether the policy has a chat template: whether its rows are made of messages or of texts."""
    return policy_tokenizer(base_folder(config.base)[0]).chat_template is not None
