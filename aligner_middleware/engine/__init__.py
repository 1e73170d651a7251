"""Token ids in, token ids out: prefill, draft verification and greedy decoding over a KV cache.

The engine knows arrays of ids, and no text, prompts or chat. Shapes, in every comment of this package:

    B  sequences in a batch       T  tokens of this pass        S  tokens in the KV cache
    H  key/value heads            D  size of a head             P  positions to predict at
"""

from aligner_middleware.engine.decode import Decoder, decode
from aligner_middleware.engine.generation import Generation, Prefill, VerdictRule
from aligner_middleware.engine.model import KVCache, Model
from aligner_middleware.engine.sampling import GREEDY, Sampler

__all__ = ["GREEDY", "Decoder", "Generation", "KVCache", "Model", "Prefill", "Sampler", "VerdictRule", "decode"]
