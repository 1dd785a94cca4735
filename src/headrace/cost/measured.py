"""Step and transfer times from what `headrace profile` measured on a live engine. See docs/costs.md."""

from collections.abc import Sequence
from math import prod
from statistics import median

import msgspec
import numpy as np

from headrace.cost.arithmetic import shape_of
from headrace.cost.curve import Ramp, bucket, buckets
from headrace.cost.fit import Array, columns, fit_relative, summary
from headrace.cost.shape import ModelShape
from headrace.types.costs import DecodeCost
from headrace.types.errors import ConfigError
from headrace.types.profile import Profile, StepSample

PS = 1e12
REMEMBERED_MAX = 1 << 16
NOTHING = DecodeCost(0, 0, 2**62)
TOKEN_KNOTS = (4, 16, 64, 256, 1024)
"""Tokens of a step at which the time per token may change: a linear layer turns from its weights' bytes to arithmetic."""
CONTEXT_KNOTS = (1 << 9, 1 << 11, 1 << 13, 1 << 15)
"""Tokens of context after which reading may get cheaper (first ones: caches miss, threads wake)."""
LEAST = 128
"""Tokens as which a row's context may count at least."""


class _Terms(msgspec.Struct, frozen=True):
    """What the constants belong to. Every term grows with tokens, rows and contexts, so with constants >= 0 the time does."""

    shape: ModelShape
    tokens: tuple[int, ...]
    contexts: tuple[int, ...]

    def linear(self, tokens: int, emitting: int) -> list[float]:
        """Outside attention."""
        bends: list[float] = []
        for knot in self.tokens:
            bends += [min(tokens, knot), max(tokens - knot, 0)]
        return [1.0, tokens, emitting, *bends]

    def chunks(self, chunks: Sequence[tuple[int, int]]) -> list[float]:
        """Attention of prefill chunks."""
        flops = sum(self.shape.attention_flops(tokens, before) for tokens, before in chunks)
        return [flops, sum(tokens + before for tokens, before in chunks)]

    def ramps(self) -> list[tuple[tuple[int, Ramp], ...]]:
        """Attention of decodes: each term as (KV elements, ramp over tokens) for each window that the model has."""
        kept: dict[int, int] = {}
        for layer in self.shape.layers:
            if layer.attention:
                window = layer.attention.window
                kept[window] = kept.get(window, 0) + layer.count * layer.attention.kv_elements
        kinds = [{}, {"least": LEAST}, *({"first": knot} for knot in self.contexts)]
        return [
            tuple((elements, Ramp(1, window=window, **kind)) for window, elements in sorted(kept.items()))
            for kind in kinds
        ]

    def decodes(self, rows: int, context: int) -> list[float]:
        return [
            float(sum(elements * ramp.tokens(rows, context) for elements, ramp in term)) if rows else 0.0
            for term in self.ramps()
        ]

    def of(self, sample: StepSample) -> list[float]:
        tokens = sample.decodes + sum(chunk for chunk, _ in sample.prefills)
        return [
            *self.linear(tokens, sample.decodes + len(sample.prefills)),
            *self.chunks(sample.prefills),
            *self.decodes(sample.decodes, sample.context),
        ]


