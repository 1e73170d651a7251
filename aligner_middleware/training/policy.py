"""A policy: a chat model that answers prompts, and is trained by trl on what an aligner made of its answers."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, PrinterCallback, set_seed
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from aligner_middleware.checkpoints.base import base_folder
from aligner_middleware.checkpoints.checkpoint import ADAPTER_CONFIG_FILE, ADAPTER_FILE
from aligner_middleware.data.disk import disk_errors
from aligner_middleware.data.files import write_text
from aligner_middleware.data.folders import FolderKind, check_owned, remove_folder, sweep, write_folder
from aligner_middleware.errors import BuildError
from aligner_middleware.training.config import POLICY_LEARNING_RATES, PolicyConfig
from aligner_middleware.training.trainer import Report, Reporter, bfloat16, last_checkpoint, lora, trainable

_ADAPTER = FolderKind("a policy's adapter", ADAPTER_CONFIG_FILE, (ADAPTER_FILE,))
_RUN = FolderKind("a policy's unfinished training", "run.json", ("*", "*/"))  # trl may write there what it likes


class Policy:
    """A chat model, to answer prompts and to be compared with what it was before any training.

    Args:
        config: Its base model, and how it answers.
        adapter: Folder of the adapter that a round made; `None` for the first policy.

    Raises:
        BuildError: If the base model cannot be had.
    """

    def __init__(self, config: PolicyConfig, adapter: Path | None = None) -> None:
        folder, _ = base_folder(config.base)
        self._config = config
        self._tokenizer = tokenizer_of(folder)
        dtype = torch.bfloat16 if bfloat16(config.bfloat16) else torch.float32
        network: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        if adapter is not None:
            network = PeftModel.from_pretrained(network, str(adapter))
        self._network = network.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    def answer(
        self,
        questions: Sequence[str],
        *,
        sampled: bool,
        seed: int = 0,
        done: Callable[[int], None] = lambda count: None,
    ) -> list[str]:
        """Answer questions.

        Args:
            questions: What to answer, each by itself.
            sampled: Whether to sample, as the config says, or to take the likeliest token each time.
            seed: Of sampling.
            done: Called with the number of answers so far.

        Returns:
            The answers, without surrounding spaces. They may be empty.
        """
        how: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if sampled:
            how = {"do_sample": True, "temperature": self._config.temperature, "top_p": self._config.top_p, "top_k": 0}
        answers = [""] * len(questions)
        count = 0
        set_seed(seed)
        for rows in self._batches(questions):
            prompts = [self._prompt(questions[row]) for row in rows]
            batch = self._encode(prompts, padding=True, return_tensors="pt").to(self._network.device)
            with torch.inference_mode():
                found = self._network.generate(
                    **batch,
                    **how,
                    max_new_tokens=self._config.answer_tokens,
                    pad_token_id=self._tokenizer.pad_token_id,
                )
            texts = self._tokenizer.batch_decode(found[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            for row, text in zip(rows, texts, strict=True):
                answers[row] = text.strip()
            count += len(rows)
            done(count)
        return answers

    def divergence(self, questions: Sequence[str], answers: Sequence[str]) -> float:
        """Say how far this policy has gone from the first one.

        Returns:
            The Kullback-Leibler divergence KL(this ‖ first) over the whole vocabulary, mean over the answers' tokens, in
            nats; 0 for the first policy.
        """
        if not isinstance(self._network, PeftModel):
            return 0.0
        total, tokens = 0.0, 0
        for question, answer in zip(questions, answers, strict=True):
            prompt = self._encode(self._prompt(question))["input_ids"]
            said = self._tokenizer.encode(answer, add_special_tokens=False)
            if not said:
                continue
            ids = torch.tensor([[*prompt, *said]], device=self._network.device)
            with torch.inference_mode():
                now = self._network(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
                with self._network.disable_adapter():
                    first = self._network(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
            total += float((now.exp() * (now - first)).sum())
            tokens += len(said)
        return total / tokens if tokens else 0.0

    def _prompt(self, question: str) -> str:
        if self._tokenizer.chat_template is None:
            return question
        asked = [{"role": "user", "content": question}]
        return str(self._tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False))

    def _encode(self, text: str | list[str], **options: Any) -> Any:
        plain = self._tokenizer.chat_template is None  # a chat template writes its special tokens itself
        return self._tokenizer(text, add_special_tokens=plain, return_token_type_ids=False, **options)

    def _batches(self, questions: Sequence[str]) -> Iterator[list[int]]:
        """Put questions of like length together."""
        order = sorted(range(len(questions)), key=lambda row: len(questions[row]))
        size = self._config.generation_batch
        return (order[at : at + size] for at in range(0, len(order), size))


def tokenizer_of(folder: Path) -> PreTrainedTokenizerBase:
    """Load a policy's tokenizer; it pads on the left, for generation."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, padding_side="left")  # type: ignore[no-untyped-call]
    if tokenizer.eos_token is None:
        raise BuildError(f"{folder}'s tokenizer names no eos_token: no answer would ever end")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def speaks_chat(config: PolicyConfig) -> bool:
    """Say whether the policy has a chat template: whether its rows are made of messages or of texts."""
    return tokenizer_of(base_folder(config.base)[0]).chat_template is not None


