"""This host's WireGuard key: made here, kept here, shown to nobody.

X25519 comes from PyNaCl, that is libsodium: the `wg` tool need not be installed, wireguard-go does not tell the public
key of a private one, and Python's own library cannot compute it. (`cryptography` could as well, at three times the
size; constant-time arithmetic is nothing to write oneself.)
"""

from __future__ import annotations

import base64
import os
from pathlib import Path
from time import time

from nacl import public

from weft.errors import ConfigError

_BYTES = 32


class PrivateKey:
    """Equal to nothing but itself, and no `repr` or `str` of it tells anything."""

    def __init__(self, secret: bytes) -> None:
        self._key = public.PrivateKey(secret)

    @classmethod
    def generate(cls) -> PrivateKey:
        return cls(os.urandom(_BYTES))

    @property
    def public(self) -> str:
        """In base64, as WireGuard's tools write it."""
        return base64.b64encode(bytes(self._key.public_key)).decode()

    @property
    def secret(self) -> bytes:
        return bytes(self._key)

    def __repr__(self) -> str:
        return "PrivateKey(***)"


class KeyFile:
    """The file that keeps the key over a restart, readable by root alone."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> PrivateKey | None:
        """The key; None if there is none yet. `ConfigError` if the file holds something else."""
        try:
            return PrivateKey(base64.b64decode(self._path.read_bytes(), validate=True))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigError(f"{self._path} cannot be read: {error.strerror}") from error
        except Exception:  # what it holds may be a secret: neither the text nor the cause is for a log
            raise ConfigError(
                f"{self._path} holds no WireGuard key: delete it, and this host makes a new one"
            ) from None

    def write(self, key: PrivateKey) -> None:
        """Replace the key: whenever the power fails, the file holds the old one or the new one."""
        fresh = self._path.with_name(f"{self._path.name}.new")
        try:
            fresh.unlink(missing_ok=True)
            with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(base64.b64encode(key.secret))
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(self._path)
        except OSError as error:
            raise ConfigError(f"{self._path} cannot be written: {error.strerror}") from error

    def age(self) -> float:
        """Seconds since the key was made; 0 if there is none. By the wall clock, for it must outlive a reboot."""
        try:
            return max(0.0, time() - self._path.stat().st_mtime)
        except OSError:
            return 0.0
