"""Drawing the next word of many rows at once, by the rule of `compute.draw`.

The native kernel passes three times over a row and sorts nothing but a few words around the cut. Sums of weights are exact, so both
backends, and every number of threads, draw the same word.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from headrace.compute.draw import EXACT_MAX, draw, sharpness, weigh
from headrace.compute.ops.backend import isa_of, native

Logits = NDArray[np.float32]
"""[words]."""


class Choice(NamedTuple):
    """How a row's word is drawn; the filters are explained in `compute.draw`."""

    temperature: float
    """0: the largest logit, of equals the first."""
    u: float = 0.0
    """In [0, 1)."""
    top_k: int = 0
    """0: all."""
    top_p: float = 1.0
    min_p: float = 0.0


def choose(
    rows: Sequence[Logits], choices: Sequence[Choice], *, threads: int, backend: str | None = None
) -> list[int]:
    """The word that each choice picks in its row.

    Args:
        rows: logits, f32 [words], contiguous, all of one length. -inf: never drawn.
        choices: of each row.
        threads: how many threads may run; the result does not depend on it.
        backend: see `ops.backend`. More words than sums are exact for are always left to numpy.

    Returns:
        By row. If its largest logit is not finite (NaN, +inf, or all are -inf), that logit's index.

    Raises:
        ValueError: shapes, dtypes or strides do not fit, or a choice is none: u outside [0, 1), a temperature below 0.
    """
    if len(rows) != len(choices):
        raise ValueError(f"{len(choices)} choices for {len(rows)} rows")
    for row, choice in zip(rows, choices, strict=True):
        if row.dtype != np.float32 or row.shape != rows[0].shape or row.ndim != 1 or not row.size:
            raise ValueError(f"logits must be float32 [words], not {row.dtype}{list(row.shape)}")
        if not row.flags.c_contiguous:
            raise ValueError("each row of logits must be contiguous")
        filters = choice.top_k >= 0 and choice.top_p >= 0 and 0 <= choice.min_p <= 1
        if not (0 <= choice.u < 1 and choice.temperature >= 0 and filters):
            raise ValueError(f"no word can be drawn by {choice}")
    isa = isa_of(backend, torch.float32)
    if isa is None or not rows or rows[0].size > EXACT_MAX:
        return [_choose(row, choice) for row, choice in zip(rows, choices, strict=True)]
    temperatures, u, top_k, top_p, min_p = zip(*choices, strict=True)
    factors = [sharpness(t) if t else 0 for t in temperatures]
    columns = (
        np.array([row.ctypes.data for row in rows], dtype=np.uintp),
        np.array(factors, dtype=np.float32),
        np.array(min_p, dtype=np.float32),
        np.array(top_p, dtype=np.float64),
        np.array(u, dtype=np.float64),
        np.array([min(k, rows[0].size) for k in top_k], dtype=np.int32),
    )
    chosen = np.empty(len(rows), dtype=np.int32)
    native.choose(
        isa,
        *(column.ctypes.data for column in columns),
        len(rows),
        rows[0].size,
        chosen.ctypes.data,
        threads,
    )
    return chosen.tolist()


def _choose(row: Logits, choice: Choice) -> int:
    """One row, by numpy: the reference, and the slow path."""
    best = int(row.argmax())
    if choice.temperature == 0 or choice.top_k == 1 or not np.isfinite(row[best]):
        return best
    weights = weigh(row, row[best], sharpness(choice.temperature))
    return draw(weights, choice.u, top_k=choice.top_k, top_p=choice.top_p, min_p=choice.min_p)
