"""Counts against what the models' makers publish."""

import pytest

from headrace.compute.models import families
from headrace.cost.arithmetic import kv_spec, shape_of
from headrace.cost.shape import Attention
from headrace.types.errors import ConfigError
from headrace.types.kv import GroupKind
from tests.cost import models

PUBLISHED = [
    (models.LLAMA_8B, 8.03e9, 8.03e9, 131_072),
    (models.LLAMA_70B, 70.55e9, 70.55e9, 327_680),
    (models.MISTRAL_7B, 7.24e9, 7.24e9, 131_072),
    (models.QWEN3_06B, 0.596e9, 0.596e9, 114_688),
    (models.GEMMA3_1B, 1.0e9, 1.0e9, 26_624),
    (models.OPT_13B, 12.85e9, 12.85e9, 819_200),
    (models.MIXTRAL, 46.7e9, 12.9e9, 131_072),
    (models.QWEN3_30B_A3B, 30.5e9, 3.3e9, 98_304),
    (models.DEEPSEEK_V3, 671e9, 37.5e9, 61 * (512 + 64) * 2),
    (models.QWEN3_NEXT, 79.7e9, 3.9e9, 12 * 2 * 2 * 256 * 2),
    (models.KIMI_LINEAR, 49.1e9, 3.5e9, 7 * (512 + 64) * 2),
]


@pytest.mark.parametrize(("config", "parameters", "active", "kv_bytes"), PUBLISHED)
def test_known_models(config, parameters, active, kv_bytes):
    shape = shape_of(config)
    assert shape.parameters == pytest.approx(parameters, rel=0.005)
    assert shape.active_parameters == pytest.approx(active, rel=0.02)
    assert shape.kv_token_bytes() == kv_bytes
    spec = kv_spec(shape, 32)
    assert sum(spec.block_bytes(g) for g in range(len(spec.groups))) == 32 * kv_bytes


def test_flops_are_two_per_active_weight():
    shape = shape_of(models.LLAMA_8B)
    tables = 2 * 4096 * 128256
    norms = (32 * 2 + 1) * 4096
    assert shape.token_flops == 2 * (shape.parameters - tables - norms)
    assert shape.head_flops == 2 * 4096 * 128256
    assert shape.attention_flops(1, 999) == 32 * 4 * 32 * 128 * 1000
    assert shape.attention_flops(512, 0) + shape.attention_flops(512, 512) == shape.attention_flops(1024, 0)
    assert shape.hidden_bytes(10) == 10 * 4096 * 2


@pytest.mark.parametrize("window", [0, 1, 5, 16, 100])
def test_pairs_count_what_each_token_sees(window):
    attention = Attention(heads=1, kv_heads=1, head_dim=8, window=window)
    for tokens in (1, 2, 7, 16, 40):
        for context in (0, 1, 4, 15, 60):
            seen = [context + i + 1 for i in range(tokens)]
            assert attention.pairs(tokens, context) == sum(min(s, window) if window else s for s in seen)


def test_experts_hit():
    (layer,) = shape_of(models.MIXTRAL).layers
    assert layer.experts is not None
    assert layer.experts.hit(1) == pytest.approx(2)
    assert layer.experts.hit(2) == pytest.approx(8 * (1 - 0.75**2))
    assert layer.experts.hit(1000) == pytest.approx(8)


def test_groups_of_windows():
    spec = kv_spec(shape_of(models.GEMMA3_1B), 16)
    full, windowed = spec.groups
    assert full.kind is GroupKind.FULL and full.layers == (5, 11, 17, 23)
    assert windowed.kind is GroupKind.WINDOW and windowed.window == 512 and len(windowed.layers) == 22
    (only,) = kv_spec(shape_of(models.MISTRAL_7B), 16).groups
    assert only.window == 4096


def test_layer_types_win_over_older_keys():
    kinds = ["full_attention", "sliding_attention"] * 14
    config = models.QWEN3_06B | {"layer_types": kinds, "use_sliding_window": True, "sliding_window": 1024}
    full, windowed = kv_spec(shape_of(config), 32).groups
    assert full.layers == tuple(range(0, 28, 2)) and windowed.layers == tuple(range(1, 28, 2))


def test_latent_is_one_plane_of_one_head():
    (group,) = kv_spec(shape_of(models.DEEPSEEK_V3), 64).groups
    assert (group.planes, group.kv_heads, group.head_dim, len(group.layers)) == (1, 1, 576, 61)


def test_recurrent_layers_keep_state_and_no_kv():
    shape = shape_of(models.QWEN3_NEXT)
    (group,) = kv_spec(shape, 32).groups
    assert group.layers == tuple(range(3, 48, 4))
    convolution = (2 * 16 * 128 + 32 * 128) * 3 * 2
    assert shape.state_bytes == 36 * (32 * 128 * 128 * 4 + convolution)
    assert shape_of(models.LLAMA_8B).state_bytes == 0