def train_policy(
    rows: Sequence[dict[str, Any]],
    out: Path,
    config: PolicyConfig,
    *,
    start: Path | None = None,
    report: Report = lambda progress: None,
) -> None:
    """Train a policy's adapter for a round.

    Checkpoints go to `.<out>.run` beside `out`, and a run that was killed goes on from the last of them.

    Args:
        rows: `prompt`, `chosen` and `rejected` for DPO, `prompt` and `completion` for SFT.
        out: Folder for the adapter; it appears when the run is over.
        config: How it is trained.
        start: Adapter of the round before, which DPO also takes as its reference; `None` for the base model itself.
        report: Called after every step.

    Raises:
        BuildError: If the base model cannot be had, or the folder holds something else or cannot be written.
    """
    with disk_errors(out, "free some space, and repeat the command to go on"):
        _train_policy(rows, out, config, start, report)


def remove_run(out: Path) -> None:
    """Remove what a killed process may have left beside an adapter that is whole."""
    sweep(out.parent)
    remove_folder(_run_of(out), _RUN)


def _run_of(out: Path) -> Path:
    return out.with_name(f".{out.name}.run")


def _train_policy(
    rows: Sequence[dict[str, Any]], out: Path, config: PolicyConfig, start: Path | None, report: Report
) -> None:
    disable_progress_bars()
    set_seed(config.seed)
    folder, _ = base_folder(config.base)
    half = bfloat16(config.bfloat16)
    shape = lora(config.lora_rank, config.lora_alpha, config.lora_dropout)
    network = trainable(folder, shape, start, half)
    run = _run_of(out)
    check_owned(run, _RUN)
    write_text(run / "run.json", "{}")
    settings: dict[str, Any] = {
        "output_dir": str(run),
        "num_train_epochs": config.epochs,
        "learning_rate": config.learning_rate or POLICY_LEARNING_RATES[config.method],
        "lr_scheduler_type": "cosine",
        "warmup_ratio": config.warm_up_ratio,
        "per_device_train_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.accumulation,
        "gradient_checkpointing": config.checkpointing,
        "bf16": half,
        "use_cpu": not torch.cuda.is_available(),
        "max_length": config.max_length,
        "pad_to_multiple_of": 32,  # so that few shapes occur: for each new one the CPU's kernels are compiled anew
        "logging_steps": 1,
        "include_num_input_tokens_seen": "non_padding",
        "save_strategy": "steps",
        "save_steps": config.save_steps,
        "save_total_limit": 2,
        "seed": config.seed,
        "disable_tqdm": True,
        "report_to": [],
    }
    common: dict[str, Any] = {
        "model": network,
        "train_dataset": Dataset.from_list([_without_provenance(row) for row in rows]),
        "processing_class": tokenizer_of(folder),
        "callbacks": [Reporter(config.method, report)],
    }
    if config.method == "dpo":
        settings |= {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, config.nll_weight], "beta": config.beta}
        trainer: Any = DPOTrainer(args=DPOConfig(**settings), **common)
    else:
        trainer = SFTTrainer(args=SFTConfig(**settings), **common)
    trainer.pop_callback(PrinterCallback)  # it prints every log entry
    if checkpoint := last_checkpoint(run):
        # Beside the copy that DPO compares with, transformers 4.57 would load that copy alone.
        set_peft_model_state_dict(network, load_file(Path(checkpoint) / ADAPTER_FILE))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the trainer's own way to count tokens
        trainer.train(resume_from_checkpoint=checkpoint)
    write_folder(out, lambda made: _publish(network, config.base, made), _ADAPTER)
    remove_run(out)


def _publish(network: PeftModel, base: str, out: Path) -> None:
    """Write the adapter alone, without the copy of it that DPO compares with, under the base model's own name."""
    network.save_pretrained(str(out), selected_adapters=["default"], save_embedding_layers=False)
    settings = json.loads((out / ADAPTER_CONFIG_FILE).read_text(encoding="utf-8")) | {"base_model_name_or_path": base}
    (out / ADAPTER_CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (out / "README.md").unlink(missing_ok=True)  # a form that nobody filled in


def _without_provenance(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "provenance"}
