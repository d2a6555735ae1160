"""Takes secrets out of whatever leaves weft for other eyes: its log, the journal, the support bundle.

By what a secret looks like, and, where they are known, by the secrets themselves. It is a second line: nothing here is
a reason to log a key or a password.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from hashlib import sha256

GONE = "***"

_CREDENTIALS = re.compile(r"(?<=://)[^\s\"']*@")
"""User and password in a URL; a password may have a slash or another @, though it should not."""
_PEM = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)
_TOKENS = re.compile(r"\bSWMTKN-[\w-]+|\beyJ[\w-]{8,}\.[\w-]+\.[\w-]*")
"""Docker Swarm's join tokens; JSON web tokens."""
_AUTHORIZATION = re.compile(r"(?<=authorization:) *[^\s\"'][^\n\"']*", re.IGNORECASE)
"""Of a header, whatever its scheme."""
_NAME = r"[\w.-]*(?:passw(?:or)?d|secret|token|credential|authorization|(?:api|private|preshared)[\x20_-]?key)[\w.-]*"
_FLAG = re.compile(rf"(?<!\S)(?P<name>--{_NAME})(?P<between>\s+)(?P<value>[^\s-]\S*)", re.IGNORECASE)
_NAMED = re.compile(
    rf"""(?<![\w.-])(?P<name>{_NAME})
    (?P<between>\\?["']?\s*[=:]\s*)
    (?P<value>\\"(?:(?!\\").)*\\"|"(?:[^"\\]|\\.)*"|'[^']*'|[^\s"',;&}}\]]+)""",
    re.IGNORECASE | re.VERBOSE,
)
"""A name that says what it is, with its value, in JSON, a command line, a header or a configuration file."""
_KEY = re.compile(r"(?<![\w+/=-])[A-Za-z0-9+/]{43}=(?![\w+/=])")
"""WireGuard's, private or public, in base64."""


def redact(text: str, secrets: Iterable[str] = (), *, keys: bool = False) -> str:
    """The text without secrets.

    :param secrets: texts that are some.
    :param keys: also replace what may be a WireGuard key, by something that tells one from another.
    """
    for secret in filter(None, map(str.strip, secrets)):
        text = text.replace(secret, GONE)
    text = _PEM.sub(GONE, text)
    text = _CREDENTIALS.sub(f"{GONE}@", text)
    text = _TOKENS.sub(GONE, text)
    text = _AUTHORIZATION.sub(f" {GONE}", text)
    text = _FLAG.sub(_without_value, text)
    text = _NAMED.sub(_without_value, text)
    return _KEY.sub(lambda found: f"<key {sha256(found[0].encode()).hexdigest()[:8]}>", text) if keys else text


def _without_value(found: re.Match[str]) -> str:
    """A file's name is no secret."""
    if found["name"].lower().endswith("file"):
        return found[0]
    value = found["value"]
    quote = next((mark for mark in ('\\"', '"', "'") if value.startswith(mark)), "")
    return f"{found['name']}{found['between']}{quote}{GONE}{quote}"
