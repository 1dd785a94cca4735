import pytest
import torch

from headrace.compute import ops
from headrace.compute.layers.linear import Linear, Piece
from tests.compute.quant.drawn import draw_weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantized_and_plain_pieces_stand_side_by_side(dtype: torch.dtype) -> None:
    """As where a checkpoint quantizes what is stacked here in two ways, and leaves a third as it is."""
    generator = torch.Generator().manual_seed(0)
    parts = [
        draw_weight("uint4", 48, 96, group=32, zeros=True, order=True),
        torch.randn(20, 96, generator=generator).to(dtype),
        draw_weight("e2m1", 33, 96),
    ]
    biases = [
        torch.randn(48, generator=generator).to(dtype),
        torch.randn(20, generator=generator).to(dtype),
        None,
    ]
    pieces = tuple(Piece.ready(part, bias, dtype) for part, bias in zip(parts, biases, strict=True))
    if ops.describe(dtype)["invariant"]:
        kinds = [type(piece.weight) for piece in pieces]
        assert kinds == [ops.PackedLowBit, ops.PackedWeight, ops.PackedLowBit]  # nothing is widened
    x = torch.randn(9, 96, generator=generator).to(dtype)
    out = Linear(pieces, ())(x, 2)
    assert out.dtype == dtype and out.shape == (9, 101)
    dense = [part if isinstance(part, torch.Tensor) else part.dequantize() for part in parts]
    expected = torch.cat(
        [
            x.double() @ weight.double().T + (0 if bias is None else bias.double())
            for weight, bias in zip(dense, biases, strict=True)
        ],
        1,
    )
    torch.testing.assert_close(
        out.double(), expected, atol=0.02 if dtype != torch.float32 else 1e-3, rtol=0.02
    )
    for rows in (1, 3):
        assert not ops.describe(dtype)["invariant"] or torch.equal(
            Linear(pieces, ())(x[:rows], 1), out[:rows]
        )
