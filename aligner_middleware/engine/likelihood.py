"""How likely a model is to write given tokens after a prompt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from aligner_middleware.engine.model import Model, log_probabilities


def log_likelihoods(model: Model, prompt: Sequence[int], targets: Sequence[Sequence[int]]) -> list[tuple[float, bool]]:
    """Give the probability of each target after a prompt, which is prefilled once.

    Args:
        model: The network that predicts tokens.
        prompt: Token ids, at least one.
        targets: Token ids of each target, at least one. Prompt and longest target fit into the context.

    Returns:
        For each the natural logarithm of its probability, and whether greedy decoding writes it.
    """
    longest = len(prompt) + max(map(len, targets), default=0)
    cache = model.new_cache(1, longest)
    first = np.concatenate([piece.copy() for piece in cache.extend(0, prompt, 1)])  # [1, V]
    results = []
    for target in targets:
        parts = [first]
        if len(target) > 1:
            parts += [piece.copy() for piece in cache.extend(0, target[:-1], len(target) - 1)]
            cache.trim(0, len(prompt))
        logits, tokens = np.concatenate(parts), np.array(target)  # [T, V], [T]
        greedy = bool((logits.argmax(axis=-1) == tokens).all())
        results.append((float(log_probabilities(logits, tokens).sum()), greedy))
    return results
