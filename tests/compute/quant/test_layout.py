from math import prod

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from headrace.compute.quant.layout import Layout, avx512, triton

digits = st.lists(st.integers(1, 5), min_size=1, max_size=4)


def row_major(shape: list[int], order: list[int] | None = None) -> Layout:
    """Every offset once; `order`: digits from the slowest stride to the fastest."""
    strides = [0] * len(shape)
    step = 1
    for i in reversed(order or range(len(shape))):
        strides[i], step = step, step * shape[i]
    return Layout(tuple(shape), tuple(strides))


@st.composite
def bijections(draw: st.DrawFn, shape: list[int] | None = None) -> Layout:
    shape = shape or draw(digits)
    return row_major(shape, draw(st.permutations(range(len(shape)))))


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    shape = draw(digits)
    return Layout(tuple(shape), tuple(draw(st.integers(0, 12)) for _ in shape))


@given(layouts())
def test_indices_are_the_map(layout: Layout) -> None:
    offsets = layout.indices().tolist()
    assert offsets == [layout(i) for i in range(layout.size)]
    assert layout.coalesced().indices().tolist() == offsets


@given(bijections(), layouts())
@settings(max_examples=300)
def test_composition_is_one_map_after_the_other(outer: Layout, inner: Layout) -> None:
    """Or is refused; and what is refused for no carry or cut would reach outside."""
    try:
        both = outer.compose(inner)
    except ValueError:
        return
    assert both.indices().tolist() == [outer(inner(i)) for i in range(inner.size)]


@given(bijections(), st.data())
def test_composition_with_digits_of_the_outer_always_works(outer: Layout, data: st.DataObject) -> None:
    inner = row_major(list(outer.shape))
    picked = data.draw(st.lists(st.sampled_from(range(len(outer.shape))), unique=True))
    some = Layout(tuple(inner.shape[i] for i in picked), tuple(inner.strides[i] for i in picked))
    assert outer.compose(some).indices().tolist() == [outer(some(i)) for i in range(some.size)]


@given(bijections(), st.data())
def test_composition_is_associative(a: Layout, data: st.DataObject) -> None:
    b = data.draw(bijections(list(a.shape)))
    c = data.draw(bijections(list(a.shape)))
    try:
        left, right = a.compose(b).compose(c), a.compose(b.compose(c))
    except ValueError:
        assume(False)
        return
    assert torch.equal(left.indices(), right.indices())


@given(bijections())
def test_inverse(layout: Layout) -> None:
    back = layout.inverse()
    assert [back(layout(i)) for i in range(layout.size)] == list(range(layout.size))
    assert back.inverse().coalesced() == layout.coalesced()


@given(bijections(), st.data())
def test_complement_reaches_the_rest_once(whole: Layout, data: st.DataObject) -> None:
    picked = data.draw(st.lists(st.sampled_from(range(len(whole.shape))), unique=True))
    some = Layout(tuple(whole.shape[i] for i in picked), tuple(whole.strides[i] for i in picked))
    rest = some.complement(whole.size)
    assert sorted(rest.then(some).indices().tolist()) == list(range(whole.size))


@given(bijections(), st.integers(1, 4), st.integers(1, 4))
def test_divide(layout: Layout, n: int, step: int) -> None:
    try:
        over, inside = layout.divide(Layout((n,), (step,)))
    except ValueError:
        return
    assert inside.indices().tolist() == [layout(i * step) for i in range(n)]
    assert sorted(over.then(inside).indices().tolist()) == sorted(layout.indices().tolist())


def test_what_is_no_layout_is_refused() -> None:
    for shape, strides in [((2, 3), (1,)), ((0,), (1,)), ((2,), (-1,))]:
        with pytest.raises(ValueError, match="no layout"):
            Layout(shape, strides)
    with pytest.raises(ValueError, match="twice"):
        Layout((2, 2), (1, 1)).complement(4)
    with pytest.raises(ValueError, match="evenly"):
        Layout((3,), (1,)).complement(4)
    with pytest.raises(ValueError, match="evenly"):
        Layout((3,), (2,)).inverse()
    with pytest.raises(ValueError, match="leave"):
        Layout((4,), (1,)).compose(Layout((8,), (1,)))
    with pytest.raises(ValueError, match="carries"):
        Layout((2, 4), (1, 2)).compose(Layout((2, 2), (2, 2)))
    with pytest.raises(ValueError, match="cut"):
        Layout((2, 3), (1, 2)).compose(Layout((2,), (2,)))


@given(st.integers(1, 8), st.integers(1, 3), st.integers(1, 4), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_avx512_round_trip(bits: int, panels: int, tiles: int, seed: int) -> None:
    out, features_in = 64 * panels, 32 * tiles
    codes = torch.randint(2**bits, (out, features_in), generator=torch.Generator().manual_seed(seed)).to(
        torch.uint8
    )
    packing = avx512(out, features_in)
    words = packing.pack(codes, bits)
    assert words.dtype == torch.int16
    assert words.numel() * 16 == out * features_in * bits  # no bit is lost to padding
    assert torch.equal(packing.unpack(words, bits).view(out, features_in), codes)
    # What a lane of the kernel finds at its bits is what the layout promises, read here by hand.
    panel, tile, block, n, parity, j = (
        int(seed * prime % m)
        for prime, m in zip((3, 5, 7, 11, 13, 17), (panels, tiles, 4, 16, 2, 16), strict=True)
    )
    lane = words.view(panels, tiles, 4, bits, 16, 2)[panel, tile, block, :, n, parity]
    stream = sum((int(word) & 0xFFFF) << 16 * i for i, word in enumerate(lane))
    code = codes[panel * 64 + block * 16 + n, tile * 32 + 2 * j + parity]
    assert stream >> j * bits & 2**bits - 1 == code


@given(st.integers(1, 8), st.integers(1, 20), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_triton_round_trip(bits: int, out: int, blocks: int, repeat: int, seed: int) -> None:
    """Code j of all lanes is a slab of neighbouring rows of the dot operand."""
    count = {1: 32, 2: 16, 3: 32, 4: 8, 5: 32, 6: 16, 7: 32, 8: 4}[bits]
    block_in = count * repeat
    features_in = block_in * blocks
    codes = torch.randint(2**bits, (out, features_in), generator=torch.Generator().manual_seed(seed)).to(
        torch.uint8
    )
    packing = triton(out, features_in, block_in, bits)
    words = packing.pack(codes, bits)
    assert words.dtype == torch.int32 and words.shape == (blocks, count * bits // 32, repeat * out)
    assert torch.equal(packing.unpack(words, bits).view(out, features_in), codes)
    if 32 % bits == 0:
        operand = codes.T.reshape(blocks, count, repeat, out)
        for j in range(count):
            slab = words.view(blocks, repeat, out) >> bits * j & 2**bits - 1
            assert torch.equal(slab.to(torch.uint8), operand[:, j])


def test_views_that_do_not_fit_are_refused() -> None:
    packing = avx512(64, 32)
    assert all(packing.compatible(bits) for bits in range(1, 9))
    small = triton(4, 32, 32, 1)
    assert prod(small.codes.shape) == 32
    eight = triton(4, 32, 4, 8)
    assert eight.compatible(8) and not eight.compatible(3)
    with pytest.raises(ValueError, match="do not fill words"):
        eight.pack(torch.zeros(4, 32, dtype=torch.uint8), 3)
    with pytest.raises(ValueError, match="blocks of 12"):
        triton(4, 48, 12, 4)
    with pytest.raises(ValueError, match="do not divide"):
        triton(4, 48, 32, 4)
