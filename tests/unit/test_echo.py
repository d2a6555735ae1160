"""Frames of probes: read as they were made, and no wrong bit goes unnoticed."""

from __future__ import annotations

from struct import pack_into

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.probes.echo import (
    ETHERNET_BYTES,
    SMALL_SIZE,
    Arrival,
    Counts,
    Probe,
    Protocol,
    Purpose,
    checksum_place,
    decode,
    encode,
)

HERE, THERE = bytes.fromhex("020000000001"), bytes.fromhex("020000000002")
BITS = 8 * (ETHERNET_BYTES + SMALL_SIZE)

words = st.integers(0, 0xFFFF)
probes = st.builds(
    Probe,
    answer=st.booleans(),
    purpose=st.sampled_from(Purpose),
    nonce=st.binary(min_size=8, max_size=8),
    number=words,
    size=st.integers(SMALL_SIZE, 9000),
    counts=st.builds(Counts, words, words, words, words, words),
    protocol=st.sampled_from(Protocol),
)


def made(probe: Probe) -> bytes:
    """The frame as it is on a wire: what is left to the network card is done."""
    frame = bytearray(encode(probe, HERE, THERE))
    start, offset = checksum_place(probe.protocol)
    if start:
        pack_into("!H", frame, start + offset, 0xFFFF - int.from_bytes(frame[start:].ljust(10000, b"\0")) % 0xFFFF)
    return bytes(frame)


@given(probes)
def test_a_probe_is_read_as_it_was_made(probe: Probe) -> None:
    frame = made(probe)
    assert len(frame) == ETHERNET_BYTES + probe.size
    assert frame[:6] == THERE
    assert decode(frame, pending=False) == Arrival(HERE, probe, intact=True)


@given(probes.filter(lambda probe: probe.protocol is not Protocol.ICMP))
def test_a_checksum_that_is_still_the_cards_to_fill_in_is_wrong_only_if_it_should_be_there(probe: Probe) -> None:
    frame = encode(probe, HERE, THERE)
    assert decode(frame, pending=True) == Arrival(HERE, probe, intact=True)
    unfinished = decode(frame, pending=False)
    assert unfinished
    assert not unfinished.intact


@pytest.mark.parametrize("protocol", Protocol)
def test_each_bit_that_changes_on_the_way_is_noticed(protocol: Protocol) -> None:
    frame = made(Probe(False, Purpose.SMALL, bytes(8), 7, SMALL_SIZE, Counts(), protocol))
    for bit in range(8 * ETHERNET_BYTES, BITS):
        wrong = bytearray(frame)
        wrong[bit // 8] ^= 1 << bit % 8
        arrival = decode(bytes(wrong), pending=False)
        assert arrival is None or not arrival.intact, f"bit {bit}"


@given(st.binary(max_size=200))
def test_what_is_no_probe_is_left_out(frame: bytes) -> None:
    assert decode(frame, pending=False) is None


@given(probes, st.data())
def test_a_frame_that_is_cut_is_left_out(probe: Probe, data: st.DataObject) -> None:
    frame = made(probe)
    assert decode(frame[: data.draw(st.integers(0, len(frame) - 1))], pending=False) is None
    assert decode(frame + b"\0", pending=False) is None


def test_a_probe_of_another_version_is_left_out() -> None:
    frame = made(Probe(False, Purpose.SMALL, bytes(8), 1, SMALL_SIZE, Counts()))
    assert b"weft\0\1" in frame
    assert decode(frame.replace(b"weft\0\1", b"weft\0\2"), pending=False) is None
