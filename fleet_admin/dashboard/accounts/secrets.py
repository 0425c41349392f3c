"""Secrets: passwords hashed slowly (argon2id), random keys and cookies by their SHA-256."""

import hashlib
import hmac
import secrets
from threading import BoundedSemaphore
from typing import Final

from argon2 import PasswordHasher
from argon2.exceptions import Argon2Error, InvalidHashError

from fleet_admin.dashboard.errors import AccountError

LEAST_PASSWORD: Final = 12
"""Characters of a password, at least: whoever steals the hashes may try for long."""

_MOST_PASSWORD: Final = 256
_RANDOM_BYTES: Final = 32
_AT_ONCE: Final = 2

KEY_PREFIX: Final = "fleet_"
"""What a key begins with, so that scanners of repositories can find one that was committed."""


class Passwords:
    """Hashes and checks passwords, two at once: a check takes some 0.2 s of a core and 64 MiB.

    Args:
        hasher: argon2id, with its costs.
    """

    def __init__(self, hasher: PasswordHasher | None = None) -> None:
        self._hasher = hasher or PasswordHasher()
        self._places = BoundedSemaphore(_AT_ONCE)
        # Checked where there is no such account, so that the time of an answer does not tell which names there are.
        self._nobody = self._hasher.hash(new_token())

    def hash(self, password: str, *, account: str) -> str:
        """Return the hash of a new password.

        Raises:
            AccountError: It is too short, too long, or the account's name.
        """
        if not LEAST_PASSWORD <= len(password) <= _MOST_PASSWORD:
            raise AccountError(
                f"A password has {LEAST_PASSWORD} to {_MOST_PASSWORD} characters, this one {len(password):,}."
            )
        if password.casefold() in {account.casefold(), account.casefold()[::-1]} or len(set(password)) == 1:
            raise AccountError("A password is not the account's name, nor one character repeated; take another.")
        with self._places:
            return self._hasher.hash(password)

    def check(self, password: str, known: str | None) -> bool:
        """Return whether a password is the one of a hash; takes as long where there is none."""
        try:
            with self._places:
                self._hasher.verify(known or self._nobody, password[: _MOST_PASSWORD + 1])
        except (Argon2Error, InvalidHashError):
            return False
        return known is not None


def new_token() -> str:
    """Return 256 random bits, as text for a cookie."""
    return secrets.token_urlsafe(_RANDOM_BYTES)


def new_key() -> str:
    return KEY_PREFIX + new_token()


def fingerprint(secret: str) -> str:
    """Return what is kept of a random secret. Looked up by equality: its beginnings tell nothing of the secret."""
    return hashlib.sha256(secret.encode("utf-8", "replace")).hexdigest()


def browser_token(nonce: str, *, password: str) -> str:
    """Return what a browser keeps that has logged in: only who knows the hash of the account's password can make it."""
    mac = hmac.new(password.encode(), f"browser {nonce}".encode("utf-8", "replace"), hashlib.sha256).hexdigest()
    return f"{nonce}.{mac}"


def csrf_token(cookie: str) -> str:
    """Return what forms of a browser carry that has this cookie: no other page can know it."""
    return hmac.new(cookie.encode("utf-8", "replace"), b"form", hashlib.sha256).hexdigest()
