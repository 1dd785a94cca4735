"""Qwen3, dense (arXiv:2505.09388): Q and K are normalised per head, and the size of a head is stated, not derived."""

from headrace.compute.checkpoint import Weights
from headrace.compute.layers.decoder import Decoder
from headrace.compute.layers.dense import LayerTypesConfig, dense_groups, load_dense
from headrace.types.kv import KVGroup

ARCHITECTURES = ("Qwen3ForCausalLM",)


class Config(LayerTypesConfig, frozen=True, kw_only=True):
    head_dim: int | None = 128
    max_position_embeddings: int = 32768
    attention_bias: bool = False


def kv_groups(config: Config) -> tuple[KVGroup, ...]:
    return dense_groups(config, config.windows)


def load(config: Config, weights: Weights, length: int) -> Decoder:
    return load_dense(
        config,
        weights,
        length,
        kv_groups(config),
        qkv_bias=config.attention_bias,
        out_bias=config.attention_bias,
        head_norm=True,
    )
