"""Step and transfer times from a model's arithmetic and a device's constants. The formula and its errors: docs/costs.md."""

from collections.abc import Sequence

import msgspec

from headrace.cost.curve import Ramp, bucket, buckets
from headrace.cost.hardware import Hardware
from headrace.cost.shape import Attention, ModelShape
from headrace.types.costs import DecodeCost
from headrace.types.errors import ConfigError

PS = 1e12
REMEMBERED_MAX = 1 << 16
NOTHING = DecodeCost(0, 0, 2**62)


class _Chunks(msgspec.Struct, frozen=True):
    """Prefill attention of layers that are alike, on one device, picoseconds."""

    attention: Attention
    pair_ps: float
    query_ps: float
    key_ps: float
    head_ps: float

    def ps(self, tokens: int, context: int) -> int:
        seen = context + tokens
        if self.attention.window:
            seen = min(seen, self.attention.window + tokens)
        pairs = self.attention.pairs(tokens, context)
        return round(pairs * self.pair_ps + tokens * self.query_ps + seen * self.key_ps + self.head_ps)


class Roofline:
    """`types.costs.Costs` of one instance: `tensor_parallel` devices of one host that share a model.

    `kv_element_bytes`: of the cache's elements. Raises ConfigError if the heads cannot be divided, or a host has too few devices.
    """

    def __init__(
        self, shape: ModelShape, hardware: Hardware, tensor_parallel: int = 1, *, kv_element_bytes: int = 2
    ) -> None:
        check_parallel(shape, hardware, tensor_parallel)
        self.shape = shape
        self.hardware = hardware
        self.tensor_parallel = tensor_parallel
        self.kv_element_bytes = kv_element_bytes
        self._products = _products(shape, tensor_parallel)
        self._ramps, self._row_ps = self._decode_ramps()
        self._chunks = self._chunk_costs()
        attending = sum(layer.count for layer in shape.layers if layer.attention)
        decode, prefill = hardware.efficiency.decode, hardware.efficiency.prefill
        self._launch_ps = round(attending * decode.launch_s * PS)
        self._launch_chunks_ps = max(self._launch_ps, round(attending * prefill.launch_s * PS))
        self._longest_ps = attending * prefill.token_s * PS
        self._linear: dict[tuple[int, int], int] = {}
        self._attend: dict[int, tuple[DecodeCost, ...]] = {}
        self._decode: dict[int, tuple[DecodeCost, ...]] = {}

    def decode(self, rows: int, context: int) -> DecodeCost:
        costs = self._decode.get(rows)
        if costs is None:
            if rows < 1:
                return NOTHING
            fixed = self._linear_ps(rows, rows) + self._launch_ps
            costs = buckets(self._ramps, rows, fixed + rows * self._row_ps)
            self._decode[rows] = costs
        return bucket(costs, context)

    def step_ps(self, prefills: Sequence[tuple[int, int]], rows: int, context: int) -> int:
        if not prefills:
            cost = self.decode(rows, context)
            return cost.fixed_ps + cost.slope_ps * context
        tokens, longest, ps = rows, 0, self._launch_chunks_ps
        for chunk, before in prefills:
            tokens += chunk
            longest = max(longest, chunk)
            for layers in self._chunks:
                ps += layers.ps(chunk, before)
        ps += round(longest * self._longest_ps)
        if rows:
            costs = self._attend.get(rows)
            if costs is None:
                costs = self._attend[rows] = buckets(self._ramps, rows, rows * self._row_ps)
            cost = bucket(costs, context)
            ps += cost.fixed_ps + cost.slope_ps * context
        return ps + self._linear_ps(tokens, rows + len(prefills))

    def transfer_ns(self, nbytes: int) -> int:
        """Each device sends its share over its own NIC."""
        nic = self.hardware.nic
        return round((nic.latency_s + nbytes / (nic.bandwidth * self.tensor_parallel)) * 1e9)

    @property
    def message_ns(self) -> int:
        """From one host to another, one way."""
        return round(self.hardware.nic.latency_s * 1e9)

    def slowdown(self, kind: str, beside: tuple[str, ...]) -> float:
        """Instances have devices of their own: none."""
        return 1.0

    def _linear_ps(self, tokens: int, emitting: int) -> int:
        """Everything but attention: of a step with `tokens` tokens, of which `emitting` sequences give one."""
        key = (tokens, emitting)
        found = self._linear.get(key)
        if found is None:
            if len(self._linear) >= REMEMBERED_MAX:
                self._linear.clear()
            found = self._linear[key] = round(self._linear_s(tokens, emitting) * PS)
        return found

    def _linear_s(self, tokens: int, emitting: int) -> float:
        shape, hardware = self.shape, self.hardware
        seconds = sum(
            count * self._product_s(tokens, inner, outer, shape.weight_bits, shape.arithmetic)
            for inner, outer, count in self._products
        )
        head = shape.head.shard(self.tensor_parallel)
        seconds += self._product_s(emitting, *head, shape.plain_bits, "bf16")
        seconds += self._experts_s(tokens) + self._elementwise_s(tokens) + self._state_s(tokens, emitting)
        if self.tensor_parallel > 1:
            collective = hardware.all_reduce(self.tensor_parallel)
            layers = sum(layer.count for layer in shape.layers)
            seconds += 2 * layers * collective.seconds(shape.hidden_bytes(tokens))
        return seconds + hardware.host.step_s + emitting * hardware.host.row_s

    def _product_s(self, rows: float, inner: int, outer: int, bits: float, arithmetic: str) -> float:
        """`rows` tokens through one device's part of a matrix."""
        return self._roof_s(rows, inner, outer, inner * outer * bits / 8, arithmetic)

    def _roof_s(self, rows: float, inner: int, outer: int, weight_bytes: float, arithmetic: str) -> float:
        """See `hardware.Gemm`."""
        gemm, bandwidth = self.hardware.gemm(arithmetic), self.hardware.memory_bandwidth
        compute = 2.0 * rows * inner * outer / (self.hardware.rate(arithmetic) * gemm.compute)
        memory = (weight_bytes + 2.0 * rows * (inner + outer)) / (bandwidth * gemm.memory)
        p = gemm.sharpness
        inputs = gemm.inputs * 2.0 * rows * inner / bandwidth
        return gemm.launch_s + (compute**p + memory**p) ** (1.0 / p) + inputs

    def _experts_s(self, tokens: int) -> float:
        """Routed experts: the FLOPs of those chosen, the bytes of those expected to be hit, one launch for all of a layer's."""
        shape, seconds = self.shape, 0.0
        for layer in shape.layers:
            if experts := layer.experts:
                for matmul in experts.matmuls:
                    inner, outer = matmul.shard(self.tensor_parallel)
                    rows = tokens * experts.chosen
                    nbytes = experts.hit(tokens) * inner * outer * shape.weight_bits / 8
                    seconds += layer.count * self._roof_s(rows, inner, outer, nbytes, shape.arithmetic)
        return seconds

    def _elementwise_s(self, tokens: int) -> float:
        """Norms and additions pass over the hidden state 8 times; rotation and activation 1.5 times over what a product wrote."""
        elementwise = self.hardware.efficiency.elementwise
        elements, layers = 0.0, 0
        for layer in self.shape.layers:
            wrote = sum(m.outer for m in layer.matmuls if m.split == "outer")
            if layer.experts:
                wrote += layer.experts.chosen * sum(
                    m.outer for m in layer.experts.matmuls if m.split == "outer"
                )
            elements += layer.count * (8 * self.shape.hidden + 1.5 * wrote / self.tensor_parallel)
            layers += layer.count
        passed = 2.0 * tokens * elements
        return layers * elementwise.launch_s + passed / (self.hardware.memory_bandwidth * elementwise.memory)

    def _state_s(self, tokens: int, emitting: int) -> float:
        """Recurrent layers read and write each sequence's state once a step."""
        flops = tokens * sum(layer.count * layer.state_flops for layer in self.shape.layers)
        nbytes = 2.0 * emitting * self.shape.state_bytes
        gemm = self.hardware.gemm("bf16")
        compute = flops / (self.hardware.rates.bf16 * gemm.compute)
        return (compute + nbytes / (self.hardware.memory_bandwidth * gemm.memory)) / self.tensor_parallel

    def _decode_ramps(self) -> tuple[tuple[Ramp, ...], int]:
        """All layers' ramps over context, and picoseconds per row."""
        hardware, decode = self.hardware, self.hardware.efficiency.decode
        ramps: list[Ramp] = []
        row_s = 0.0
        for layer in self.shape.layers:
            if (attention := layer.attention) is None:
                continue
            heads, kv_heads, token_bytes = self._share(attention)
            row_s += layer.count * (kv_heads * decode.kv_head_s + heads * decode.head_s)
            byte_ps = layer.count * token_bytes / hardware.memory_bandwidth * PS
            flops_ps = layer.count * attention.decode_flops / self.tensor_parallel / hardware.rates.bf16 * PS
            beyond = max(0.0, flops_ps / hardware.efficiency.prefill.compute - byte_ps)
            window = attention.window
            ramps += [
                Ramp(round(byte_ps * decode.read + beyond), window),
                Ramp(round(byte_ps * decode.read_rows), window, least=128),
                Ramp(round(byte_ps * decode.first_mib), window, first=-(-(2**20) // token_bytes)),
                Ramp(round(byte_ps * decode.first_16_mib), window, first=-(-(2**24) // token_bytes)),
            ]
        return tuple(ramp for ramp in ramps if ramp.ps), round(row_s * PS)

    def _chunk_costs(self) -> tuple[_Chunks, ...]:
        hardware, prefill = self.hardware, self.hardware.efficiency.prefill
        byte_ps = PS / (hardware.memory_bandwidth * prefill.memory)
        found: list[_Chunks] = []
        for layer in self.shape.layers:
            if (attention := layer.attention) is None:
                continue
            heads, _, token_bytes = self._share(attention)
            flops = attention.pair_flops / self.tensor_parallel
            # Reading Q and writing the output: as many elements as a pair has multiply-adds.
            query_bytes = attention.pair_flops / self.tensor_parallel
            found.append(
                _Chunks(
                    attention,
                    pair_ps=layer.count * flops / (hardware.rates.bf16 * prefill.compute) * PS,
                    query_ps=layer.count * query_bytes * byte_ps,
                    key_ps=layer.count * token_bytes * byte_ps,
                    head_ps=layer.count * heads * prefill.head_s * PS,
                )
            )
        return tuple(found)

    def _share(self, attention: Attention) -> tuple[int, int, int]:
        """Query heads, KV heads and KV bytes per token of one device; KV heads fewer than devices are kept more than once."""
        heads = attention.heads // self.tensor_parallel
        kv_heads = -(-attention.kv_heads // self.tensor_parallel)
        return heads, kv_heads, attention.planes * kv_heads * attention.head_dim * self.kv_element_bytes


def _products(shape: ModelShape, tensor_parallel: int) -> tuple[tuple[int, int, int], ...]:
    """One device's matrices as (inner, outer, how many of them)."""
    found: dict[tuple[int, int], int] = {}
    for layer in shape.layers:
        for matmul in layer.matmuls:
            part = matmul.shard(tensor_parallel)
            found[part] = found.get(part, 0) + layer.count
    return tuple((inner, outer, count) for (inner, outer), count in found.items())


def check_parallel(shape: ModelShape, hardware: Hardware, tensor_parallel: int) -> None:
    """Raises ConfigError if `tensor_parallel` devices cannot share the model."""
    if tensor_parallel < 1:
        raise ConfigError(f"tensor_parallel is {tensor_parallel}, expected at least 1")
    for layer in shape.layers:
        if layer.attention and layer.attention.heads % tensor_parallel:
            raise ConfigError(
                f"tensor_parallel {tensor_parallel} does not divide the {layer.attention.heads} attention heads "
                f"of {shape.architecture}"
            )
    if tensor_parallel > 1:
        hardware.all_reduce(tensor_parallel)
