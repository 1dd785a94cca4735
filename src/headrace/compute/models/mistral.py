"""Mistral 7B (arXiv:2310.06825) and its descendants: Llama's layers, with a sliding window on all of them or on none."""

from headrace.compute.checkpoint import Weights
from headrace.compute.layers.decoder import Decoder
from headrace.compute.layers.dense import DenseConfig, dense_groups, load_dense
from headrace.types.kv import KVGroup

ARCHITECTURES = ("MistralForCausalLM",)


class Config(DenseConfig, frozen=True, kw_only=True):
    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 4096 * 32
    sliding_window: int | None = 4096
    """Tokens attended; null: all (version 0.2 and later)."""


def kv_groups(config: Config) -> tuple[KVGroup, ...]:
    return dense_groups(config, [config.sliding_window or 0] * config.num_hidden_layers)


def load(config: Config, weights: Weights, length: int) -> Decoder:
    return load_dense(config, weights, length, kv_groups(config))
