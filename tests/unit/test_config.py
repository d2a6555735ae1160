"""Settings from the environment, and options of networks."""

from __future__ import annotations

import pytest

from weft.config import SETTINGS, from_environment
from weft.errors import ConfigError, InvalidRequest
from weft.options import NetworkOptions, parse_options


def test_defaults_need_no_environment() -> None:
    settings = from_environment({"HOME": "/root"})
    assert settings.port == 4789
    assert str(settings.sqlite_path) == "/var/lib/weft/weft.db"


def test_all_problems_are_reported_together() -> None:
    with pytest.raises(ConfigError) as caught:
        from_environment({"WEFT_PORT": "99999", "WEFT_PORTT": "1", "WEFT_STORE": "redis://x", "WEFT_RESYNC": "soon"})
    message = str(caught.value)
    for part in ("WEFT_PORTT is not a setting", "WEFT_PORT='99999'", "WEFT_STORE='redis://x'", "WEFT_RESYNC='soon'"):
        assert part in message


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("pools", "10.0.0.0/8"),
        ("pools", "10.0.0.0/8:7"),
        ("pools", "10.0.0.0/8:31"),
        ("pools", "10.0.0.1/8:24"),
        ("pools", "10.0.0.0/8:24 10.1.0.0/16:24"),
        ("socket", "weft.sock"),
        ("docker", "/var/run/docker.sock"),
        ("log", "loud"),
        ("gc_grace", "-1"),
        ("port", "0"),
    ],
)
def test_a_bad_value_is_named(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=f"WEFT_{name.upper()}="):
        from_environment({f"WEFT_{name.upper()}": text})


def test_every_setting_says_what_it_means() -> None:
    assert all(setting.meaning for setting in SETTINGS.values())


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, NetworkOptions()),
        ({"weft.vni": "42", "mtu": "1400"}, NetworkOptions(vni=42, mtu=1400)),
        ({"com.docker.network.driver.mtu": "1400"}, NetworkOptions(mtu=1400)),
        ({"com.docker.network.advertise_addr_nmsgs": "3"}, NetworkOptions()),
        ({"network": "app", "weft.network": "app"}, NetworkOptions(network="app")),
    ],
)
def test_options(given: dict[str, str], expected: NetworkOptions) -> None:
    assert parse_options(given) == expected


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"foo": "bar"}, "unknown option 'foo': weft knows weft.vni, weft.mtu, weft.network"),
        ({"vni": "0"}, "option vni=0: must be a number from 1 to 16777215"),
        ({"vni": "16777216"}, "must be a number"),
        ({"vni": "x"}, "must be a number"),
        ({"mtu": "100"}, "must be a number from 576"),
        ({"vni": "1", "weft.vni": "2"}, "given twice with different values"),
        ({"network": ""}, "must be the name or the VNI"),
    ],
)
def test_bad_options_are_named(given: dict[str, str], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        parse_options(given)
