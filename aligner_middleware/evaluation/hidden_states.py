"""Reads an aligner's hidden states at the end of its prompts, where it decides. Needs the `[build]` extra."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from aligner_middleware.calibration import Calibration
from aligner_middleware.codec import Codec
from aligner_middleware.data.progress import Progress, Report, ignore
from aligner_middleware.engine.generation import VerdictRule
from aligner_middleware.engine.pytorch import TorchModel
from aligner_middleware.errors import InputError, MissingExtraError
from aligner_middleware.evaluation.detection import Floats
from aligner_middleware.evaluation.labelled_rows import LabelledRow
from aligner_middleware.loading import load
from aligner_middleware.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

States = NDArray[np.float32]

_TOKENS, _ROWS = 1024, 16  # of a batch, which bound its memory; a longer prompt is a batch of its own


@dataclass(frozen=True)
class ReadRows:
    """Rows with the hidden states at the last token of their prompts, from which the next token is predicted.

    Attributes:
        rows: The rows that fit into the context, in the order given.
        states: `[N, L, W]`, the output of each of L layers; the last layer's after the final normalisation.
        log_odds: `[N]`, of not keeping the answer, in nats; `None` for an aligner without verdicts.
        left_out: Number of rows that do not fit.
    """

    rows: list[LabelledRow]
    states: States
    log_odds: Floats | None
    left_out: int

    @property
    def unsafe(self) -> NDArray[np.bool_]:
        """Whether each answer is bad, `[N]`."""
        return np.array([row.unsafe for row in self.rows], np.bool_)

    def where(self, chosen: NDArray[np.bool_]) -> ReadRows:
        """Give some of the rows: those where `chosen`, `[N]`, is true."""
        rows = [row for row, one in zip(self.rows, chosen, strict=True) if one]
        log_odds = None if self.log_odds is None else self.log_odds[chosen]
        return ReadRows(rows, self.states[chosen], log_odds, 0)


@dataclass(frozen=True)
class LastTokens:
    """The last tokens of a prompt.

    Attributes:
        tokens: The text of each.
        states: `[P, L, W]`, the output of each layer at each.
    """

    tokens: list[str]
    states: States


class StateReader:
    """Runs an aligner's network in PyTorch, in float32, over the prompts that inference gives it.

    Args:
        network: The network.
        codec: Makes the prompts.
    """

    def __init__(self, network: PreTrainedModel, codec: Codec) -> None:
        self._network = network
        self._codec = codec

    @classmethod
    def load(cls, model: str) -> StateReader:
        """Open a checkpoint.

        Args:
            model: `default`, the folder of an adapter or a checkpoint, or a hub id.

        Raises:
            ArtifactError: If it is an exported folder, whose graph gives no hidden states, or cannot be used.
            BuildError: If it cannot be found or loaded.
            MissingExtraError: If `[build]` is not installed.
        """
        try:
            parts = load(model, precision="float32", providers=None, prompt=None, engine="torch", threads=None)
        except MissingExtraError as exc:
            raise MissingExtraError("reading hidden states", "build") from exc
        assert isinstance(parts.model, TorchModel)
        longest = parts.model.max_positions
        codec = Codec(parts.tokenizer, parts.template, parts.eos_token_ids, longest, Settings(), Calibration())
        return cls(parts.model.network, codec)

    def read(self, rows: Sequence[LabelledRow], report: Report = ignore) -> ReadRows:
        """Read the states of each row; rows that do not fit into the context are left out.

        Args:
            rows: The rows.
            report: Told of rows done, at the stage "read".
        """
        prompts = {at: prompt for at, row in enumerate(rows) if (prompt := self._prompt(row))}
        states: dict[int, States] = {}
        log_odds: dict[int, float] = {}
        for batch in _batches(prompts):
            outputs, logits = self._run([prompts[at] for at in batch])
            for place, at in enumerate(batch):
                states[at] = outputs[place, -1]
                if self._rule is not None:
                    log_odds[at] = self._rule.log_odds(logits[place])
            report(Progress("read", len(states), len(prompts)))
        order = sorted(states)
        return ReadRows(
            rows=[rows[at] for at in order],
            states=np.stack([states[at] for at in order]) if order else np.zeros((0, 0, 0), np.float32),
            log_odds=None if self._rule is None else np.array([log_odds[at] for at in order]),
            left_out=len(rows) - len(order),
        )

    def read_last(self, row: LabelledRow, tokens: int) -> LastTokens | None:
        """Read the states of a row's last tokens, at most so many; `None` if it does not fit into the context."""
        prompt = self._prompt(row)
        if not prompt:
            return None
        outputs, _ = self._run([prompt], tokens)
        tokenizer = self._codec.tokenizer
        special = {token: name for name, token in tokenizer.special.items()}
        return LastTokens([special.get(token) or tokenizer.decode([token]) for token in prompt[-tokens:]], outputs[0])

    @property
    def _rule(self) -> VerdictRule | None:
        return VerdictRule(*self._codec.verdict_ids) if self._codec.verdict_ids else None

    def _prompt(self, row: LabelledRow) -> list[int]:
        try:
            generation = self._codec.encode_for_evidence(row.question, row.answer, row.instruction).generation
        except InputError:
            return []
        return [] if generation is None else list(generation.prompt)

    @torch.inference_mode()
    def _run(self, prompts: Sequence[Sequence[int]], tokens: int = 1) -> tuple[States, NDArray[np.float32]]:
        """Run a batch: states of the last tokens, `[B, P, L, W]`, and the logits after the last one, `[B, V]`."""
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        ids = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(list(prompt))
        device = self._network.device
        # Padding comes after the prompts, where no token sees it.
        outputs = self._network(
            input_ids=ids.to(device),
            attention_mask=(torch.arange(ids.shape[1]) < lengths[:, None]).long().to(device),
            output_hidden_states=True,
            logits_to_keep=(lengths - 1).to(device),  # of every row at the last tokens of all: [B, B, V]
            use_cache=False,
        )
        kept = min(tokens, int(lengths.min()))
        rows = torch.arange(len(prompts))[:, None]
        places = lengths[:, None] - kept + torch.arange(kept)
        states = torch.stack([layer[rows, places] for layer in outputs.hidden_states[1:]], dim=2)
        logits = outputs.logits[rows[:, 0], rows[:, 0]]
        return states.float().cpu().numpy(), logits.float().cpu().numpy()


def _batches(prompts: dict[int, list[int]]) -> Iterator[list[int]]:
    """Give the keys of the prompts in batches of prompts of nearly equal length, the shortest first."""
    batch: list[int] = []
    for at in sorted(prompts, key=lambda at: len(prompts[at])):
        if batch and (len(batch) == _ROWS or (len(batch) + 1) * len(prompts[at]) > _TOKENS):
            yield batch
            batch = []
        batch.append(at)
    if batch:
        yield batch
