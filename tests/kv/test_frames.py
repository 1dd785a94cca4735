"""A block on disk is served only if every bit of it is as it was written."""

import pytest

from headrace.kv.frames import HEADER_BYTES, MAGIC, Verdict, header, judge, verify
from headrace.types.ids import BlockHash

TERMS, NAME = bytes(range(16)), BlockHash(bytes(range(16, 32)))
PAYLOAD = bytes(i * 7 % 256 for i in range(1000))


def test_what_was_written_is_good():
    head = header(TERMS, NAME, PAYLOAD)
    assert len(head) == HEADER_BYTES and head.startswith(MAGIC)
    assert judge(head, len(PAYLOAD), TERMS, NAME) is Verdict.GOOD
    assert verify(head, memoryview(PAYLOAD), TERMS, NAME) is Verdict.GOOD


def test_any_changed_bit_is_noticed():
    whole = header(TERMS, NAME, PAYLOAD) + PAYLOAD
    for at in range(len(whole)):
        changed = bytearray(whole)
        changed[at] ^= 1 << at % 8
        head, payload = changed[:HEADER_BYTES], changed[HEADER_BYTES:]
        assert verify(head, payload, TERMS, NAME) is not Verdict.GOOD


@pytest.mark.parametrize(
    "size", [0, 1, 7, 8, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 1, HEADER_BYTES + 999]
)
def test_what_was_cut_short_is_noticed(size: int):
    whole = (header(TERMS, NAME, PAYLOAD) + PAYLOAD)[:size]
    verdict = verify(whole[:HEADER_BYTES], whole[HEADER_BYTES:], TERMS, NAME)
    assert verdict is (Verdict.TORN if size >= len(MAGIC) else Verdict.FOREIGN)


def test_another_model_or_block_is_other_and_another_kind_of_file_is_foreign():
    head = header(TERMS, NAME, PAYLOAD)
    assert judge(head, len(PAYLOAD), b"x" * 16, NAME) is Verdict.OTHER
    assert judge(head, len(PAYLOAD), TERMS, BlockHash(b"x" * 16)) is Verdict.OTHER
    assert judge(b"\x7fELF" + head[4:], len(PAYLOAD), TERMS, NAME) is Verdict.FOREIGN
    assert judge(b"", 0, TERMS, NAME) is Verdict.FOREIGN
