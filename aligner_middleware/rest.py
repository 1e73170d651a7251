"""What follows the released text of an answer: it is corrected alone where the verdict on the whole is to rewrite.

A rewrite takes the place of a whole answer, and text that was shown cannot be replaced. An edit by operations needs none of
this: those on sentences that were shown are left out (`codec.py`).
"""

from __future__ import annotations

import math
from dataclasses import replace

from aligner_middleware.codec import Codec
from aligner_middleware.correction import Correction
from aligner_middleware.request import Request
from aligner_middleware.text.safeguards import doubts
from aligner_middleware.text.split import continuation


def encode_rest(codec: Codec, request: Request) -> Request | None:
    """Encode the rest of an answer as one of its own, which is corrected whatever the verdict on it alone.

    Args:
        codec: What has encoded the whole.
        request: The whole, with its verdict.

    Returns:
        The request of the rest; `None` where the whole need not be rewritten, or nothing of it was released.
    """
    verdict = codec.verdict(request) if request.released else None
    if verdict not in ("edit", "rewrite") or (verdict == "edit" and not codec.copies):
        return None
    question = continuation(request.question, request.text[: request.released])
    rest = codec.encode(
        question, request.text[request.released :].strip(), on_doubt="keep", instruction=request.instruction or ""
    )
    if rest.generation is not None and rest.generation.rule is not None:
        rest.generation.rule = replace(rest.generation.rule, threshold=-math.inf)
    return rest


def decode_with_rest(codec: Codec, request: Request, rest: Request) -> Correction:
    """Make a correction of the whole: the released text, and the correction of the rest.

    Args:
        codec: What has encoded both.
        request: The whole.
        rest: What `encode_rest` gave, done.

    Raises:
        DoubtError: If a safeguard objects, to the rest or to the whole, and `on_doubt` is `raise`.
    """
    made = codec.decode(rest)
    released, left = request.text[: request.released], request.text[request.released :]
    start, end = len(left) - len(left.lstrip()), len(left.rstrip())
    text = released + left[:start] + made.corrected + left[end:]
    found = dict.fromkeys((*doubts(request.text, text, question=request.question), *made.doubts))
    return codec.conclude(request, text, tuple(found), made)
