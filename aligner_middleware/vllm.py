"""Drafts for an aligner in vLLM: the answer that stands in the prompt is what the correction mostly repeats.

vLLM loads the class by its name and calls it in its worker, after each step of its engine (Model Runner V1):

    vllm serve FOLDER --speculative-config '{"method": "custom_class",
        "model": "aligner_middleware.vllm.AnswerProposer", "num_speculative_tokens": 64}'

FOLDER is what `aligner export MODEL FOLDER --form checkpoint` wrote: its `aligner.json` tells how a prompt is built, and so
where the answer stands in one. vLLM verifies every draft, so greedy corrections are the same with and without.

Nothing here imports vLLM, torch or ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aligner_middleware.artifact import CheckpointArtifact
from aligner_middleware.engine.draft import DraftReader
from aligner_middleware.text.place import around_answer

Tokens = NDArray[np.int32]


class AnswerProposer:
    """A proposer of vLLM's method `custom_class`: its constructor and its methods are those that vLLM 0.32 calls.

    Args:
        vllm_config: vLLM's `VllmConfig`. Read are the model's folder and context, and `num_speculative_tokens`.

    Raises:
        ArtifactError: If the model's folder has no `aligner.json` or `tokenizer.json` that can be used.
        BuildError: If its template does not show where a prompt ends.
    """

    def __init__(self, vllm_config: Any) -> None:
        folder = Path(vllm_config.model_config.model)
        artifact = CheckpointArtifact.read(folder)
        before, after = around_answer(artifact.tokenizer(folder), artifact.template)
        self._before, self._after = np.array(before, np.int32), np.array(after, np.int32)
        self._verdicts = artifact.verdict_ids or ()
        self._longest = int(vllm_config.speculative_config.num_speculative_tokens)
        self._context = int(vllm_config.model_config.max_model_len)
        self._followed: dict[bytes, list[_Followed]] = {}  # by all tokens of the sequence so far; twins are possible

    def load_model(self, *args: object, **kwargs: object) -> None:
        """Load nothing: a draft needs no weights."""

    def propose(
        self,
        sampled_token_ids: Sequence[Sequence[int]],
        num_tokens_no_spec: NDArray[Any],
        token_ids_cpu: NDArray[Any],
        slot_mappings: object = None,
    ) -> list[list[int]]:
        """Propose the next tokens of each running sequence.

        Args:
            sampled_token_ids: For each of `B` rows the tokens that this step gave, which are the accepted ones of its last
                proposal and one more; none where the prompt is not read to its end.
            num_tokens_no_spec: `[B]`, how many tokens each row has, these included.
            token_ids_cpu: `[B, max_model_len]`, the tokens of prompt and output.
            slot_mappings: Not used.

        Returns:
            A list of tokens for each row; empty where nothing is proposed.
        """
        followed: dict[bytes, list[_Followed]] = {}
        proposals: list[list[int]] = []
        for row, sampled in enumerate(sampled_token_ids):
            ids = token_ids_cpu[row, : int(num_tokens_no_spec[row])].astype(np.int32)
            room = min(self._longest, self._context - len(ids) - 1)
            if not len(sampled) or room < 1:
                proposals.append([])
                continue
            known = self._followed.get(ids[: -len(sampled)].tobytes())
            if known:
                one = known.pop()
                one.advance(sampled)
            else:
                one = self._begin(ids)
            proposals.append(one.propose(room))
            followed.setdefault(ids.tobytes(), []).append(one)
        self._followed = followed  # of sequences that have ended, or that another request interrupted, nothing stays
        return proposals

    def _begin(self, ids: Tokens) -> _Followed:
        """Follow a sequence that is new, or was interrupted: find its answer, and what was written after its prompt."""
        at = _last_place(ids, self._after, len(ids))
        if at is None:
            return _Followed((), self._longest)
        begin = self._answer_begins(ids, at)
        written = ids[at + len(self._after) :].tolist()
        if written and written[0] in self._verdicts:
            del written[0]
        one = _Followed(ids[begin or 0 : at].tolist(), self._longest, from_start=begin is not None)
        one.advance(written)
        return one

    def _answer_begins(self, ids: Tokens, end: int) -> int | None:
        """Give the place of the answer's first token, if it can be told: the whole prompt is a draft, too."""
        for words in (self._before, self._before[:-1]):  # the last of them may be joined with the answer's first one
            place = _last_place(ids, words, end)
            if place is not None:
                return place + len(words)
        return None


class _Followed:
    """A sequence that is being written, beside its draft.

    Args:
        draft: Tokens of the answer, as they stand in the prompt.
        longest: Tokens of a proposal at most.
        from_start: Whether what is written is expected to begin as the draft does.
    """

    def __init__(self, draft: Sequence[int], longest: int, from_start: bool = True) -> None:
        self._draft = list(draft)
        self._reader = DraftReader(
            draft, shortest=longest
        )  # a step of vLLM costs more than the tokens that it verifies
        # Tokens so far, all of them the draft's from its start; None after the first other one.
        self._copied: int | None = 0 if from_start else None
        self._proposed = 0

    def advance(self, tokens: Sequence[int]) -> None:
        """Follow the tokens of one step; the last of them was not proposed."""
        if self._proposed:
            self._reader.learn(self._proposed, len(tokens) - 1)
        self._reader.advance(tokens)
        if self._copied is not None:
            end = self._copied + len(tokens)
            self._copied = end if self._draft[self._copied : end] == list(tokens) else None

    def propose(self, room: int) -> list[int]:
        """Give the draft's rest while the sequence is a copy of it, and else what its reader proposes."""
        tokens = self._reader.propose() if self._copied is None else self._draft[self._copied :]
        proposal = tokens[:room]
        self._proposed = len(proposal)
        return proposal


def _last_place(ids: Tokens, words: Tokens, end: int) -> int | None:
    """Find the last place at which these words stand whole before `end`; `None` where there are no words, or no place."""
    if not len(words):
        return None
    starts = np.flatnonzero(ids[: max(end - len(words) + 1, 0)] == words[0])
    return next((int(at) for at in starts[::-1] if np.array_equal(ids[at : at + len(words)], words)), None)
