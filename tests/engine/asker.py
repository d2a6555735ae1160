"""Asks for names as a container's program does; a program of its own, run inside a container's network namespace.

Each line of standard input is an order in JSON: `name`, `kind`, `server`, `tcp`, and, to ask again every few
milliseconds, `until` ("answered" or "gone") with `patience` in seconds. Each line of output is what came of it: `code`,
`answers` in order, `truncated`, `took` seconds, and `at`, the monotonic time, the same for all processes.
"""

import json
import sys
import time
from typing import Any

import dns.exception
import dns.flags
import dns.message
import dns.query
import dns.rcode

_PAUSE = 0.004


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(follow(json.loads(line))), flush=True)


def follow(order: dict[str, Any]) -> dict[str, Any]:
    deadline = time.monotonic() + order["patience"]
    while True:
        found = ask(order)
        if order["until"] in ("", "answered" if found["answers"] else "gone") or time.monotonic() > deadline:
            return found
        time.sleep(_PAUSE)


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
