"""Triples to the examples of both stages: the identity warm-up and the correction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from aligner_middleware.data.triples import Triple, with_identity
from aligner_middleware.errors import ConfigError
from aligner_middleware.text.template import VERDICTS, verdict_ids
from aligner_middleware.training.batches import (
    Example,
    encode_identity,
    encode_triple,
    verdict_weights,
)
from aligner_middleware.training.config import Stage, TrainConfig
from aligner_middleware.training.origin import Origin


@dataclass(frozen=True)
class StageData:
    """A stage with its examples.

    Attributes:
        name: `warm_up` or `correction`.
        settings: Of the stage.
        examples: To train on.
        held_out: To be scored on.
        verdict_weights: Weight of each verdict, by its token; `None` where the stage teaches none.
    """

    name: str
    settings: Stage
    examples: list[Example]
    held_out: list[Example]
    verdict_weights: dict[int, float] | None


@dataclass(frozen=True)
class EncodedRows:
    """The rows of a run.

    Attributes:
        examples: Rows to train on that are short enough, without added identity rows.
        stages: Both stages, in order.
    """

    examples: list[Example]
    stages: list[StageData]


def encode_rows(
    origin: Origin, config: TrainConfig, triples: Sequence[Triple], held_out: Sequence[Triple]
) -> EncodedRows:
    """Encode rows for both stages.

    Raises:
        ConfigError: If no row can be trained on; the message says why.
    """
    encoder = _Encoder(origin, config)
    examples = encoder.corrections(triples)
    if not examples:
        raise ConfigError(_why_no_examples(origin, config, triples))
    mixed = encoder.corrections(with_identity(triples, config.correction.identity_share, config.seed))
    stages = [
        StageData("warm_up", config.warm_up, encoder.copies(triples), encoder.copies(held_out), None),
        StageData(
            "correction", config.correction, mixed, encoder.corrections(held_out), _weights(origin, config, mixed)
        ),
    ]
    return EncodedRows(examples, stages)


class _Encoder:
    """Encodes rows by the prompt and tokenizer of a model, and leaves out rows that are too long."""

    def __init__(self, origin: Origin, config: TrainConfig) -> None:
        self._with = (origin.tokenizer, origin.template, origin.end_token_id)
        self._verdicts = origin.template.verdicts
        self._config = config

    def corrections(self, rows: Sequence[Triple]) -> list[Example]:
        """Encode rows of the correction stage; a row without a correction teaches a verdict only."""
        usable = (row for row in rows if row.correction or self._verdicts)
        encoded = (encode_triple(*self._with, row, self._config.edit_share) for row in usable)
        return [example for example in encoded if len(example) <= self._config.max_length]

    def copies(self, rows: Sequence[Triple]) -> list[Example]:
        """Encode rows of the warm-up stage."""
        encoded = (encode_identity(*self._with, row) for row in rows)
        return [example for example in encoded if example and len(example) <= self._config.max_length]


def _why_no_examples(origin: Origin, config: TrainConfig, triples: Sequence[Triple]) -> str:
    if not triples:
        return "there are no rows to train on: give at least one"
    if not origin.template.verdicts and not any(row.correction for row in triples):
        return "no row has a correction, and an aligner without verdicts learns from corrections only: give some"
    return f"every row is longer than {config.max_length} tokens: raise max_length"


def _weights(origin: Origin, config: TrainConfig, examples: Sequence[Example]) -> dict[int, float] | None:
    ids = verdict_ids(origin.tokenizer, origin.template)
    if ids is None:
        return None
    weights = verdict_weights(examples, config.verdict_balance)
    return {token: weights[verdict] for token, verdict in zip(ids, VERDICTS, strict=True)}
