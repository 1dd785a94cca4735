"""Device memory: what weights take, what is left for KV, and whether a model fits at all."""

from headrace.cost.hardware import Hardware
from headrace.cost.shape import ModelShape
from headrace.types.errors import ConfigError

GIB = 2**30


def memory_bytes_for_kv(
    shape: ModelShape,
    hardware: Hardware,
    tensor_parallel: int = 1,
    *,
    utilization: float = 0.9,
    tokens_max: int = 8192,
) -> int:
    """Bytes for KV of an instance, counted once: KV heads fewer than devices, and latents, are kept more than once and hold less.

    Per device: `utilization` of its memory, less its weights, what is reserved, and the activations of a step of `tokens_max` tokens.
    Negative if the weights alone do not fit. See `check_fits` for the error.
    """
    if not 0 < utilization <= 1:
        raise ConfigError(f"memory utilization is {utilization}, expected more than 0 and at most 1")
    left = int(hardware.memory_bytes * utilization) - _taken(shape, hardware, tensor_parallel, tokens_max)
    kept = sum(layer.count * layer.attention.kv_elements for layer in shape.layers if layer.attention)
    held = sum(
        layer.count
        * layer.attention.planes
        * layer.attention.head_dim
        * -(-layer.attention.kv_heads // tensor_parallel)
        for layer in shape.layers
        if layer.attention
    )
    return left * kept // held if held else left * tensor_parallel


def check_fits(
    shape: ModelShape,
    hardware: Hardware,
    tensor_parallel: int = 1,
    *,
    utilization: float = 0.9,
    tokens_max: int = 8192,
    context_tokens: int = 0,
    sequences: int = 1,
) -> None:
    """Raises ConfigError that says what is short and by how much, unless weights, activations, and the KV and state of `sequences`
    sequences of `context_tokens` tokens each fit."""
    left = memory_bytes_for_kv(
        shape, hardware, tensor_parallel, utilization=utilization, tokens_max=tokens_max
    )
    where = f"{tensor_parallel} x {hardware.name} ({hardware.memory_bytes / GIB:.1f} GiB each, {utilization:.0%} used)"
    taken = _taken(shape, hardware, tensor_parallel, tokens_max)
    weights = shape.device_weight_bytes(tensor_parallel)
    if left <= 0:
        short = (taken - hardware.memory_bytes * utilization) / GIB
        raise ConfigError(
            f"{shape.architecture} does not fit on {where}: {weights / GIB:.1f} GiB of weights and "
            f"{(taken - weights) / GIB:.1f} GiB of activations and reserve per device are {short:.1f} GiB more than "
            "there is. Use more devices (tensor_parallel), fewer bits per weight, or a larger device."
        )
    kept = sum(
        layer.count
        * layer.attention.kv_elements
        * 2
        * min(context_tokens, layer.attention.window or context_tokens)
        for layer in shape.layers
        if layer.attention
    )
    need = sequences * (kept + shape.state_bytes)
    if need > left:
        raise ConfigError(
            f"{shape.architecture} on {where} leaves {left / GIB:.2f} GiB for KV; {sequences} sequence(s) of "
            f"{context_tokens} tokens need {need / GIB:.2f} GiB, {(need - left) / GIB:.2f} GiB more. "
            "Use a shorter context, more devices (tensor_parallel), or a larger device."
        )


def _taken(shape: ModelShape, hardware: Hardware, tensor_parallel: int, tokens_max: int) -> int:
    """Of one device, bytes: weights, reserve, and the widest activations that live at once (16-bit)."""
    widest = max(matmul.outer for layer in shape.layers for matmul in layer.matmuls) // tensor_parallel
    activations = 2 * tokens_max * (4 * shape.hidden + 2 * widest)
    return shape.device_weight_bytes(tensor_parallel) + hardware.reserved_bytes + activations
