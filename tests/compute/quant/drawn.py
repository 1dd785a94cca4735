"""Random quantized weights."""

import torch

from headrace.compute.quant import Format, QuantizedWeight


def draw_weight(
    name: str,
    out: int,
    features_in: int,
    *,
    group: int = -1,
    zeros: bool = False,
    order: bool = False,
    scale_dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> QuantizedWeight:
    """Codes are uniform over those of the format that are finite numbers."""
    form = Format.named(name)
    generator = torch.Generator().manual_seed(seed)
    allowed = form.values().isfinite().nonzero().flatten().to(torch.uint8)
    codes = allowed[torch.randint(len(allowed), (out, features_in), generator=generator)]
    groups = 1 if group == -1 else features_in // group
    scales = (0.5 + torch.rand(out, groups, generator=generator)).to(scale_dtype)
    points = (
        torch.randint(2**form.bits, (out, groups), generator=generator).to(torch.uint8) if zeros else None
    )
    permutation = torch.randperm(features_in, generator=generator).int() if order else None
    return QuantizedWeight(form, codes, scales, group, points, permutation)
