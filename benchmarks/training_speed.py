"""Tokens a second in training: packed rows, padded rows, and the trainer of transformers as it comes.

    python benchmarks/training_speed.py [OUT.json] [--steps N] [--batch N]

Each arm trains the same rows of the default aligner, in a process of its own, and counts tokens that are not padding over all
steps but the first three. The roof is the rate at which this machine multiplies bfloat16 matrices of the model's shapes, over
the operations that full fine-tuning needs for a token.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

ARMS = {
    "transformers.Trainer, full": ("plain", "full"),
    "padded, full": ("padded", "full"),
    "packed, full": ("packed", "full"),
    "padded, difference": ("padded", "difference"),
    "packed, difference": ("packed", "difference"),
    "padded, lora": ("padded", "lora"),
    "packed, lora": ("packed", "lora"),
}
WARM_UP = 3  # steps that are not counted


def rows(number: int) -> list[Any]:
    """Take rows of the default aligner with answers long and short."""
    from aligner_middleware.data.triples import read_rows
    from aligner_middleware.locations import DEFAULT_FOLDER

    found = read_rows(DEFAULT_FOLDER / "corrections.jsonl").triples
    return found[:: max(1, len(found) // number)][:number]


def measure(form: str, method: str, steps: int, batch: int) -> dict[str, float]:
    """Train for some steps; gives tokens a second and the process's largest memory in MB."""
    times: list[tuple[float, int]] = []
    with tempfile.TemporaryDirectory() as folder:
        if form == "plain":
            _plain(Path(folder), steps, batch, times)
        else:
            _ours(Path(folder), form, method, steps, batch, times)
    (begin, before), (end, after) = times[WARM_UP - 1], times[-1]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"tokens_per_second": round((after - before) / (end - begin), 1), "peak_mb": round(memory)}


def _ours(folder: Path, form: str, method: Any, steps: int, batch: int, times: list[tuple[float, int]]) -> None:
    from aligner_middleware.training import Stage, TrainConfig, origin, stages, train
    from aligner_middleware.training.trainer import Reporter

    class Clock(Reporter):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                times.append((time.perf_counter(), int(state.num_input_tokens_seen)))

    config = TrainConfig(
        method=method, batch_size=batch, warm_up=Stage(epochs=0), correction=Stage(epochs=1), save_steps=10_000
    )
    padding = patch.object(origin, "use_packing", lambda model: None) if form == "padded" else nullcontext()
    with patch.object(stages, "Reporter", Clock), padding:
        train(rows(steps * batch), folder / "out", config)


def _plain(folder: Path, steps: int, batch: int, times: list[tuple[float, int]]) -> None:
    """Train as most people would: rows padded to the longest of a batch, logits everywhere, bfloat16 autocast."""
    import torch
    from transformers import (
        AutoModelForCausalLM,
        DataCollatorForSeq2Seq,
        PreTrainedTokenizerFast,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    from aligner_middleware.artifact import TOKENIZER_FILE
    from aligner_middleware.checkpoints.base import base_folder
    from aligner_middleware.text.published import TEMPLATES
    from aligner_middleware.text.template import with_verdicts
    from aligner_middleware.text.tokenizer import Tokenizer
    from aligner_middleware.training.batches import encode_triple

    base, _ = base_folder()
    own = Tokenizer.from_file(base / TOKENIZER_FILE)
    template = with_verdicts(TEMPLATES["default"], own, marks=True)
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_file=str(base / TOKENIZER_FILE), pad_token="<|im_end|>"
    )
    encoded = []
    for row in rows(steps * batch):
        example = encode_triple(own, template, 2, row)
        encoded.append(
            {
                "input_ids": list(example.prompt + example.target),
                "attention_mask": [1] * len(example),
                "labels": [-100] * len(example.prompt) + list(example.target),
            }
        )

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            times.append((time.perf_counter(), int(state.num_input_tokens_seen)))

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=1,
            learning_rate=2e-5,
            per_device_train_batch_size=batch,
            bf16=True,
            use_cpu=True,
            include_num_input_tokens_seen="non_padding",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
        ),
        train_dataset=encoded,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[Clock()],
    ).train()


def roof() -> float:
    """Give tokens a second if nothing but the linear layers' products cost time, forwards and backwards."""
    import torch

    shapes = ((576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576))
    tokens, layers = 3072, 30
    work = [(torch.randn(tokens, i).bfloat16(), torch.randn(o, i).bfloat16()) for i, o in shapes]
    with torch.no_grad():
        for _ in range(3):
            begin = time.perf_counter()
            for _ in range(5):
                for hidden, weight in work:
                    torch.nn.functional.linear(hidden, weight)
            seconds = (time.perf_counter() - begin) / 5
    return tokens / (3 * layers * seconds)


def main() -> None:
    """Run every arm and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, default=Path("build-out/training_speed.json"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=12)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    found: dict[str, Any] = {}
    for name, (form, method) in ARMS.items():
        with context.Pool(1) as pool:
            found[name] = pool.apply(measure, (form, method, options.steps, options.batch))
        print(
            f"{name:28} {found[name]['tokens_per_second']:7.0f} tokens/s   {found[name]['peak_mb']:6.0f} MB", flush=True
        )
    found["roof of products, full"] = {"tokens_per_second": round(roof(), 1)}
    print(f"{'roof of products, full':28} {found['roof of products, full']['tokens_per_second']:7.0f} tokens/s")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
