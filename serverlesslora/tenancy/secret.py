"""What an API key looks like, and how it is recognised without being kept.

`sk-slora-<id>-<secret>`: the id is public and finds the row; the secret is 256 random bits and is never stored. What is
stored is SHA-256 over a salt and the whole key. A slow hash (argon2, scrypt) would buy nothing here: it makes guessing
expensive where people choose passwords, and nobody guesses 256 random bits however fast the hash is. It would only cost
every request milliseconds. The salt belongs to one key, so the digests of two files say nothing about each other.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from typing import NamedTuple

PREFIX = "sk-slora-"
SALT_BYTES = 16

_SHAPE = re.compile(PREFIX + r"([0-9a-f]{16})-[A-Za-z0-9_-]{43}", re.ASCII)


class Stored(NamedTuple):
    """What is kept of a key."""

    salt: bytes
    digest: bytes


# Compared with when no key has the id, so that an unknown id takes as long as a wrong secret. Nothing has this digest.
NOBODY = Stored(bytes(SALT_BYTES), bytes(32))


class NewSecret(NamedTuple):
    id: str
    text: str  # the whole key; shown once
    stored: Stored


def new_secret() -> NewSecret:
    key_id = secrets.token_hex(8)
    text = f"{PREFIX}{key_id}-{secrets.token_urlsafe(32)}"
    salt = secrets.token_bytes(SALT_BYTES)
    return NewSecret(key_id, text, Stored(salt, _digest(text, salt)))


def id_of(text: str) -> str | None:
    """The public part; None when the text is no key at all."""
    found = _SHAPE.fullmatch(text)
    return found[1] if found else None


def is_the_one(text: str, stored: Stored) -> bool:
    """Takes the same time wherever the difference lies."""
    return hmac.compare_digest(_digest(text, stored.salt), stored.digest)


def _digest(text: str, salt: bytes) -> bytes:
    return hashlib.sha256(salt + text.encode()).digest()