class Measured:
    """`types.costs.Costs` of one worker, fitted to a profile: constants >= 0, least squares on relative error of medians.

    `step_ps` includes the engine's own time between two steps. Raises ConfigError if the profile has too few steps.
    """

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.shape = shape_of(profile.config)
        steps = [s for s in profile.steps if s.seconds and (s.prefills or s.decodes)]
        if len(steps) < 4 or any(min(s.seconds) <= 0 for s in steps):
            raise ConfigError(
                f"the profile of {profile.model} has {len(steps)} usable steps; at least 4 with positive seconds "
                "are needed: run headrace profile again"
            )
        self._steps = steps
        most = max(s.decodes + sum(chunk for chunk, _ in s.prefills) for s in steps)
        widest = max(s.context for s in steps)
        self._terms = _Terms(
            self.shape,
            tokens=tuple(knot for knot in TOKEN_KNOTS if 2 * knot <= most),
            contexts=tuple(knot for knot in CONTEXT_KNOTS if 4 * knot <= widest),
        )
        self._features = columns([self._terms.of(sample) for sample in steps])
        self._seconds = columns([[median(sample.seconds)] for sample in steps])[:, 0]
        constants = fit_relative(self._features, self._seconds)
        first, second = len(self._terms.linear(0, 0)), len(self._terms.chunks(()))
        self._linear = constants[:first]
        flop, key = (float(constant) for constant in constants[first : first + second])
        self._key_ps = key * PS
        self._attention = tuple(
            (layer.attention, layer.count * layer.attention.pair_flops * flop * PS)
            for layer in self.shape.layers
            if layer.attention
        )
        self._ramps = tuple(
            Ramp(ps, ramp.window, ramp.least, ramp.first)
            for constant, term in zip(constants[first + second :], self._terms.ramps(), strict=True)
            for elements, ramp in term
            if (ps := round(float(constant) * elements * PS))
        )
        self._copy = self._fit_copies()
        self._slowdowns = self._pairs()
        self._remembered: dict[tuple[int, int], int] = {}
        self._attend: dict[int, tuple[DecodeCost, ...]] = {}
        self._decode: dict[int, tuple[DecodeCost, ...]] = {}

    def decode(self, rows: int, context: int) -> DecodeCost:
        costs = self._decode.get(rows)
        if costs is None:
            if rows < 1:
                return NOTHING
            costs = self._decode[rows] = buckets(self._ramps, rows, self._linear_ps(rows, rows))
        return bucket(costs, context)

    def step_ps(self, prefills: Sequence[tuple[int, int]], rows: int, context: int) -> int:
        if not prefills:
            cost = self.decode(rows, context)
            return cost.fixed_ps + cost.slope_ps * context
        tokens, ps = rows, 0
        for chunk, before in prefills:
            tokens += chunk
            attend = (chunk + before) * self._key_ps
            for attention, pair_ps in self._attention:
                attend += attention.pairs(chunk, before) * pair_ps
            ps += round(attend)
        ps += self._linear_ps(tokens, rows + len(prefills))
        if rows:
            costs = self._attend.get(rows)
            if costs is None:
                costs = self._attend[rows] = buckets(self._ramps, rows, 0)
            cost = bucket(costs, context)
            ps += cost.fixed_ps + cost.slope_ps * context
        return ps

    def transfer_ns(self, nbytes: int) -> int:
        """As one write; see `copy_ns`."""
        return self.copy_ns(nbytes, 1)

    def copy_ns(self, nbytes: int, writes: int) -> int:
        """Of that many bytes in that many pieces. Raises ConfigError if the profile has no copies."""
        if self._copy is None:
            raise ConfigError(
                f"the profile of {self.profile.model} has no copies, so a transfer's time is not known: run "
                "headrace profile with two workers"
            )
        start, byte, write = self._copy
        return round((start + nbytes * byte + writes * write) * 1e9)

    @property
    def message_ns(self) -> int:
        """From one process's core to another's, one way."""
        return round(self.profile.message_s * 1e9)

    @property
    def request_overhead_ns(self) -> int:
        """Of a request, outside its steps: tokenizing, submitting and the way back."""
        return round(self.profile.request_overhead_s * 1e9)

    def slowdown(self, kind: str, beside: tuple[str, ...]) -> float:
        """How many times longer a step of `kind` takes while other workers of its host run steps of the kinds `beside`.

        The product over them, each at least 1; a pair that was not measured counts as 1.
        """
        return prod(self._slowdowns.get((kind, other), 1.0) for other in beside)

    def errors(self) -> dict[str, dict[str, float]]:
        """Relative errors of step times: in sample, and held out (each sample predicted by a fit to the others).

        Keys: "in_sample", "held_out", and the latter for "prefill", "decode" and "mixed" steps; values as in `fit.summary`.
        """
        inside = self._features @ fit_relative(self._features, self._seconds)
        outside = np.zeros(len(self._seconds))
        for index in range(len(outside)):
            others = np.arange(len(outside)) != index
            outside[index] = self._features[index] @ fit_relative(
                self._features[others], self._seconds[others]
            )
        kinds = np.array([_kind(sample) for sample in self._steps])
        found = {
            "in_sample": summary(inside, self._seconds),
            "held_out": summary(outside, self._seconds),
        }
        for kind in ("prefill", "decode", "mixed"):
            if (kinds == kind).any():
                found[kind] = summary(outside[kinds == kind], self._seconds[kinds == kind])
        return found

    def _linear_ps(self, tokens: int, emitting: int) -> int:
        key = (tokens, emitting)
        found = self._remembered.get(key)
        if found is None:
            if len(self._remembered) >= REMEMBERED_MAX:
                self._remembered.clear()
            terms = self._terms.linear(tokens, emitting)
            seconds = sum(float(c) * term for c, term in zip(self._linear, terms, strict=True))
            found = self._remembered[key] = round((seconds + self.profile.step_overhead_s) * PS)
        return found

    def _fit_copies(self) -> tuple[float, float, float] | None:
        """Seconds at start, per byte, per write."""
        copies = [copy for copy in self.profile.copies if copy.seconds and min(copy.seconds) > 0]
        if not copies:
            return None
        features = columns([[1.0, copy.nbytes, copy.writes] for copy in copies])
        seconds: Array = columns([[median(copy.seconds)] for copy in copies])[:, 0]
        start, byte, write = fit_relative(features, seconds)
        return float(start), float(byte), float(write)

    def _pairs(self) -> dict[tuple[str, str], float]:
        """Median slowdown of each pair of kinds, at least 1."""
        found: dict[tuple[str, str], list[float]] = {}
        for pair in self.profile.pairs:
            found.setdefault((pair.kind, pair.beside), []).append(pair.slowdown)
        return {pair: max(1.0, median(values)) for pair, values in found.items()}


def _kind(sample: StepSample) -> str:
    if not sample.prefills:
        return "decode"
    return "mixed" if sample.decodes else "prefill"
