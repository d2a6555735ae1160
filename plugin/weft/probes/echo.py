"""Probes as frames inside a tunnel: how they are made and read (pure).

A probe is an IPv4 packet in an Ethernet frame: ICMP with its checksum ready, or TCP or UDP with the checksum left to
the network card, as a container's is. The three differ where a card, or a hypervisor behind it, breaks what it
computes. Behind those headers come ours and a body that follows from the probe's number, so that whoever receives it
sees each wrong bit. No address is that of anything, for no IP stack ever has to deliver it.

Nothing here is secret, and all of it may be forged: what does not parse to the last bit is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from random import Random
from struct import Struct, error
from zlib import crc32

NONCE_BYTES = 8
SMALL_SIZE = 128
ETHERNET_BYTES = 14

_IP_BYTES = 20
_MAGIC = b"weft\x00\x01"
_ETHERTYPE = b"\x08\x00"
_DONT_FRAGMENT = 0x4000
_ADDRESS = bytes((192, 0, 0, 8))
"""The IPv4 dummy address (RFC 7600), which belongs to nobody."""
_ECHO_PORT = 7
_IP = Struct("!BBHHHBBH4s4s")
_PORTS = Struct("!HH")
_HEADER = Struct(f"!6sBBHH{NONCE_BYTES}s5H")
_CRC = Struct("!I")
_CHECKSUM = Struct("!H")


class Purpose(IntEnum):
    SMALL = 1
    FULL = 2
    """Of the size that the network's MTU allows."""
    OFFLOADED = 3
    LADDER = 4
    """Of some size between, to find the largest that passes."""
    REPORT = 5
    """Only an answer: what has been received."""


class Protocol(IntEnum):
    ICMP = 1
    TCP = 6
    UDP = 17


_LENGTHS = {Protocol.ICMP: 8, Protocol.TCP: 20, Protocol.UDP: 8}
_CHECKSUM_AT = {Protocol.ICMP: 2, Protocol.TCP: 16, Protocol.UDP: 6}


@dataclass(frozen=True, slots=True)
class Counts:
    """In a question: how many probes of each purpose there are. In an answer: how many have been received.

    :param corrupt: how many arrived otherwise than they were sent.
    :param largest: size of the largest one.
    """

    small: int = 0
    full: int = 0
    offloaded: int = 0
    corrupt: int = 0
    largest: int = 0


@dataclass(frozen=True, slots=True)
class Probe:
    """
    :param answer: it is one, to the probe of the same number.
    :param size: length of the IP packet.
    :param nonce: tells one measurement from all others.
    """

    answer: bool
    purpose: Purpose
    nonce: bytes
    number: int
    size: int
    counts: Counts
    protocol: Protocol = Protocol.ICMP


@dataclass(frozen=True, slots=True)
class Arrival:
    """A probe that came from `source`, a MAC; `intact` if nothing about it is wrong."""

    source: bytes
    probe: Probe
    intact: bool


def checksum_place(protocol: Protocol) -> tuple[int, int]:
    """Where the part begins that a checksum left to the card covers, and where in it that goes; zeros if none is."""
    if protocol is Protocol.ICMP:
        return 0, 0
    return ETHERNET_BYTES + _IP_BYTES, _CHECKSUM_AT[protocol]


def encode(probe: Probe, source: bytes, destination: bytes) -> bytes:
    """The frame from one MAC to another."""
    header = _header(probe)
    body = _body(probe, probe.size - _IP_BYTES - _LENGTHS[probe.protocol] - len(header))
    packet = _transport(probe, header + body)
    return destination + source + _ETHERTYPE + _ip_header(probe) + packet


