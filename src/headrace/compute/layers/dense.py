"""The dense decoder that Llama's descendants share: attention, gated MLP, rotary positions.

Fields of the configuration bear transformers' names and have its defaults.
"""

from collections.abc import Sequence
from typing import Any, Self

import msgspec

from headrace.compute.checkpoint import Weights
from headrace.compute.layers.attention import Attention, places, windowed_groups
from headrace.compute.layers.decoder import Decoder, load_decoder
from headrace.compute.layers.mlp import GatedMLP
from headrace.compute.layers.rotary import Rope, Rotary, context_length, parse_rope
from headrace.types.errors import CheckpointError
from headrace.types.kv import KVGroup


class DenseConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What Llama's descendants have in common. A family adds its own fields; fields it does not name are ignored."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_theta: float | None = None
    original_max_position_embeddings: int | None = None

    @classmethod
    def parse(cls, config: dict[str, Any]) -> Self:
        """From config.json. Raises CheckpointError naming the field that is missing or wrong."""
        try:
            parsed = msgspec.convert(config, cls)
        except msgspec.ValidationError as error:
            raise CheckpointError(f"config.json: {error}") from error
        parsed.check()
        return parsed

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def dim(self) -> int:
        """Of one head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rope(self) -> Rope:
        return parse_rope(
            self.rope_scaling or self.rope_parameters, self.rope_theta, self.original_max_position_embeddings
        )

    @property
    def context_length(self) -> int:
        """Longest sequence, tokens, that the model is meant for."""
        return context_length(self.rope, self.max_position_embeddings)

    def check(self) -> None:
        """Raises CheckpointError if the sizes cannot belong to one model."""
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
        ):
            if getattr(self, name) < 1:
                raise CheckpointError(f"config.json: {name} is {getattr(self, name)}, expected at least 1")
        if self.num_attention_heads % self.kv_heads:
            raise CheckpointError(
                f"config.json: num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.kv_heads}"
            )
        if self.dim % 2:
            raise CheckpointError(f"config.json: head_dim {self.dim} is odd; rotary embedding needs it even")


class LayerTypesConfig(DenseConfig, frozen=True, kw_only=True):
    """A dense decoder in which each layer has full or sliding-window attention (Qwen2, Qwen3)."""

    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    max_window_layers: int = 28
    layer_types: tuple[str, ...] | None = None

    @property
    def windows(self) -> tuple[int, ...]:
        """Window of each layer, tokens; 0: full attention."""
        window = (self.sliding_window or 0) if self.use_sliding_window else 0
        if self.layer_types is None:
            return tuple(window if i >= self.max_window_layers else 0 for i in range(self.num_hidden_layers))
        return tuple(window if kind == "sliding_attention" else 0 for kind in self.layer_types)

    def check(self) -> None:
        super().check()
        types = self.layer_types
        if types is None:
            return
        if len(types) != self.num_hidden_layers:
            raise CheckpointError(
                f"config.json: {len(types)} layer_types for {self.num_hidden_layers} layers"
            )
        if unknown := set(types) - {"full_attention", "sliding_attention"}:
            raise CheckpointError(
                f"config.json: layer_types {sorted(unknown)} are not supported by this architecture"
            )
        if "sliding_attention" in types and not (self.use_sliding_window and self.sliding_window):
            raise CheckpointError(
                "config.json: layer_types name sliding_attention, but sliding_window is not in use"
            )


def dense_groups(config: DenseConfig, windows: Sequence[int]) -> tuple[KVGroup, ...]:
    """KV groups of layers with these windows (tokens; 0: full attention)."""
    return windowed_groups(windows, config.kv_heads, config.dim)


def load_dense(
    config: DenseConfig,
    weights: Weights,
    length: int,
    groups: tuple[KVGroup, ...],
    *,
    qkv_bias: bool = False,
    out_bias: bool = False,
    mlp_bias: bool = False,
    head_norm: bool = False,
) -> Decoder:
    """Load a dense decoder for sequences of at most `length` tokens.

    `qkv_bias`, `out_bias`, `mlp_bias`: these projections have biases. `head_norm`: Q and K are normalised per head.
    """
    place = places(groups)

    def attention(index: int, prefix: str) -> Attention:
        return Attention.load(
            weights,
            f"{prefix}self_attn.",
            place[index],
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.kv_heads,
            dim=config.dim,
            qkv_bias=qkv_bias,
            out_bias=out_bias,
            norm_eps=config.rms_norm_eps if head_norm else None,
        )

    def mlp(index: int, prefix: str) -> GatedMLP:
        return GatedMLP.load(
            weights,
            f"{prefix}mlp.",
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            activation=config.hidden_act,
            bias=mlp_bias,
        )

    return load_decoder(
        weights,
        vocab=config.vocab_size,
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        eps=config.rms_norm_eps,
        tied=config.tie_word_embeddings,
        rotary=Rotary(config.rope, config.dim, length, config.max_position_embeddings, weights.dtype),
        groups=groups,
        length=length,
        mixer=attention,
        feed=mlp,
    )
