"""Settings from the environment, and options of networks."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from weft.config import SETTINGS, from_environment, variable
from weft.errors import ConfigError, InvalidRequest
from weft.options import NetworkOptions, parse_endpoint_rate, parse_options, shown

PROJECT = Path(__file__).resolve().parents[2]


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
    ("text", "endpoints", "root"),
    [
        ("sqlite:///x@y/weft.db", (), "/weft/v1/"),
        ("etcd://a:2379", ("http://a:2379",), "/weft/v1/"),
        ("etcd://a:2379,10.0.0.1:2,a:2379/", ("http://a:2379", "http://10.0.0.1:2"), "/weft/v1/"),
        (
            "etcds://etcd-1.example:2379,[fd00::1]:2379/lab",
            ("https://etcd-1.example:2379", "https://[fd00::1]:2379"),
            "/lab/",
        ),
        ("etcd://a:2379/a/b/", ("http://a:2379",), "/a/b/"),
    ],
)
def test_addresses_of_etcd(text: str, endpoints: tuple[str, ...], root: str) -> None:
    settings = from_environment({"WEFT_STORE": text})
    assert settings.etcd_endpoints == endpoints
    assert settings.etcd_root == root


@pytest.mark.parametrize("text", ["10.0.0.0/8", "100.64.0.0/10", "192.168.7.0/24", "203.0.113.0/24"])
def test_wireguards_pool_is_chosen(text: str) -> None:
    assert str(from_environment({"WEFT_WG_POOL": text}).wg_pool) == text
    assert from_environment({}).wg_pool is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("10.0.0.0/25", "prefix length from 8 to 24"),
        ("0.0.0.0/0", "prefix length from 8 to 24"),
        ("10.0.0.1/16", "has host bits set"),
        ("fd00::/16", "4 octets"),
        ("127.0.0.0/16", "hosts can have"),
        ("169.254.0.0/16", "hosts can have"),
        ("239.0.0.0/16", "hosts can have"),
        ("0.0.0.0/8", "hosts can have"),
    ],
)
def test_a_pool_that_cannot_be_wireguards_is_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"WEFT_WG_POOL='{text}': .*{words}"):
        from_environment({"WEFT_WG_POOL": text})


@pytest.mark.parametrize("text", ["etcd://", "etcd://a", "etcd://a:2379,", "http://a:2379", "etcd:///a", "etcds://a:b"])
def test_a_bad_address_of_etcd_is_refused_with_the_right_form(text: str) -> None:
    with pytest.raises(ConfigError, match="must be sqlite:///path/to/file, etcd://host:port"):
        from_environment({"WEFT_STORE": text})


def test_a_password_in_the_address_is_refused_and_not_shown() -> None:
    with pytest.raises(ConfigError, match="WEFT_STORE_PASSWORD_FILE") as caught:
        from_environment({"WEFT_STORE": "etcd://weft:secret@a:2379"})
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"STORE": "etcd://a:1", "STORE_CA": "/ca"}, "STORE_CA, .* are for a WEFT_STORE that begins with etcds://"),
        ({"STORE": "etcds://a:1", "STORE_CERT": "/c"}, "WEFT_STORE_CERT and WEFT_STORE_KEY belong together"),
        ({"STORE": "etcd://a:1", "STORE_USER": "weft"}, "WEFT_STORE_USER and WEFT_STORE_PASSWORD_FILE belong together"),
        ({"STORE_USER": "weft", "STORE_PASSWORD_FILE": "/p"}, "WEFT_STORE_USER is for a WEFT_STORE that begins with"),
        ({"STORE": "etcds://a:1", "STORE_CA": "ca.pem"}, "WEFT_STORE_CA='ca.pem': must be an absolute path"),
    ],
)
def test_settings_of_the_store_that_contradict_each_other(environment: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        from_environment({f"WEFT_{name}": value for name, value in environment.items()})


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
        ("mirror", "yes"),
        ("scope", "swarm"),
        ("log", "loud"),
        ("gc_grace", "-1"),
        ("port", "0"),
        ("listen", "9789"),
        ("listen", ":9789"),
        ("listen", "host-a:9789"),
        ("listen", "127.0.0.1:0"),
        ("listen", "127.0.0.1:65536"),
        ("listen", "::1:9789"),
        ("listen", "[127.0.0.1]:9789"),
        ("listen_names", "http://host-a"),
    ],
)
def test_a_bad_value_is_named(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=f"WEFT_{name.upper()}="):
        from_environment({f"WEFT_{name.upper()}": text})


@pytest.mark.parametrize("text", ["127.0.0.1:9789", "0.0.0.0:80", "[::1]:9789"])
def test_where_to_listen(text: str) -> None:
    assert str(from_environment({"WEFT_LISTEN": text}).listen) == text
    assert from_environment({"WEFT_LISTEN": "off"}).listen is None


def test_names_to_listen_to() -> None:
    names = from_environment({"WEFT_LISTEN_NAMES": "Host-A.example.com, host-a"}).listen_names
    assert names == {"host-a.example.com", "host-a"}


def test_every_setting_says_what_it_means() -> None:
    assert all(setting.meaning for setting in SETTINGS.values())


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, NetworkOptions()),
        ({"weft.vni": "42", "mtu": "1400"}, NetworkOptions(vni=42, mtu=1400)),
        ({"weft.port": "4790", "ttl": "9"}, NetworkOptions(port=4790, ttl=9)),
        ({"source-ports": "40000-50000"}, NetworkOptions(source_ports="40000-50000")),
        ({"dscp": "inherit", "ifname": "app"}, NetworkOptions(dscp=-1, ifname="app")),
        ({"udp-checksum": "off", "multicast": "on"}, NetworkOptions(udp_checksum=False, multicast=-1)),
        ({"weft.multicast": "1mbit", "tx-checksum": "off"}, NetworkOptions(multicast=10**6, tx_checksum=False)),
        ({"weft.rate": "100mbit", "multicast": "off"}, NetworkOptions(rate=10**8, multicast=0)),
        ({"com.docker.network.driver.mtu": "1400"}, NetworkOptions(mtu=1400)),
        ({"com.docker.network.container_iface_prefix": "app"}, NetworkOptions(ifname="app")),
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
        ({"com.docker.network.bridge.enable_icc": "false"}, "is for Docker's bridge driver"),
        ({"vni": "0"}, "option vni=0: must be a number from 1 to 16777215"),
        ({"vni": "16777216"}, "must be a number"),
        ({"vni": "x"}, "must be a number"),
        ({"mtu": "100"}, "must be a number from 576"),
        ({"vni": "1", "weft.vni": "2"}, "given twice with different values"),
        ({"network": ""}, "must be the name or the VNI"),
        ({"port": "65536"}, "must be a number from 1 to 65535"),
        ({"weft.source-ports": "5000-4000"}, "option weft.source-ports=5000-4000: must be LOW-HIGH"),
        ({"source-ports": "5000"}, "must be LOW-HIGH"),
        ({"ttl": "0"}, "must be a number from 1 to 255"),
        ({"dscp": "64"}, "must be a number from 0 to 63"),
        ({"udp-checksum": "no"}, "must be on or off"),
        ({"multicast": "1"}, "option multicast=1: must be on, off, or a rate as tc writes it, from 64kbit to 32gbit"),
        ({"rate": "on"}, "option rate=on: must be off, or a rate as tc writes it"),
        ({"ifname": "1st"}, "must be a letter and up to 11"),
        ({"ifname": "averylongname"}, "must be a letter and up to 11"),
        ({"floating": "on", "weft.multicast": "off"}, "announced by multicast"),
        ({"colour": ""}, "weft.network, weft.encrypted, weft.port, weft.source-ports, weft.ttl"),
    ],
)
def test_bad_options_are_named(given: dict[str, str], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        parse_options(given)


@pytest.mark.parametrize(
    ("text", "rate", "again"),
    [
        ("100mbit", 100_000_000, "100mbit"),
        ("100m", 100_000_000, "100mbit"),
        ("64kbit", 64_000, "64kbit"),
        ("1.5Gbit", 1_500_000_000, "1500mbit"),
        ("12mbps", 96_000_000, "96mbit"),
        ("12.5MBps", 100_000_000, "100mbit"),
        ("1mibit", 1_048_576, "1048576bit"),
        ("100001", 100_000, "100kbit"),  # whole bytes
        ("32gbit", 32_000_000_000, "32gbit"),
        ("off", 0, "off"),
    ],
)
def test_rates_are_written_as_tc_does(text: str, rate: int, again: str) -> None:
    assert parse_options({"rate": text}) == NetworkOptions(rate=rate)
    assert parse_endpoint_rate({"weft.rate": text, "com.docker.network.portmap": []}) == rate
    assert shown("rate", rate) == again


@pytest.mark.parametrize(
    "text", ["", "mbit", "-1mbit", "1,5mbit", "100 mbit", "63kbit", "33gbit", "1e9", "1mbyte", "٣mbit", "9" * 5000]
)
def test_a_rate_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(
        InvalidRequest, match=r"option weft.rate=.*: must be off, or a rate as tc writes it, from 64kbit"
    ):
        parse_endpoint_rate({"weft.rate": text})


def test_options_of_a_container_are_weft_rate_and_what_others_know() -> None:
    assert parse_endpoint_rate({"com.docker.network.endpoint.exposedports": [], "org.example": "1"}) is None
    assert parse_endpoint_rate({"rate": "1mbit", "weft.rate": "1000kbit"}) == 10**6
    for unknown in ("weft.mtu", "speed"):
        with pytest.raises(InvalidRequest, match=f"unknown option '{unknown}' of a container: weft knows weft.rate"):
            parse_endpoint_rate({unknown: "1"})
    with pytest.raises(InvalidRequest, match="given twice"):
        parse_endpoint_rate({"rate": "1mbit", "weft.rate": "off"})
    with pytest.raises(InvalidRequest, match=r"only they may name its interface: leave it out, or .* weft\.ifname=app"):
        parse_endpoint_rate({"com.docker.network.endpoint.ifname": "net7"})


def test_the_managed_plugin_can_be_given_every_setting_but_its_places() -> None:
    """The engine decides where the socket is, and config.json's mounts where the run-time folder is."""
    listed = json.loads((PROJECT / "config.json").read_text())["env"]
    assert {one["name"]: one["description"] for one in listed} == {
        variable(name): setting.meaning for name, setting in SETTINGS.items() if name != "socket"
    }
    assert [one["name"] for one in listed if one.get("settable") != ["value"]] == ["WEFT_RUN"]


def test_the_managed_plugins_defaults_are_valid() -> None:
    listed = json.loads((PROJECT / "config.json").read_text())["env"]
    settings = from_environment({one["name"]: one["value"] for one in listed})
    assert settings.managed
    assert settings.mirrors
    assert settings.state == Path("/var/lib/weft")


def test_what_the_services_file_of_settings_suggests_is_valid() -> None:
    text = (PROJECT / "deploy/weft.env").read_text()
    suggested = dict(re.findall(r"^#?(WEFT_\w+)=(.*)$", text, re.MULTILINE))
    assert from_environment(suggested).underlay == "eth0"
    assert re.findall(r"^WEFT_\w+", text, re.MULTILINE) == ["WEFT_STORE"]


def test_scope_global_is_for_the_managed_plugin_and_ends_the_mirror() -> None:
    with pytest.raises(ConfigError, match="WEFT_SCOPE=global is for the managed plugin"):
        from_environment({"WEFT_SCOPE": "global"})
    assert not from_environment({"WEFT_SCOPE": "global", "WEFT_DRIVER": "weft:latest"}).mirrors
