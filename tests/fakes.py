"""A byte-level tokenizer without merges, and models whose next token is a known function of the past."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from aligner_middleware import Aligner, Correction, Usage
from aligner_middleware.artifact import MODEL_FILE, TOKENIZER_FILE, Artifact, BaseWeights
from aligner_middleware.data.checked import sha256
from aligner_middleware.engine.model import Logits
from aligner_middleware.engine.scheduler import Scheduler
from aligner_middleware.steps import Step
from aligner_middleware.streaming import CorrectionStream
from aligner_middleware.text.edits import operations
from aligner_middleware.text.targets import verdict_of
from aligner_middleware.text.template import (
    DEFAULT,
    VERDICTS,
    PromptTemplate,
    encode_operations,
    verdict_ids,
    with_instruction,
    with_verdicts,
)
from aligner_middleware.text.tokenizer import Tokenizer

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SPARE = ("<repo_name>", "<file_sep>", "<filename>", "<gh_stars>")  # what a base model has and never uses
END = 2
PIECE = 7  # tokens that go through at once


def tokenizer_json(spare: Sequence[str] = ()) -> str:
    """A tokenizer with one token a byte, after three special ones; special ones to spare come last."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: place for place, token in enumerate([*SPECIAL, *alphabet, *spare])}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([*SPECIAL, *spare])
    return str(backend.to_str())


def artifact_folder(folder: Path, spare: Sequence[str] = (), **fields: Any) -> Path:
    """An exported folder with a small tokenizer and a graph that cannot run.

    Args:
        folder: Where it is made.
        spare: Special tokens beyond the usual ones.
        fields: Of its `aligner.json`, others than the defaults here.
    """
    folder.mkdir(exist_ok=True)
    (folder / MODEL_FILE).write_bytes(b"graph")
    (folder / TOKENIZER_FILE).write_text(tokenizer_json(spare))
    settings: dict[str, Any] = {
        "name": "test",
        "template": DEFAULT,
        "precision": "int8",
        "graph": "fused",
        "weights": "floats",
        "base": BaseWeights(source="tests", sha256={}),
        "eos_token_ids": (2,),
        "layers": 1,
        "kv_heads": 1,
        "head_size": 4,
        "vocab_size": 259,
        "max_positions": 64,
        "files": {name: sha256(folder / name) for name in (MODEL_FILE, TOKENIZER_FILE)},
        "built_with": {},
    }
    Artifact(**settings | fields).save(folder)
    return folder


def byte_tokenizer(spare: Sequence[str] = ()) -> Tokenizer:
    return Tokenizer(tokenizer_json(spare))


def verdict_template(tokenizer: Tokenizer, *, marks: bool) -> PromptTemplate:
    """The default prompt with verdicts; an edit is operations where there are marks, and else a copy."""
    return with_verdicts(DEFAULT, tokenizer, marks=marks)


class FakeCache:
    def __init__(self, model: FakeModel, rows: int, capacity: int) -> None:
        self.capacity = capacity
        self.held: list[list[int]] = [[] for _ in range(rows)]
        self.model = model
        self.stopped = False

    def extend(self, row: int, tokens: Sequence[int], wanted: int) -> Iterator[Logits]:
        self.begun()
        for start in range(0, len(tokens), PIECE):
            piece = tokens[start : start + PIECE]
            unwanted = max(0, len(tokens) - wanted - start)
            logits = self.model.append(self.held[row], piece, max(1, len(piece) - unwanted), self.capacity)
            if unwanted < len(piece):
                yield logits

    def step(self, tokens: Mapping[int, int]) -> Logits:
        self.begun()
        given = tokens.items()
        return np.concatenate([self.model.append(self.held[row], [token], 1, self.capacity) for row, token in given])

    def begin(self, prompts: Mapping[int, Sequence[int]]) -> Logits:
        self.begun()
        given = prompts.items()
        assert not any(self.held[row] for row in prompts)
        return np.concatenate([self.model.append(self.held[row], ids, 1, self.capacity) for row, ids in given])

    def trim(self, row: int, length: int) -> None:
        assert length <= len(self.held[row])
        del self.held[row][length:]

    def stop(self) -> None:
        self.stopped = True

    def begun(self) -> None:
        self.model.passes += 1
        if self.stopped:
            raise RuntimeError("stopped")


