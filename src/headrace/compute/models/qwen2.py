"""Qwen2 (arXiv:2407.10671) and Qwen2.5 (arXiv:2412.15115): biases on Q, K and V; the upper layers may have a window."""

from headrace.compute.checkpoint import Weights
from headrace.compute.layers.decoder import Decoder
from headrace.compute.layers.dense import LayerTypesConfig, dense_groups, load_dense
from headrace.types.kv import KVGroup

ARCHITECTURES = ("Qwen2ForCausalLM",)


class Config(LayerTypesConfig, frozen=True, kw_only=True):
    max_position_embeddings: int = 32768


def kv_groups(config: Config) -> tuple[KVGroup, ...]:
    return dense_groups(config, config.windows)


def load(config: Config, weights: Weights, length: int) -> Decoder:
    return load_dense(config, weights, length, kv_groups(config), qkv_bias=True)
