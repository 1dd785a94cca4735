"""What happens to rows between projections, each in one pass: norms, gates, and heads turned on their way to attention.

Values are rounded to the rows' dtype wherever torch, doing one operation after the other, rounds them, so both backends
agree but for the order of a norm's sum. A row's result depends on that row alone; the native kernels keep it to the bit.
"""

from typing import Literal

import torch
from torch import Tensor

from headrace.compute.ops import reference
from headrace.compute.ops.attention import check_index, check_pool, place_of
from headrace.compute.ops.backend import isa_of, native

Activation = Literal["silu", "gelu_pytorch_tanh"]
"""As config.json names them."""


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    delta: Tensor | None = None,
    threads: int,
    backend: str | None = None,
) -> Tensor:
    """Root mean square norm (Zhang & Sennrich 2019, arXiv:1910.07467) of a residual stream, after adding to it.

    Args:
        x: [tokens, dim], f32, bf16 or f16, contiguous. Becomes x + delta, in place, where there is one.
        weight: [dim] in x's dtype.
        eps: added to the mean of squares.
        delta: as x.
        threads: how many threads may run; the result does not depend on it.
        backend: see `ops.backend`.

    Returns:
        [tokens, dim] in x's dtype: x / rms(x) * weight; the root in f32, rounded before the weight, as in transformers.

    Raises:
        ValueError: shapes, dtypes or strides do not fit.
    """
    if x.dim() != 2 or not x.is_contiguous():
        raise ValueError(f"x must be contiguous [tokens, dim], not {list(x.shape)}")
    _check_like("weight", weight, x.dtype, (x.shape[1],))
    if delta is not None:
        _check_like("delta", delta, x.dtype, tuple(x.shape))
    isa = isa_of(backend, x.dtype)
    if isa is None:
        if delta is not None:
            x.add_(delta)
        return reference.rms_norm(x, weight, eps)
    out = torch.empty_like(x)
    native.norm(
        isa,
        x.dtype == torch.bfloat16,
        x.data_ptr(),
        0 if delta is None else delta.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        *x.shape,
        eps,
        threads,
    )
    return out


def gated(x: Tensor, activation: Activation, *, threads: int, backend: str | None = None) -> Tensor:
    """activation(gate) * up (Shazeer 2020, arXiv:2002.05202) of rows that hold gate and then up.

    Args:
        x: [tokens, 2 * width], f32, bf16 or f16, contiguous.
        activation: on the gate. gelu is the tanh formula; torch's exact one depends on the size of the tensor.
        threads: how many threads may run; the result does not depend on it.
        backend: see `ops.backend`.

    Returns:
        [tokens, width] in x's dtype.

    Raises:
        ValueError: shapes or strides do not fit, or the activation is unknown.
    """
    if x.dim() != 2 or x.shape[1] % 2 or not x.is_contiguous():
        raise ValueError(f"x must be contiguous [tokens, 2 * width], not {list(x.shape)}")
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is unknown; known: {', '.join(reference.ACTIVATIONS)}")
    isa = isa_of(backend, x.dtype)
    if isa is None:
        return reference.gated(x, activation)
    rows, width = x.shape[0], x.shape[1] // 2
    out = torch.empty(rows, width, dtype=x.dtype)
    native.gate(
        isa,
        x.dtype == torch.bfloat16,
        x.data_ptr(),
        out.data_ptr(),
        rows,
        width,
        activation == "gelu_pytorch_tanh",
        threads,
    )
    return out


def turn_and_write(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    kv: Tensor,
    layer: int,
    blocks: Tensor,
    offsets: Tensor,
    *,
    weight: Tensor | None = None,
    eps: float = 0.0,
    threads: int,
    backend: str | None = None,
) -> Tensor:
    """Normalise the heads of Q and K, turn them by their tokens' angles, and write K and V into the pool.

    Rotary embedding (Su et al. 2021, arXiv:2104.09864): a head's halves a, b become a * cos - b * sin, b * cos + a * sin.

    Args:
        qkv: [tokens, heads + 2 * kv_heads, dim], f32, bf16 or f16, contiguous: all of Q, then K, then V. Q is overwritten.
        cos, sin: [tokens, dim / 2] in qkv's dtype, contiguous.
        kv: the pool, as for `paged_attention`.
        layer: index of the layer inside the group.
        blocks, offsets: int32 [tokens], contiguous: block of each token, and its slot there.
        weight, eps: of the norm of each head of Q and K: [heads + kv_heads, dim] in qkv's dtype; None: there is no norm.
        threads, backend: as for `rms_norm`; the native kernels take dims up to 256.

    Returns:
        Q: [tokens, heads, dim], a view of qkv.

    Raises:
        ValueError: shapes, dtypes or strides do not fit, or a block or slot does not exist.
    """
    tokens, heads, dim = qkv.shape
    kv_heads = kv.shape[3]
    heads -= 2 * kv_heads
    check_pool(kv, layer, qkv.dtype, dim)
    if heads < 1 or dim % 2 or not qkv.is_contiguous():
        raise ValueError(f"qkv {list(qkv.shape)} does not hold Q, K and V for kv {list(kv.shape)}")
    for name, angles in (("cos", cos), ("sin", sin)):
        _check_like(name, angles, qkv.dtype, (tokens, dim // 2))
    check_index("blocks", blocks, (tokens,))
    check_index("offsets", offsets, (tokens,))
    if weight is not None:
        _check_like("weight", weight, qkv.dtype, (heads + kv_heads, dim))
    isa = isa_of(backend, qkv.dtype)
    if isa is None or dim > native.DIM_MAX:
        if backend not in (None, "torch"):
            raise ValueError(f"the native kernels have no dim {dim}")
        return reference.turn_and_write(qkv, cos, sin, kv, layer, blocks, offsets, weight=weight, eps=eps)
    native.turn(
        isa,
        qkv.dtype == torch.bfloat16,
        qkv.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        0 if weight is None else weight.data_ptr(),
        eps,
        *place_of(kv, layer, 1),
        blocks.data_ptr(),
        offsets.data_ptr(),
        tokens,
        heads,
        kv_heads,
        dim,
        kv.shape[0],
        kv.shape[4],
        threads,
    )
    return qkv[:, :heads]


def _check_like(name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if x.dtype != dtype or x.shape != shape or not x.is_contiguous():
        raise ValueError(f"{name} must be contiguous {dtype}{list(shape)}, not {x.dtype}{list(x.shape)}")