class FakeModel:
    """Predicts `rule(all tokens so far)`, one token or the logits of some, and counts its passes and tokens."""

    max_positions = 4096
    device = "fake"
    vocabulary = 1024
    sure = 100.0  # logit of a rule's token, beyond every tolerance; all others have 0
    bytes_per_token = 2**30 // 4096 // 4  # room for four rows of 4096 tokens

    def __init__(self, rule: Callable[[list[int]], int | Mapping[int, float]]) -> None:
        self.rule = rule
        self.passes = 0
        self.tokens = 0

    def new_cache(self, rows: int, capacity: int) -> FakeCache:
        return FakeCache(self, rows, capacity)

    def append(self, held: list[int], tokens: Sequence[int], wanted: int, capacity: int) -> Logits:
        assert 1 <= wanted <= len(tokens)
        unwanted = len(tokens) - wanted
        held += map(int, tokens[:unwanted])
        logits = np.zeros((wanted, self.vocabulary), dtype=np.float32)
        for row, token in zip(logits, tokens[unwanted:], strict=True):
            held.append(int(token))
            said = self.rule(held)
            for predicted, logit in said.items() if isinstance(said, Mapping) else [(said, self.sure)]:
                row[predicted] = logit
        assert len(held) <= capacity
        self.tokens += len(tokens)
        return logits


class FakeAligner(Aligner):
    """An aligner over a fake model, which tests may look at and replace."""

    fake_model: FakeModel
    _scheduler: Scheduler


def fake_aligner(correct: Callable[[str, str], str], **options: object) -> FakeAligner:
    """An aligner whose model reads the default prompt back and writes `correct(question, answer)`."""
    tokenizer = byte_tokenizer()
    start = tokenizer.special["<|im_start|>"]

    @lru_cache(maxsize=32)
    def target(prompt: tuple[int, ...]) -> list[int]:
        parts = _parts(prompt, start)
        question, answer = (tokenizer.decode(part[: part.index(END)]).partition("\n")[2] for part in parts)
        return tokenizer.encode(correct(question, answer))

    def rule(tokens: list[int]) -> int:
        place = _third(start, tokens)
        if place is None:  # inside the prompt, where no prediction counts
            return END
        said = tokens[place + 1 + len(tokenizer.encode("correction\n")) :]
        return _next(target(tuple(tokens[:place])), said)

    return _aligner(FakeModel(rule), tokenizer, DEFAULT, options)


def judging_aligner(
    correct: Callable[[str, str], str],
    log_odds: Callable[[str, str], float] | None = None,
    *,
    marks: bool = True,
    **options: object,
) -> FakeAligner:
    """An aligner with verdicts, whose model reads its prompt back and corrects to `correct(question, answer)`.

    Its verdict is what the two texts differ by. A single space at the end of an answer it does not see.

    Args:
        correct: What it writes.
        log_odds: Of not keeping; 20 where it corrects and -20 where it does not.
        marks: Whether an edit is written as operations, not as a copy.
    """
    tokenizer = byte_tokenizer(SPARE)
    template = verdict_template(tokenizer, marks=marks)
    ids = verdict_ids(tokenizer, template)
    assert ids is not None
    start, mark = tokenizer.special["<|im_start|>"], tokenizer.special[template.mark or "<gh_stars>"]

    def read(part: list[int]) -> str:
        first, *sentences = _parts([start, *part[: part.index(END)]], mark, start)
        if not sentences:
            return tokenizer.decode(first).partition("\n")[2]
        texts = [tokenizer.decode(sentence).partition(" ")[2] for sentence in sentences]
        return "".join(text if text[-1:].isspace() else text + " " for text in texts[:-1]) + texts[-1]

    @lru_cache(maxsize=32)
    def target(prompt: tuple[int, ...]) -> tuple[str, str, str]:
        question, answer = map(read, _parts(prompt, start))
        return question, answer, correct(question, answer)

    def rule(tokens: list[int]) -> int | Mapping[int, float]:
        place = _third(start, tokens)
        if place is None:
            return END
        question, answer, correction = target(tuple(tokens[:place]))
        said = tokens[place + 1 + len(tokenizer.encode("correction\n")) :]
        if not said:
            wanted = verdict_of(answer, correction, as_operations=marks)
            odds = log_odds(question, answer) if log_odds else -20.0 if wanted == "keep" else 20.0
            chosen = ids[2 if wanted == "rewrite" else 1]
            return {**dict.fromkeys(ids, -1e9), ids[0]: 0.0, chosen: odds}
        if VERDICTS[ids.index(said[0])] == "edit" and marks:
            return _next(encode_operations(tokenizer, template, operations(answer, correction) or []), said[1:])
        return _next(tokenizer.encode(correction), said[1:])

    return _aligner(FakeModel(rule), tokenizer, template, options)


