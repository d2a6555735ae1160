"""The page without a daemon: states of clusters that nobody has to start.

    python -m lab.sample [PORT]     serves them on loopback: http://127.0.0.1:8077/faulty/

Whoever works on the page sees it there as browsers get it.
"""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

from flask import Flask, Response
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.serving import BaseWSGIServer, make_server

from weft.web.page import Feed, create_page

State = dict[str, Any]

NOW = 1_764_100_000
"""Unix time at which all samples were taken."""

_HOSTILE = '<img src=x onerror="document.title=1">'
_HOSTS = ("ada", "grace", "hedy", "radia")
_NETWORKS = ("app", "shop", "billing", "metrics", "edge", "batch")
_CONTAINERS = ("web", "api", "worker", "cache", "db", "queue", "proxy", "cron")


def healthy(hosts: int = 3, networks: int = 5, *, seed: int = 7) -> State:
    """Nothing is wrong."""
    rng = random.Random(seed)
    names = _HOSTS[:hosts] if hosts <= len(_HOSTS) else [f"node-{n:03d}" for n in range(1, hosts + 1)]
    all_hosts = [_host(number, name) for number, name in enumerate(names, 1)]
    all_networks = [_network(number, all_hosts, rng) for number in range(networks)]
    for host in all_hosts:
        host["endpoints"] = sum(one["host"] == host["name"] for net in all_networks for one in net["endpoints"])
    return {
        "status": _status(all_hosts, all_networks),
        "hosts": all_hosts,
        "networks": all_networks,
        "links": list(_links(all_hosts, rng)),
        "findings": [],
        "events": list(_events(all_hosts)),
    }


def faulty() -> State:
    """A firewall drops what comes in, another way loses some large packets, and a clock is off."""
    state = healthy(4, 7)
    a, _, c, d = state["hosts"]
    for link in state["links"]:
        if (link["to"], link["kind"]) == (a["id"], "plain"):
            link.update(small=1.0, full=1.0, offloaded=1.0, mtu=None, rtt=None)
        elif {link["from"], link["to"]} == {c["id"], d["id"]}:
            link.update(full=0.12)
    state["findings"] = [
        _finding(
            "udp-port",
            "error",
            [a["name"]],
            "a packet filter of ada drops UDP port 4789, incoming",
            "nft table inet filter, chain input: udp dport 4789 drop; probes are lost",
            "nft insert rule inet filter input udp dport 4789 accept",
        ),
        _finding(
            "clock",
            "warning",
            [d["name"]],
            "the clock of radia is 42 s ahead of the others",
            "asked for its time, it told one that differs from that of 3 other hosts",
            "timedatectl set-ntp true",
        ),
    ]
    state["events"].insert(0, _event(99, "warning", "probes", "nothing that host grace sends to UDP port 4789 arrives"))
    return state


def empty() -> State:
    """One host, just started."""
    state = healthy(1, 0)
    state["events"] = state["events"][-1:]
    return state


def large() -> State:
    """A hundred hosts, two hundred networks, some of them in trouble."""
    state = healthy(100, 200)
    hosts = state["hosts"]
    for number in (16, 57):
        hosts[number]["alive"] = False
    for link in state["links"]:
        if hosts[41]["id"] in (link["from"], link["to"]):
            link.update(small=1.0, full=1.0, mtu=None, rtt=None)
    state["status"]["alive"] = 98
    state["findings"] = [
        _finding(
            "path",
            "error",
            [hosts[41]["name"]],
            "node-042 is cut off: the underlay does not carry packets between it and the other hosts",
            "neither probes nor pings pass between 192.0.2.42 and node-006, node-017, node-026, node-033, node-038, "
            "node-041 and 6 more; look at its routes, cable, VLAN and the firewalls up to it",
            "ip route",
        )
    ]
    return state


def hostile() -> State:
    """Every text that a user or a container can choose is HTML."""
    state = healthy()
    for host in state["hosts"]:
        host["name"] = f"{host['name']}{_HOSTILE}"
    for network in state["networks"]:
        network["name"] = f"{network['name']}{_HOSTILE}"
        for one in network["endpoints"]:
            one["host"] += _HOSTILE
            one["names"] = [f"{name}{_HOSTILE}" for name in one["names"]]
    state["status"]["host"]["name"] += _HOSTILE
    state["status"]["problems"] = [f"problem {_HOSTILE}"]
    state["findings"] = [_finding(_HOSTILE, "error", [state["hosts"][0]["name"]], _HOSTILE, _HOSTILE, _HOSTILE)]
    state["events"] = [_event(1, "info", _HOSTILE, f"event {_HOSTILE}")]
    return state


SAMPLES: dict[str, Callable[[], State]] = {
    "healthy": healthy,
    "faulty": faulty,
    "empty": empty,
    "large": large,
    "hostile": hostile,
}


def _host(number: int, name: str) -> State:
    return {
        "id": f"{number * 0x9E3779B97F4A7C15 % 2**128:032x}",
        "name": name,
        "underlay": f"192.0.2.{number}",
        "version": "0.1.0",
        "alive": True,
        "endpoints": 0,
    }


