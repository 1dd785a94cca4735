"""A model as arithmetic sees it: layers of matrix products, attention and state, with sizes and no weights.

Counts are per model copy (all devices of an instance together). A multiply-add is 2 FLOPs.
"""

from functools import cached_property

import msgspec


class Matmul(msgspec.Struct, frozen=True):
    """One matrix of weights, `inner` x `outer`, applied to every token: what the engine runs as one product."""

    inner: int
    outer: int
    split: str = "outer"
    """Which side tensor parallelism divides: "outer" | "inner" | "none" (every device holds all of it)."""
    bias: bool = False

    @property
    def weights(self) -> int:
        return self.inner * self.outer

    def shard(self, tensor_parallel: int) -> tuple[int, int]:
        """(inner, outer) of one device's part."""
        if self.split == "inner":
            return -(-self.inner // tensor_parallel), self.outer
        if self.split == "outer":
            return self.inner, -(-self.outer // tensor_parallel)
        return self.inner, self.outer


class Experts(msgspec.Struct, frozen=True):
    """Routed experts of one layer; each token goes through `chosen` of `count`. Shared experts are plain matmuls."""

    count: int
    chosen: int
    matmuls: tuple[Matmul, ...]
    """Of one expert."""

    def hit(self, tokens: int) -> float:
        """Experts that `tokens` tokens are expected to hit, each choosing `chosen` of `count` evenly: E (1 - (1 - k/E)^n)."""
        return self.count * (1.0 - (1.0 - self.chosen / self.count) ** tokens)

    @property
    def weights(self) -> int:
        """Of one expert."""
        return sum(matmul.weights for matmul in self.matmuls)


class Attention(msgspec.Struct, frozen=True):
    """Attention of one layer over its KV cache."""

    heads: int
    kv_heads: int
    head_dim: int
    """Elements that one plane of the cache keeps per token and KV head."""
    planes: int = 2
    """2: K and V. 1: one latent vector that all heads share."""
    window: int = 0
    """Tokens attended, the current one included; 0: all."""
    score_dim: int = 0
    """Elements of one head's Q and K in a prefill; 0: head_dim."""
    value_dim: int = 0
    """Elements of one head's V in a prefill; 0: head_dim."""

    @property
    def kv_elements(self) -> int:
        """Per token."""
        return self.planes * self.kv_heads * self.head_dim

    @property
    def pair_flops(self) -> int:
        """Of one query token and one key token in a prefill, all heads."""
        return 2 * self.heads * ((self.score_dim or self.head_dim) + (self.value_dim or self.head_dim))

    @property
    def decode_flops(self) -> int:
        """Of one key token in a decode. A latent is attended as it is kept (the up-projections are absorbed)."""
        if self.planes == 1:
            return 4 * self.heads * self.head_dim
        return self.pair_flops

    def pairs(self, tokens: int, context: int) -> int:
        """(query, key) pairs that a causal chunk of `tokens` after `context` tokens attends."""
        whole = tokens * context + tokens * (tokens + 1) // 2
        if not self.window:
            return whole
        last = max(context + tokens - self.window, 0)  # keys that the last token does not see
        first = max(context - self.window, 0)
        return whole - (last * (last + 1) - first * (first + 1)) // 2


class Layer(msgspec.Struct, frozen=True):
    """Layers that are alike."""

    indices: tuple[int, ...]
    matmuls: tuple[Matmul, ...]
    vectors: int
    """Weights that are no matrix: norms, convolutions, decays."""
    attention: Attention | None = None
    """None: the layer keeps a state of constant size."""
    experts: Experts | None = None
    state_elements: int = 0
    """Of one sequence, float32: the recurrent state."""
    window_elements: int = 0
    """Of one sequence, 16-bit: the short convolution's last inputs."""
    state_flops: int = 0
    """Per token: reading and updating the state."""

    @property
    def count(self) -> int:
        return len(self.indices)

    @property
    def state_bytes(self) -> int:
        return 4 * self.state_elements + 2 * self.window_elements

    @property
    def matrix_weights(self) -> int:
        """Without routed experts."""
        return sum(matmul.weights for matmul in self.matmuls)

    @property
    def other_weights(self) -> int:
        biases = sum(matmul.outer for matmul in self.matmuls if matmul.bias)
        return biases + self.vectors


class ModelShape(msgspec.Struct, frozen=True, dict=True):
    """A decoder: embedding, layers, head."""

    architecture: str
    hidden: int
    vocabulary: int
    layers: tuple[Layer, ...]
    embedding_weights: int
    """Token and position embeddings."""
    tied: bool
    """The head uses the embedding's weights."""
    weight_bits: float = 16.0
    """Of the matrices inside layers, scales included. Embedding, head and vectors stay at `plain_bits`."""
    plain_bits: int = 16
    arithmetic: str = "bf16"
    """Which rate the layers' products run at: "bf16" (also float16) | "fp8" | "int8". Weight-only formats compute in bf16."""

    @property
    def head(self) -> Matmul:
        return Matmul(self.hidden, self.vocabulary)

    @cached_property
    def parameters(self) -> int:
        """All of them; a tied head counts once."""
        routed = sum(
            layer.count * layer.experts.count * layer.experts.weights
            for layer in self.layers
            if layer.experts
        )
        return self._matrix_weights + routed + self._plain_weights

    @cached_property
    def active_parameters(self) -> int:
        """Those that one token meets; the embedding counts in full, as model cards count it."""
        chosen = sum(
            layer.count * layer.experts.chosen * layer.experts.weights
            for layer in self.layers
            if layer.experts
        )
        return self._matrix_weights + chosen + self._plain_weights

    @property
    def _matrix_weights(self) -> int:
        return sum(layer.count * layer.matrix_weights for layer in self.layers)

    @property
    def _plain_weights(self) -> int:
        vectors = sum(layer.count * layer.other_weights for layer in self.layers) + self.hidden
        return vectors + self.embedding_weights + (0 if self.tied else self.head.weights)

    @cached_property
    def weight_bytes(self) -> int:
        matrices = self.parameters - self._plain_weights
        return round(matrices * self.weight_bits / 8) + self._plain_weights * self.plain_bits // 8

    def device_weight_bytes(self, tensor_parallel: int) -> int:
        """On each device of `tensor_parallel`: matrices that are not split are kept on each, and so are the vectors."""
        matrices = plain = 0
        for layer in self.layers:
            matmuls = [
                *layer.matmuls,
                *(layer.experts.matmuls * layer.experts.count if layer.experts else ()),
            ]
            for matmul in matmuls:
                inner, outer = matmul.shard(tensor_parallel)
                matrices += layer.count * inner * outer
            plain += layer.count * layer.other_weights
        tables = self.embedding_weights + (0 if self.tied else self.head.weights)
        plain += self.hidden + -(-tables // tensor_parallel)
        return round(matrices * self.weight_bits / 8) + plain * self.plain_bits // 8

    @cached_property
    def token_flops(self) -> int:
        """Per token, outside attention and without the head: matrix products and the recurrent state."""
        flops = 0
        for layer in self.layers:
            routed = layer.experts.chosen * layer.experts.weights if layer.experts else 0
            flops += layer.count * (2 * (layer.matrix_weights + routed) + layer.state_flops)
        return flops

    @property
    def head_flops(self) -> int:
        """Per row that emits a token."""
        return 2 * self.head.weights

    def attention_flops(self, tokens: int, context: int) -> int:
        """Of a causal chunk of `tokens` tokens after `context` tokens, all layers."""
        return sum(
            layer.count * layer.attention.pair_flops * layer.attention.pairs(tokens, context)
            for layer in self.layers
            if layer.attention
        )

    def kv_token_bytes(self, element_bytes: int = 2) -> int:
        """KV per token over all groups, as long as no window is full."""
        return sum(
            layer.count * layer.attention.kv_elements * element_bytes
            for layer in self.layers
            if layer.attention
        )

    @cached_property
    def state_bytes(self) -> int:
        """Of one sequence: what recurrent layers keep, whatever its length."""
        return sum(layer.count * layer.state_bytes for layer in self.layers)

    def hidden_bytes(self, tokens: int) -> int:
        """Of the activations that one collective sums over the devices."""
        return 2 * self.hidden * tokens