def instructed_aligner(correct: Callable[[str, str, str], str], **options: object) -> FakeAligner:
    """A copying aligner with instructions, whose model writes `correct(instruction, question, answer)`."""
    tokenizer = byte_tokenizer()
    start, head = tokenizer.special["<|im_start|>"], tokenizer.encode("instruction\n")

    @lru_cache(maxsize=32)
    def target(prompt: tuple[int, ...]) -> list[int]:
        texts = [tokenizer.decode(part[: part.index(END)]).partition("\n")[2] for part in _parts(prompt, start)]
        return tokenizer.encode(correct(*["", *texts][-3:]))

    def rule(tokens: list[int]) -> int:
        place = _nth(start, tokens, 4 if tokens[1 : len(head) + 1] == head else 3)
        if place is None:
            return END
        said = tokens[place + 1 + len(tokenizer.encode("correction\n")) :]
        return _next(target(tuple(tokens[:place])), said)

    return _aligner(FakeModel(rule), tokenizer, with_instruction(DEFAULT), options)


def _third(token: int, tokens: list[int]) -> int | None:
    """Where a token stands for the third time."""
    return _nth(token, tokens, 3)


def _nth(token: int, tokens: list[int], count: int) -> int | None:
    place = -1
    for _ in range(count):
        try:
            place = tokens.index(token, place + 1)
        except ValueError:
            return None
    return place


def _parts(tokens: Sequence[int], *starts: int) -> list[list[int]]:
    parts: list[list[int]] = []
    for token in tokens:
        if token in starts:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def _next(target: Sequence[int], said: Sequence[int]) -> int:
    return target[len(said)] if len(said) < len(target) and said == target[: len(said)] else END


def _aligner(model: FakeModel, tokenizer: Tokenizer, template: PromptTemplate, options: dict[str, Any]) -> FakeAligner:
    aligner = FakeAligner(model, tokenizer, template, [END], name="fake", **options)
    aligner.fake_model = model
    return aligner


class InstantAligner(Aligner):
    """An aligner without an engine: `correct(question, answer)` at once, for what is asked of all that lies around it."""

    def __init__(self, correct: Callable[[str, str], str]) -> None:
        super().__init__(FakeModel(lambda tokens: END), byte_tokenizer(), DEFAULT, [END], name="instant")
        self._correct = correct

    def _made(self, question: str, answer: str) -> Correction:
        return Correction(question, answer, self._correct(question, answer), "stop", Usage(passes=1))

    def correct_batch(self, pairs: Iterable[tuple[str, str]], **options: Any) -> list[Any]:
        return [self._made(*pair) for pair in pairs]

    async def acorrect(self, question: str, answer: str, **options: Any) -> Correction:
        await asyncio.sleep(0)
        return self._made(question, answer)

    def stream(self, question: str, answer: Any, **options: Any) -> CorrectionStream:
        return CorrectionStream(_InstantFlow(lambda: self._made(question, answer)))

    astream = stream

    def read_ahead(self, question: str, **options: Any) -> Any:
        return _Deaf()


class _Deaf:
    released = ""
    waiting = False

    def feed(self, chunk: str) -> None:
        pass

    def close(self) -> None:
        pass


class _InstantFlow:
    """Gives a correction in two pieces."""

    correction: Correction | None = None

    def __init__(self, correct: Callable[[], Correction]) -> None:
        self._correct = correct

    def steps(self) -> Generator[str | Step, None, None]:
        made = self._correct()
        yield made.corrected[:3]
        yield made.corrected[3:]
        self.correction = made

    def free(self) -> None:
        pass

    async def aclose(self) -> None:
        pass


def joined(pieces: list[Any]) -> Any:
    """Add up the chunks of a stream."""
    whole = pieces[0]
    for piece in pieces[1:]:
        whole += piece
    return whole


async def collected(pieces: Any) -> list[Any]:
    """List what an async iterator gives."""
    return [piece async for piece in pieces]
