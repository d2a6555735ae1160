"""Asks a server for a name as fast as it can, without waiting for answers, until standard input ends.

A program of its own, run inside a container's network namespace.
"""

import select
import socket
import sys

import dns.message

_ROUND = 100
"""Questions between two looks at standard input."""


def main(server: str) -> None:
    wire = dns.message.make_query("flood", "A").to_wire()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        print("begins", flush=True)
        while not select.select([sys.stdin], [], [], 0)[0]:
            for _ in range(_ROUND):
                udp.sendto(wire, (server, 53))


if __name__ == "__main__":
    main(sys.argv[1])