def _network(number: int, hosts: list[State], rng: random.Random) -> State:
    base = _NETWORKS[number % len(_NETWORKS)]
    name = base if number < len(_NETWORKS) else f"{base}-{number // len(_NETWORKS)}"
    vni = 4096 + 37 * number
    members = rng.sample(hosts, min(len(hosts), rng.choice((1, 2, 3, 3, 6))))
    if number == 0:
        members = hosts[:3]
    endpoints = [
        {
            "id": f"{vni * 1000 + place:x}".rjust(64, "e"),
            "network": name,
            "vni": vni,
            "host": host["name"],
            "addresses": [f"10.{64 + number // 256}.{number % 256}.{place + 2}"],
            "mac": f"02:42:0a:{64 + number // 256:02x}:{number % 256:02x}:{place + 2:02x}",
            "names": [f"{rng.choice(_CONTAINERS)}-{place + 1}", base],
        }
        for place, host in enumerate(host for host in members for _ in range(rng.randint(1, 4)))
    ]
    return {
        "name": name,
        "vni": vni,
        "subnets": [f"10.{64 + number // 256}.{number % 256}.0/24"],
        "mtu": 0,
        "fitting_mtu": 1370 if number % 3 == 1 else 1450,
        "other_mtu": {},
        "internal": number % 7 == 3,
        "creator": hosts[0]["id"],
        "retired": False,
        "encrypted": "active (kernel)" if number % 3 == 1 else "no",
        "endpoints": endpoints,
        "hosts": sorted(host["name"] for host in members),
        "unencryptable": [],
    }


def _links(hosts: list[State], rng: random.Random) -> Iterator[State]:
    """Of many hosts each probes a few."""
    for index, a in enumerate(hosts):
        for step in range(1, min(len(hosts), 7)):
            b = hosts[(index + step * step) % len(hosts)] if len(hosts) > 7 else hosts[(index + step) % len(hosts)]
            for kind, inner in (("plain", 1450), ("encrypted", 1370)) if len(hosts) <= 7 else (("plain", 1450),):
                yield {
                    "from": a["id"],
                    "to": b["id"],
                    "kind": kind,
                    "small": 0.0,
                    "full": 0.0,
                    "size": inner,
                    "mtu": inner,
                    "offloaded": 0.0,
                    "corrupt": 0,
                    "attested": True,
                    "rtt": rng.uniform(0.0003, 0.0007) + (0.0004 if kind == "encrypted" else 0),
                    "when": NOW - rng.randint(1, 30),
                }


def _status(hosts: list[State], networks: list[State]) -> State:
    me = hosts[0]
    return {
        "host": {**{key: me[key] for key in ("id", "name", "underlay", "version")}, "driver": "weft", "started": NOW},
        "store": {"origin": "etcds://192.0.2.10:2379", "problem": "", "seconds": 0.0031},
        "engine": {"problem": "", "version": "28.5.1"},
        "agent": {
            "synced": True,
            "resynced": NOW - 12,
            "seconds": 0.018,
            "repaired": 0,
            "links": 3 * len(networks),
            "rows": 9 * len(networks),
            "problem": "",
        },
        "encryption": "active (kernel)" if networks else "no encrypted network yet",
        "names": {"address": "169.254.77.53", "answers": True, "problem": ""},
        "hosts": len(hosts),
        "alive": len(hosts),
        "networks": len(networks),
        "endpoints": sum(len(network["endpoints"]) for network in networks),
        "problems": [],
    }


def _events(hosts: list[State]) -> Iterator[State]:
    texts = [
        ("info", "agent", "resynced in 18 ms: nothing to repair"),
        ("info", "names", "published web-1 on network app"),
        ("info", "driver", "endpoint 3f9a1c20b7d4 joined network shop, 3.1 ms"),
        ("warning", "store", "etcd member 192.0.2.12:2379 does not answer; 192.0.2.10:2379 does"),
        ("info", "mirror", "made network billing as host grace has it"),
        ("info", "encryption", "peer hedy: first handshake"),
        ("info", "agent", "2 endpoints of network edge appeared on host hedy"),
        ("info", "driver", "network edge has VNI 4244, made here"),
        ("info", "hosts", "host hedy is alive"),
        ("info", "main", f"weft 0.1.0 serves host {hosts[0]['name']} with VTEP {hosts[0]['underlay']}"),
    ]
    for number, (severity, source, text) in enumerate(texts):
        yield {**_event(40 - number, severity, source, text), "when": NOW - 37 * number}


def _event(number: int, severity: str, source: str, text: str) -> State:
    return {"id": number, "when": NOW, "severity": severity, "source": source, "text": text}


def _finding(check: str, severity: str, hosts: list[str], cause: str, evidence: str, command: str) -> State:
    return {
        "check": check,
        "severity": severity,
        "hosts": hosts,
        "cause": cause,
        "evidence": evidence,
        "command": command,
    }


def _app(state: State) -> Flask:
    app = Flask("sample", static_folder=None)
    feed = Feed({name: lambda part=part: part for name, part in state.items()})  # type: ignore[misc]
    app.register_blueprint(create_page(feed, lambda events: Response(events, mimetype="text/event-stream")))
    return app


def server(port: int = 0) -> BaseWSGIServer:
    """Each sample is under its name; `serve_forever()` is the caller's."""
    logging.getLogger("werkzeug").setLevel("WARNING")
    pages = DispatcherMiddleware(Flask("samples"), {f"/{name}": _app(make()) for name, make in SAMPLES.items()})
    return make_server("127.0.0.1", port, pages, threaded=True)


if __name__ == "__main__":
    served = server(int(sys.argv[1]) if len(sys.argv) > 1 else 8077)
    print("\n".join(f"http://127.0.0.1:{served.port}/{name}/" for name in SAMPLES))
    served.serve_forever()
