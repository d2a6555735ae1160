"""Asks for names as a container's program does; a program of its own, run inside a container's network namespace.

Each line of standard input is an order in JSON: `name`, `kind`, `server`, `tcp`, and, to ask again every few
milliseconds, `until` ("answered" or "gone") with `patience` in seconds. Each line of output is what came of it: `code`,
`answers` in order, `truncated`, `took` seconds, and `at`, the monotonic time, the same for all processes. If the order
has `wire`, hexadecimal bytes, just these are sent, and the line is what came back, "" for nothing.
"""

import json
import socket
import sys
import time
from contextlib import suppress
from typing import Any

import dns.exception
import dns.flags
import dns.message
import dns.query
import dns.rcode

_PAUSE = 0.004


def main() -> None:
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(send(order) if "wire" in order else follow(order)), flush=True)


def follow(order: dict[str, Any]) -> dict[str, Any]:
    deadline = time.monotonic() + order["patience"]
    while True:
        found = ask(order)
        if order["until"] in ("", "answered" if found["answers"] else "gone") or time.monotonic() > deadline:
            return found
        time.sleep(_PAUSE)


def send(order: dict[str, Any]) -> str:
    wire, place = bytes.fromhex(order["wire"]), (order["server"], 53)
    if order["tcp"]:
        with socket.create_connection(place, timeout=order["timeout"]) as tcp, suppress(OSError):
            tcp.sendall(len(wire).to_bytes(2, "big") + wire)
            with tcp.makefile("rb") as stream:
                return stream.read(int.from_bytes(stream.read(2), "big")).hex()
        return ""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp, suppress(OSError):
        udp.settimeout(order["timeout"])
        udp.connect(place)
        udp.send(wire)
        return udp.recv(0xFFFF).hex()
    return ""


def ask(order: dict[str, Any]) -> dict[str, Any]:
    query = dns.message.make_query(order["name"], order["kind"])
    send = dns.query.tcp if order["tcp"] else dns.query.udp
    began = time.monotonic()
    try:
        reply = send(query, order["server"], timeout=order["timeout"])
    except (dns.exception.Timeout, OSError, EOFError) as error:
        found: dict[str, Any] = {"code": type(error).__name__, "answers": [], "truncated": False}
    else:
        answers = [rdata.to_text() for rrset in reply.answer for rdata in rrset]
        truncated = bool(reply.flags & dns.flags.TC)
        found = {"code": dns.rcode.to_text(reply.rcode()), "answers": answers, "truncated": truncated}
    now = time.monotonic()
    return {**found, "took": now - began, "at": now}


if __name__ == "__main__":
    main()
