"""API keys of clients: made, hashed, and compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Sequence

from aligner_middleware.serve.problems import Problem
from aligner_middleware.serve.settings import KeySettings


def new_key() -> tuple[str, str]:
    """Make a key of 256 random bits; give it and its SHA-256, which is all that is stored."""
    key = "alk-" + secrets.token_urlsafe(32)
    return key, hash_key(key)


def hash_key(key: str) -> str:
    """Hash a key. A fast hash is enough: the keys are random, and cannot be guessed from a list."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def find_key(keys: Sequence[KeySettings], header: str | None) -> KeySettings:
    """Find the key of a request; every hash is compared, whichever fits.

    Args:
        keys: The known keys.
        header: The request's `Authorization`, "Bearer …".

    Raises:
        Problem: 401, if there is none or it is unknown.
    """
    scheme, _, key = (header or "").partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise Problem(401, "expected an API key in the header 'Authorization: Bearer …'", code="missing_api_key")
    hashed = hash_key(key.strip())
    found = [known for known in keys if hmac.compare_digest(known.sha256, hashed)]
    if not found:
        raise Problem(401, "the API key is unknown to this service", code="invalid_api_key")
    return found[0]
