"""A model without its weights, and a model one layer at a time: for work on checkpoints that need not fit in memory."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from headrace.compute.checkpoint import Layer, Weights
from headrace.compute.layers.linear import Linear


class Outline(Weights):
    """Hands out tensors that have a shape and no memory: what is expected of a checkpoint is checked, and nothing is read."""

    def _claim(self, name: str, shape: tuple[int, ...]) -> Tensor:
        self.check(name, shape)
        self._left.remove(name)
        return torch.empty(shape, dtype=self.dtype, device="meta")

    def concat(self, parts: Any, *rest: int) -> Tensor:
        return torch.cat([self._claim(name, (rows, *rest)) for name, rows in parts])


class OneLayer(Weights):
    """Hands out layers as they are walked over: one is in memory, beside embedding, norm and head."""

    def layers(self, count: int, load: Callable[[int], Layer]) -> Iterable[Layer]:
        return _Walk(count, load)

    def finish(self) -> None:
        """Layers have taken nothing yet; an `Outline` finds what nobody takes."""


class _Walk(Iterable[Layer]):
    def __init__(self, count: int, load: Callable[[int], Layer]) -> None:
        self._count, self._load = count, load

    def __iter__(self) -> Iterator[Layer]:
        for index in range(self._count):
            yield self._load(index)


def with_linears(part: Any, change: Callable[[Linear], Any]) -> Any:
    """A layer, or a part of one, with `change(linear)` in place of every projection in it."""
    if isinstance(part, Linear):
        return change(part)
    held = {f.name: getattr(part, f.name) for f in fields(part)}
    changed = {name: with_linears(value, change) for name, value in held.items() if is_dataclass(value)}
    return replace(part, **changed)


def linears(layer: Any) -> list[Linear]:
    """The projections of a layer, in order."""
    found: list[Linear] = []

    def note(linear: Linear) -> Linear:
        found.append(linear)
        return linear

    with_linears(layer, note)
    return found
