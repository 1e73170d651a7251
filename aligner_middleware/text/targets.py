"""The tokens that an aligner learns to write after its prompt: a verdict if it gives one, then the correction, if any.

Training, the comparison with PyTorch and likelihoods all use `encode_target`, so that they mean the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from aligner_middleware.text.edits import Operation, operations, share_kept
from aligner_middleware.text.template import (
    VERDICTS,
    PromptTemplate,
    Verdict,
    encode_continuation,
    encode_operations,
    verdict_ids,
)
from aligner_middleware.text.tokenizer import Tokenizer

EDIT_SHARE = 0.5  # least share of the answer's words that stays in an edit


class Target(NamedTuple):
    """The tokens after a prompt.

    Attributes:
        ids: Verdict, correction and end token; without verdicts, or after `keep`, only some of these.
        verdict: The first of them; `None` for an aligner without verdicts.
        deciding: Positions in `ids` of deciding tokens: a copy's first token, and its first edit, which is the token at
            which it first differs from the answer; an operation's sentence number, and the token after that.
    """

    ids: tuple[int, ...]
    verdict: Verdict | None
    deciding: tuple[int, ...] = ()


def verdict_of(answer: str, correction: str, edit_share: float = EDIT_SHARE, *, as_operations: bool = True) -> Verdict:
    """Derive a verdict from the share of an answer's words that stays.

    Args:
        answer: The answer.
        correction: Its correction; empty where there is none.
        edit_share: Least share of an edit.
        as_operations: Whether an edit must be one by operations on sentences, too.
    """
    if answer == correction or (correction and answer.split() == correction.split()):  # white space is no correction
        return "keep"
    if not correction or share_kept(answer, correction) < edit_share:
        return "rewrite"
    return "rewrite" if as_operations and operations(answer, correction) is None else "edit"


def encode_target(
    tokenizer: Tokenizer,
    template: PromptTemplate,
    end_token_id: int,
    answer: str,
    correction: str,
    edit_share: float = EDIT_SHARE,
) -> Target:
    """Encode a correction in the form that a template asks for. Without a correction the target is the verdict alone."""
    verdicts = verdict_ids(tokenizer, template)
    if verdicts is None:
        return _copy(tokenizer, template, end_token_id, answer, correction)
    verdict = verdict_of(answer, correction, edit_share, as_operations=template.mark is not None)
    token = verdicts[VERDICTS.index(verdict)]
    if verdict == "keep" or not correction:
        return Target((token,), verdict)
    if verdict == "edit" and template.mark:
        return _operations(tokenizer, template, end_token_id, token, operations(answer, correction) or [])
    copy = _copy(tokenizer, template, end_token_id, answer, correction)
    return Target((token, *copy.ids), verdict, tuple(place + 1 for place in copy.deciding))


def _operations(
    tokenizer: Tokenizer, template: PromptTemplate, end_token_id: int, verdict: int, found: Sequence[Operation]
) -> Target:
    ids, deciding = [verdict], list[int]()
    for operation in found:
        bare = encode_operations(tokenizer, template, [operation._replace(text="")])
        deciding += range(len(ids) + 1, len(ids) + len(bare) + 1)
        ids += encode_operations(tokenizer, template, [operation])
    return Target((*ids, end_token_id), "edit", tuple(deciding))


def _copy(tokenizer: Tokenizer, template: PromptTemplate, end_token_id: int, answer: str, correction: str) -> Target:
    target = (*encode_continuation(tokenizer, template, correction), end_token_id)
    given = (*encode_continuation(tokenizer, template, answer), end_token_id)
    first_edit = next((at for at, (a, b) in enumerate(zip(given, target, strict=False)) if a != b), len(target) - 1)
    return Target(target, None, tuple(sorted({0, first_edit})))
