"""Llama 2 (arXiv:2307.09288), Llama 3 to 3.3 (arXiv:2407.21783), and the many models saved under its architecture.

Full attention with grouped queries; optional biases on all projections of attention, and on the MLP.
"""

from headrace.compute.checkpoint import Weights
from headrace.compute.layers.decoder import Decoder
from headrace.compute.layers.dense import DenseConfig, dense_groups, load_dense
from headrace.types.kv import KVGroup

ARCHITECTURES = ("LlamaForCausalLM",)


class Config(DenseConfig, frozen=True, kw_only=True):
    attention_bias: bool = False
    mlp_bias: bool = False


def kv_groups(config: Config) -> tuple[KVGroup, ...]:
    return dense_groups(config, [0] * config.num_hidden_layers)


def load(config: Config, weights: Weights, length: int) -> Decoder:
    return load_dense(
        config,
        weights,
        length,
        kv_groups(config),
        qkv_bias=config.attention_bias,
        out_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
    )
