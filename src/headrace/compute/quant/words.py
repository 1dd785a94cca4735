"""Codes of 1 to 8 bits as checkpoints keep them: in 32-bit words, the first code in the lowest bits.

Dense: code i begins at bit `bits * i` of the row, across words (compressed-tensors, GPTQ). Padded: a word holds `32 // bits` whole
codes, and what is left of it is 0 (compressed-tensors before it packed densely). For 1, 2, 4 and 8 bits both are the same.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

WORD = 32


def words_for(count: int, bits: int, *, dense: bool = True) -> int:
    """Words of a row of `count` codes."""
    return -(-count * bits // WORD) if dense else -(-count // (WORD // bits))


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """uint8 [rows, count], each below 2^bits -> int32 [rows, words], dense."""
    rows, count = codes.shape
    padded = F.pad(codes, (0, -count % WORD)).view(rows, -1, WORD)
    # Words are summed as int64: the topmost bit of a word is a sign in int32.
    words = torch.zeros(rows, padded.shape[1], bits, dtype=torch.int64)
    for i in range(WORD):
        word, shift = divmod(i * bits, WORD)
        code = padded[:, :, i].long()
        words[:, :, word] |= code << shift & 0xFFFFFFFF
        if shift + bits > WORD:
            words[:, :, word + 1] |= code >> (WORD - shift)
    words -= (words >> WORD - 1) << WORD
    return words.view(rows, -1)[:, : words_for(count, bits)].to(torch.int32).contiguous()


def unpack_words(words: Tensor, bits: int, count: int, *, dense: bool = True) -> Tensor:
    """int32 [rows, words] -> uint8 [rows, count]. Raises ValueError if so many codes take another number of words."""
    rows, width = words.shape
    if width != words_for(count, bits, dense=dense):
        raise ValueError(
            f"{count} codes of {bits} bits take {words_for(count, bits, dense=dense)} words, not {width}"
        )
    period, step = (
        (WORD, bits) if dense else (WORD // bits, 1)
    )  # codes and words after which the places repeat
    padded = F.pad(words, (0, -width % step)).view(rows, -1, step)
    codes = torch.empty(rows, padded.shape[1], period, dtype=torch.uint8)
    mask = (1 << bits) - 1
    for i in range(period):
        word, shift = divmod(i * bits, WORD)
        low = padded[:, :, word] >> shift & min(mask, (1 << WORD - shift) - 1)
        if shift + bits > WORD:
            low |= padded[:, :, word + 1] << (WORD - shift) & mask
        codes[:, :, i] = low
    return codes.view(rows, -1)[:, :count].contiguous()