def test_weight_bytes_by_dtype():
    plain = shape_of(models.LLAMA_8B)
    assert plain.weight_bytes == 2 * plain.parameters
    tables = 2 * 2 * 4096 * 128256
    four = shape_of(models.LLAMA_8B, weight_bits=4)
    assert four.weight_bytes == pytest.approx(tables + 6.98e9 / 2, rel=0.001)
    assert shape_of(models.DEEPSEEK_V3).weight_bytes == pytest.approx(671e9, rel=0.01)
    wide = shape_of(models.LLAMA_8B | {"torch_dtype": "float32"})
    assert wide.weight_bytes == 4 * wide.parameters


@pytest.mark.parametrize(
    ("settings", "bits", "arithmetic"),
    [
        ({"quant_method": "fp8"}, 8, "fp8"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, 4 + 20 / 128, "bf16"),
        ({"quant_method": "awq", "w_bit": 4, "group_size": 64}, 4 + 20 / 64, "bf16"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4.5, "bf16"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {
                    "group_0": {
                        "weights": {"num_bits": 8, "type": "int"},
                        "input_activations": {"num_bits": 8},
                    }
                },
            },
            8,
            "int8",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 32}}},
            },
            4 + 16 / 32,
            "bf16",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {
                    "group_0": {"weights": {"num_bits": 3, "group_size": 64, "symmetric": False}},
                    "group_1": {"weights": {"num_bits": 3, "strategy": "channel", "symmetric": False}},
                },
            },
            3 + 19 / 64,
            "bf16",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 5, "strategy": "channel"}}},
            },
            5,
            "bf16",
        ),
    ],
)
def test_quantized_checkpoints(settings, bits, arithmetic):
    shape = shape_of(models.LLAMA_8B | {"quantization_config": settings})
    assert shape.weight_bits == pytest.approx(bits)
    assert shape.arithmetic == arithmetic


def test_a_share_of_every_device_adds_up():
    for config in (models.LLAMA_8B, models.MIXTRAL, models.QWEN3_30B_A3B):
        shape = shape_of(config)
        assert shape.device_weight_bytes(1) == shape.weight_bytes
        assert 8 * shape.device_weight_bytes(8) == pytest.approx(shape.weight_bytes, rel=0.01)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": None}, ["hidden_size is missing"]),
        ({"num_hidden_layers": "many"}, ["num_hidden_layers is 'many'"]),
        ({"num_attention_heads": 0}, ["num_attention_heads is 0"]),
        ({"num_key_value_heads": 5}, ["multiple of num_key_value_heads 5"]),
        ({"architectures": ["MambaForCausalLM"]}, ["MambaForCausalLM", "LlamaForCausalLM"]),
        ({"architectures": None}, ["architectures is missing"]),
        ({"quantization_config": {"quant_method": "aqlm"}}, ["quant_method 'aqlm'", "gptq"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["w_bit is missing"]),
        ({"layer_types": ["full_attention"]}, ["1 layer_types for 32 layers"]),
        ({"tie_word_embeddings": "no"}, ["tie_word_embeddings is 'no'"]),
    ],
)
def test_a_config_that_is_wrong(change, words):
    with pytest.raises(ConfigError) as caught:
        shape_of(models.LLAMA_8B | change)
    assert all(word in str(caught.value) for word in words)


def test_a_family_names_its_own_keys():
    for config, key in (
        (models.MIXTRAL, "num_local_experts"),
        (models.QWEN3_30B_A3B, "moe_intermediate_size"),
        (models.DEEPSEEK_V3, "kv_lora_rank"),
        (models.OPT_13B, "ffn_dim"),
        (models.QWEN3_NEXT, "linear_key_head_dim"),
    ):
        with pytest.raises(ConfigError, match=f"{key} is missing"):
            shape_of({name: value for name, value in config.items() if name != key})
    linear = {k: v for k, v in models.KIMI_LINEAR["linear_attn_config"].items() if k != "full_attn_layers"}
    with pytest.raises(ConfigError, match="full_attn_layers is missing"):
        shape_of(models.KIMI_LINEAR | {"linear_attn_config": linear})


def test_kv_dtype_is_known():
    with pytest.raises(ConfigError, match="fp8"):
        kv_spec(shape_of(models.LLAMA_8B), 32, "fp8")


@pytest.mark.parametrize(
    "config",
    [
        models.LLAMA_8B,
        models.MISTRAL_7B,
        models.MISTRAL_7B | {"sliding_window": None},
        {key: value for key, value in models.MISTRAL_7B.items() if key != "sliding_window"},
        models.QWEN3_06B,
        models.QWEN3_06B | {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 20},
        models.QWEN3_06B | {"architectures": ["Qwen2ForCausalLM"]},
    ],
)
def test_groups_are_those_of_the_engine(config):
    family = families()[config["architectures"][0]]
    assert kv_spec(shape_of(config), 32).groups == family.kv_groups(family.Config.parse(config))
