"""Which implementation an operation runs on: the native CPU kernels, or plain torch.

The native kernels keep the promise of docs/architecture.md, "What equal means": the bits of one row depend on that row
alone, whatever the batch, the chunking, the number of threads and the place of its KV. The promise holds within one
instruction set. The torch versions are the reference: correct to tolerance, and no more.

A backend is named by a string: ``"torch"``, ``"native"`` (the best instruction set of this CPU) or one instruction set
of `ISAS`. ``None`` means native where it is built and knows the dtype, else torch. ``HEADRACE_NATIVE=0`` in the
environment hides the extension from the whole process.
"""

import os
from importlib import import_module
from typing import Any

import torch

ISAS = ("baseline", "avx2", "avx512", "avx512_bf16")
"""Instruction sets in rising order; the index is the number that the extension knows one by. ``baseline`` is what every
CPU of the architecture has (x86-64: SSE2)."""

NATIVE_DTYPES = (torch.float32, torch.bfloat16)


def _load() -> Any:
    if os.environ.get("HEADRACE_NATIVE") == "0":
        return None
    try:
        return import_module("headrace.compute._native")
    except ModuleNotFoundError:
        return None


native: Any = _load()
"""The extension module, or None where it was not built (no C++ compiler) or is hidden."""


def isa_of(backend: str | None, dtype: torch.dtype) -> int | None:
    """Resolve a backend's name for tensors of `dtype`: an index into `ISAS`, or None for torch.

    Raises ValueError when the backend that was asked for is unknown, not built, or cannot run here.
    """
    if backend == "torch":
        return None
    if backend is None:
        return native.detect() if native is not None and dtype in NATIVE_DTYPES else None
    if native is None:
        raise ValueError(f"backend {backend!r} asked for, but the native extension is not built or is hidden")
    if dtype not in NATIVE_DTYPES:
        raise ValueError(f"the native kernels take float32 and bfloat16, not {dtype}")
    if backend == "native":
        return native.detect()
    if backend not in ISAS:
        raise ValueError(f"unknown backend {backend!r}; known: torch, native, {', '.join(ISAS)}")
    isa = ISAS.index(backend)
    if isa > native.detect():
        raise ValueError(f"this CPU has no {backend}; its best is {ISAS[native.detect()]}")
    return isa


def available() -> list[str]:
    """Names of every backend that can run in this process, best first; the last is always torch."""
    best = -1 if native is None else native.detect()
    return [*reversed(ISAS[: best + 1]), "torch"]


def describe(dtype: torch.dtype = torch.bfloat16, backend: str | None = None) -> dict[str, str | bool]:
    """Say what the operations run on for tensors of `dtype`.

    ``invariant`` tells whether attention and `fixed_linear` promise the same bits for a row in any batch.
    """
    isa = isa_of(backend, dtype)
    name = "torch" if isa is None else f"native {ISAS[isa]}"
    return {"attention": name, "linear": name, "invariant": isa is not None}
