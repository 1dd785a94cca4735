import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headrace.compute.quant.words import pack_words, unpack_words, words_for
from tests.compute.quant import stored


@given(st.integers(1, 8), st.integers(1, 3), st.integers(1, 130), st.integers(0, 2**31))
def test_round_trip(bits, rows, count, seed):
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (rows, count))
    packed = pack_words(torch.from_numpy(codes).to(torch.uint8), bits)
    assert torch.equal(packed, stored.words(codes, bits))
    assert packed.shape[1] == words_for(count, bits)
    assert np.array_equal(unpack_words(packed, bits, count).numpy(), codes)
    padded = stored.words(codes, bits, dense=False)
    assert np.array_equal(unpack_words(padded, bits, count, dense=False).numpy(), codes)


def test_widths_that_divide_a_word_have_one_layout():
    for bits in (1, 2, 4, 8):
        codes = np.random.default_rng(bits).integers(0, 1 << bits, (3, 37))
        assert torch.equal(stored.words(codes, bits), stored.words(codes, bits, dense=False))


def test_another_number_of_words():
    with pytest.raises(ValueError, match="33 codes of 3 bits take 4 words, not 3"):
        unpack_words(torch.zeros(2, 3, dtype=torch.int32), 3, 33)
