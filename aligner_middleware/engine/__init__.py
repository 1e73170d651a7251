"""Token ids in, token ids out: prefill, draft verification and greedy decoding over a KV cache.

The engine knows arrays of ids; text, prompts and chat live above it. Shapes, in every comment of this package:

    B  sequences in a batch       T  tokens of this pass        S  tokens in the KV cache
    H  key/value heads            D  size of a head             P  positions asked for
"""

from aligner_middleware.engine.decode import Generation, decode
from aligner_middleware.engine.model import KVCache, Model

__all__ = ["Generation", "KVCache", "Model", "decode"]
