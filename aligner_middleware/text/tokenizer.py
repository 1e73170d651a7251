"""Text to token ids and back, with the aligner's own tokenizer.

Everything that a user or an upstream model writes is text, even where it spells `<|im_end|>` or `<s>`: `encode` never gives a
special token. Only a prompt template (`template.py`) may place one, by its id.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers.decoders import DecodeStream

from aligner_middleware.errors import ArtifactError
from aligner_middleware.text.byte_level import byte_level_encoder, identical, joined

_LARGEST = 2**28  # bytes; the largest in use have some 30 MB
_SAMPLE = "The quick brown fox jumps over 13 lazy dogs."  # every tokenizer of a language model can write this

_LONG = 4096  # characters; so long a text is encoded as a batch of one, which lets other threads run meanwhile


class Tokenizer:
    """A `tokenizer.json` whose special tokens cannot be reached from text.

    Args:
        description: The text of a `tokenizer.json` file.
        tiktoken: Whether tiktoken, which is faster, may encode: it was found to give the same ids.
        path: The file that it is from, for messages.

    Attributes:
        special: Ids of its special tokens.
        bos_ids: The tokens that it puts before a text by itself.
        largest_id: The largest id that it gives for text.

    Raises:
        ArtifactError: If the description is not a tokenizer.
    """

    def __init__(self, description: str, *, tiktoken: bool = False, path: str | Path = "tokenizer.json") -> None:
        try:
            self._full = Backend.from_str(description)
            plain = _without_special_tokens(json.loads(description))
            self._plain = Backend.from_str(json.dumps(plain))
            for backend in (self._full, self._plain):  # a saved tokenizer may carry its training length
                backend.no_truncation()
                backend.no_padding()
            added = self._full.get_added_tokens_decoder().items()
            self.special: dict[str, int] = {token.content: id for id, token in added if token.special}
            self.bos_ids: list[int] = self._bos_ids()
            self.largest_id = _largest_id(plain)
            encoder = byte_level_encoder(plain, self._by_tokenizers) if tiktoken else None
            self._encode = encoder or self._by_tokenizers
            self._written = self.decode(self.encode(_SAMPLE))
        except BaseException as exc:  # the backend raises bare `Exception`, and panics that are not even that
            if isinstance(exc, KeyboardInterrupt | SystemExit | GeneratorExit | MemoryError):
                raise
            raise ArtifactError(f"{path} is not a tokenizer: {str(exc)[:300]}") from exc

    @classmethod
    def from_file(cls, path: Path, *, tiktoken: bool = False) -> Tokenizer:
        """Read a `tokenizer.json` file.

        Raises:
            ArtifactError: If it cannot be read, is not a tokenizer, or cannot write plain text.
        """
        try:
            if path.stat().st_size > _LARGEST:
                raise ArtifactError(f"{path} has over {_LARGEST >> 20} MB: it is not a tokenizer")
            description = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as exc:
            raise ArtifactError(f"{path} cannot be read: {getattr(exc, 'strerror', None) or exc}") from exc
        tokenizer = cls(description, tiktoken=tiktoken, path=path)
        written = tokenizer._written
        if _letters(written) != _letters(_SAMPLE):
            raise ArtifactError(
                f"{path} cannot write text: its {tokenizer.vocab_size} tokens turn {_SAMPLE!r} into {written[:60]!r}"
            )
        return tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return int(self._full.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str) -> list[int]:
        """Encode text as plain text: the result holds no special token, whatever the text spells.

        Raises:
            UnicodeEncodeError: If it holds a lone surrogate.
        """
        text.encode()
        return self._encode(text) if text else []

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids to text, special tokens left out."""
        return str(self._full.decode(list(ids), skip_special_tokens=True))

    def decode_stream(self) -> TextStream:
        """Start to decode ids that are still arriving."""
        return TextStream(self, self._full)

    def _by_tokenizers(self, text: str) -> list[int]:
        if len(text) < _LONG:
            return list(self._plain.encode(text, add_special_tokens=False).ids)
        (encoded,) = self._plain.encode_batch_fast([text], add_special_tokens=False)
        return list(encoded.ids)

    def _bos_ids(self) -> list[int]:
        """The tokens that it puts before a text by itself (`[]` for most chat models)."""
        marked = self._full.encode("a", add_special_tokens=True)
        leading = []
        for id, special in zip(marked.ids, marked.special_tokens_mask, strict=True):
            if not special:
                break
            leading.append(id)
        return leading


def tiktoken_is_identical(description: str) -> bool:
    """Whether tiktoken gives the ids that a `tokenizer.json` asks for. It takes some seconds."""
    plain = _without_special_tokens(json.loads(description))
    reference = Tokenizer(description).encode
    encoder = byte_level_encoder(plain, reference)
    return encoder is not None and identical(plain, encoder, reference)


def _without_special_tokens(description: dict[str, Any]) -> dict[str, Any]:
    """Remove every rule by which text becomes a special token."""
    added = description.get("added_tokens") or []
    special = {token["content"] for token in added if token["special"]}
    model = dict(description["model"])
    if "merges" in model:  # sentencepiece vocabularies can merge '<' and 's>' into the control token '<s>'
        model["merges"] = [merge for merge in model["merges"] if joined(merge) not in special]
    if model.get("ignore_merges"):  # these look whole words up in the vocabulary first
        model["vocab"] = {piece: id for piece, id in model["vocab"].items() if piece not in special}
    if model.get("type") == "BPE" and model.get("unk_token") in special:
        model["unk_token"] = None  # bytes that the vocabulary lacks (SmolLM2: six control characters) are left out
    if model.get("type") == "Unigram":
        model["vocab"] = [[piece, -1e6 if piece in special else score] for piece, score in model["vocab"]]
    plain = [token for token in added if not token["special"]]
    return description | {"added_tokens": plain, "post_processor": None, "model": model}


def _largest_id(description: dict[str, Any]) -> int:
    """Find the largest id that text can become."""
    vocab = description["model"]["vocab"]
    ids = vocab.values() if isinstance(vocab, dict) else range(len(vocab))  # Unigram numbers a list
    return max((int(id) for id in [*ids, *(token["id"] for token in description["added_tokens"])]), default=-1)


def _letters(text: str) -> str:
    """Keep letters and digits, in lower case: some tokenizers change spaces and capitals."""
    return "".join(char for char in text.casefold() if char.isalnum())


class TextStream:
    """Text of ids as they arrive; the pieces joined are `Tokenizer.decode` of all of them.

    Characters that span several tokens are held back until they are whole.
    """

    def __init__(self, tokenizer: Tokenizer, backend: Backend) -> None:
        self._tokenizer = tokenizer
        self._backend = backend
        self._stream = DecodeStream(skip_special_tokens=True)
        self._seen: list[int] = []
        self._sent = 0

    def add(self, ids: Iterable[int]) -> str:
        """Take further ids, and give the text that is whole now."""
        pieces = []
        for token in ids:
            self._seen.append(token)
            pieces.append(self._stream.step(self._backend, token) or "")
        text = "".join(pieces)
        self._sent += len(text)
        return text

    def rest(self) -> str:
        """Give the text that was held back; to be called after the last id."""
        return self._tokenizer.decode(self._seen)[self._sent :]
