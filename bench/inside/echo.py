"""A UDP ping-pong: `serve PORT`, or `ask ADDRESS PORT COUNT`, which prints the nanoseconds of each round trip."""

import gc
import json
import socket
import struct
import sys
from time import perf_counter_ns
from typing import NoReturn

_WARM_UP = 500
_TIMEOUT = struct.pack("ll", 2, 0)


def serve(port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("", port))
        answer(server)


def answer(server: socket.socket) -> NoReturn:
    buffer = bytearray(64)
    receive, send = server.recvfrom_into, server.sendto
    while True:
        size, client = receive(buffer)
        send(buffer[:size], client)


def ask(address: str, port: int, count: int) -> list[int]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        # Python's own timeouts would cost a poll() per packet.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEOUT)
        client.connect((address, port))
        return [_trip(client) for _ in range(_WARM_UP + count)][_WARM_UP:]


def _trip(client: socket.socket) -> int:
    began = perf_counter_ns()
    client.send(b"0123456789abcdef")
    client.recv(64)
    return perf_counter_ns() - began


if __name__ == "__main__":
    gc.disable()
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]))
    else:
        print(json.dumps(ask(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
