"""The world outside of a lab, as far as names go: it knows `gateway.lab`, all else does not exist.

It runs in the switch, as a script. Without any answer the Engine lets containers wait for 5 seconds.
"""

import socket
import sys

_NAME = b"\x07gateway\x03lab\x00"
_TYPE_A = b"\x00\x01\x00\x01"
_ANSWER = b"\xc0\x0c" + _TYPE_A + b"\x00\x00\x00\x05\x00\x04"  # the name of the question, A, 5 s, 4 bytes


def reply(query: bytes, address: str) -> bytes:
    end = query.index(0, 12) + 1
    name, kind = query[12:end].lower(), query[end : end + 4]
    answers = [_ANSWER + socket.inet_aton(address)] if (name, kind) == (_NAME, _TYPE_A) else []
    flags = b"\x85\x80" if name == _NAME else b"\x85\x83"
    counts = b"\x00\x01" + bytes([0, len(answers)]) + bytes(4)
    return query[:2] + flags + counts + query[12 : end + 4] + b"".join(answers)


def serve(address: str) -> None:
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind((address, 53))
        while True:
            query, client = server.recvfrom(512)
            if len(query) > 16 and 0 in query[12:-4]:
                server.sendto(reply(query, address if "." in address else "192.0.2.1"), client)


if __name__ == "__main__":
    serve(sys.argv[1])