def decode(frame: bytes, *, pending: bool) -> Arrival | None:
    """The probe in a frame; None if it is no probe, or so damaged that it cannot be told which.

    :param pending: the checksum is not filled in, since the packet has met no network card.
    """
    try:
        version, _, length, _, _, _, number, _, _, _ = _IP.unpack_from(frame, ETHERNET_BYTES)
        protocol = Protocol(number)
        start = ETHERNET_BYTES + _IP_BYTES + _LENGTHS[protocol]
        magic, answer, purpose, sequence, size, nonce, *counts = _HEADER.unpack_from(frame, start)
        (crc,) = _CRC.unpack_from(frame, start + _HEADER.size)
        if crc != crc32(frame[start : start + _HEADER.size]):
            return None
        probe = Probe(bool(answer), Purpose(purpose), nonce, sequence, size, Counts(*counts), protocol)
    except (ValueError, IndexError, error):
        return None
    right = magic == _MAGIC and version == 0x45 and frame[12:14] == _ETHERTYPE
    if not right or answer > 1 or length != size or size != len(frame) - ETHERNET_BYTES or size < SMALL_SIZE:
        return None
    return Arrival(frame[6:12], probe, _is_intact(frame, probe, start, pending))


def _is_intact(frame: bytes, probe: Probe, start: int, pending: bool) -> bool:
    head = frame[ETHERNET_BYTES : ETHERNET_BYTES + _IP_BYTES]
    packet = frame[ETHERNET_BYTES + _IP_BYTES :]
    body = frame[start + _HEADER.size + _CRC.size :]
    wrong = _sum(head) or body != _body(probe, len(body))
    return not (wrong or (not pending and _sum(_pseudo_header(probe) + packet)))


def _header(probe: Probe) -> bytes:
    counts = probe.counts
    header = _HEADER.pack(
        _MAGIC,
        probe.answer,
        probe.purpose,
        probe.number,
        probe.size,
        probe.nonce,
        counts.small,
        counts.full,
        counts.offloaded,
        counts.corrupt,
        counts.largest,
    )
    return header + _CRC.pack(crc32(header))


def _body(probe: Probe, length: int) -> bytes:
    return Random(probe.nonce + probe.number.to_bytes(2, "big")).randbytes(length)


def _ip_header(probe: Probe) -> bytes:
    fields = (0x45, 0, probe.size, 0, _DONT_FRAGMENT, 64, probe.protocol)
    checksum = 0xFFFF - _sum(_IP.pack(*fields, 0, _ADDRESS, _ADDRESS))
    return _IP.pack(*fields, checksum, _ADDRESS, _ADDRESS)


def _transport(probe: Probe, payload: bytes) -> bytes:
    length = _LENGTHS[probe.protocol]
    # Another port each time: to a card, and to the kernel when it receives, each probe is a flow of its own.
    head = bytearray(_PORTS.pack(0xC000 | crc32(payload) & 0x3FFF, _ECHO_PORT).ljust(length, b"\0"))
    match probe.protocol:
        case Protocol.ICMP:
            head[:4] = b"\x08\x00\x00\x00"
        case Protocol.TCP:
            head[12:14] = b"\x50\x10"  # five words of header; an acknowledgement
        case Protocol.UDP:
            head[4:6] = _CHECKSUM.pack(length + len(payload))
    at = _CHECKSUM_AT[probe.protocol]
    ready = probe.protocol is Protocol.ICMP  # else the card adds the rest
    head[at : at + 2] = _CHECKSUM.pack(0xFFFF - _sum(bytes(head) + payload) if ready else _sum(_pseudo_header(probe)))
    return bytes(head) + payload


def _pseudo_header(probe: Probe) -> bytes:
    """What a checksum covers besides the packet (RFC 9293, 3.1)."""
    if probe.protocol is Protocol.ICMP:
        return b""
    return _ADDRESS + _ADDRESS + bytes((0, probe.protocol)) + _CHECKSUM.pack(probe.size - _IP_BYTES)


def _sum(data: bytes) -> int:
    """The ones' complement sum of 16-bit words, 0 for both of its zeros."""
    return int.from_bytes(data + bytes(len(data) % 2), "big") % 0xFFFF
