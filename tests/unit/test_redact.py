"""What a secret looks like, and what only looks so."""

from __future__ import annotations

import pytest

from weft.redact import redact

SECRET = "hunter2-Sesame"
KEY = "yAnz5TF+lXXJte14tji3zlMNq+hd2rYUIgJBgB3fBmk="


@pytest.mark.parametrize(
    "text",
    [
        f"etcd://root:{SECRET}@etcd1:2379",
        f'{{"password": "{SECRET}"}}',
        f'{{"labels": {{"DB_PASSWORD": "{SECRET} and more"}}}}',
        f"WEFT_STORE_PASSWORD={SECRET}",
        f"Authorization: Bearer {SECRET}",
        f'a nested one: {{\\"token\\": \\"{SECRET}\\"}}',
        f"--secret='{SECRET}'",
        f"api-key: {SECRET}",
        f"Authorization: Token {SECRET}",
        f"Authorization: Digest a={SECRET}, b={SECRET}",
        f"--store-password {SECRET}",
        f"http://user:p@{SECRET}@proxy",
        f"http://u:a/{SECRET}@h/",
        f"SWMTKN-1-{SECRET}",
        f"http_proxy=http://me:{SECRET}@proxy:3128/",
        f"-----BEGIN PRIVATE KEY-----\n{SECRET}\n-----END PRIVATE KEY-----",
        f"-----BEGIN PRIVATE KEY-----\\n{SECRET}",
    ],
)
def test_a_secret_is_taken_out_by_what_it_looks_like(text: str) -> None:
    assert SECRET not in redact(text)
    assert "***" in redact(text)


@pytest.mark.parametrize(
    "text",
    [
        "store_password_file: /etc/weft/password",
        '"password_file": "/etc/weft/password"',
        "etcd://etcd1:2379,etcd2:2379",
        "the WireGuard key of this host was replaced",
        "user@host",
        "--store-password-file /etc/weft/password",
        '{"name": "app", "hosts": ["h1"]}',
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text


def test_a_known_secret_is_taken_out_wherever_it_is() -> None:
    assert redact(f"it said {SECRET}!", [f"{SECRET}\n", ""]) == "it said ***!"


def test_keys_are_told_apart_without_being_shown() -> None:
    other = KEY.replace("yAn", "zAn")
    shown = redact(f"{KEY} {other} {KEY}", keys=True).split("> ")
    assert KEY not in " ".join(shown)
    assert shown[0] + ">" == shown[2] != shown[1] + ">"
    assert redact(KEY) == KEY  # a public one is no secret: a log may show it
