import json

import pytest

from headrace.compute import models
from headrace.compute.checkpoint import Checkpoint
from headrace.types.kv import GroupKind, KVGroup
from tests.compute.harness import SIZES

FULL, WINDOW = GroupKind.FULL, GroupKind.WINDOW


def checkpoint(folder, architecture, **config) -> Checkpoint:
    """A folder without weights: the KV spec needs none."""
    (folder / "config.json").write_text(
        json.dumps({"architectures": [architecture], "dtype": "bfloat16", **SIZES, **config})
    )
    return Checkpoint(folder)


def test_families_are_found_by_walking_the_folder():
    found = models.families()
    assert {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"} <= set(found)
    for architecture, family in found.items():
        assert architecture in family.ARCHITECTURES


@pytest.mark.parametrize(
    ("architecture", "config", "groups"),
    [
        ("LlamaForCausalLM", {}, [(FULL, (0, 1, 2), 4, 16, 0)]),
        ("LlamaForCausalLM", {"num_key_value_heads": 2, "head_dim": 32}, [(FULL, (0, 1, 2), 2, 32, 0)]),
        ("MistralForCausalLM", {"num_key_value_heads": 2}, [(WINDOW, (0, 1, 2), 2, 16, 4096)]),
        (
            "MistralForCausalLM",
            {"num_key_value_heads": 2, "sliding_window": None},
            [(FULL, (0, 1, 2), 2, 16, 0)],
        ),
        ("Qwen2ForCausalLM", {"sliding_window": 8}, [(FULL, (0, 1, 2), 4, 16, 0)]),
        (
            "Qwen2ForCausalLM",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            [(FULL, (0,), 4, 16, 0), (WINDOW, (1, 2), 4, 16, 8)],
        ),
        (
            "Qwen3ForCausalLM",
            {
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            [(FULL, (1,), 4, 128, 0), (WINDOW, (0, 2), 4, 128, 8)],
        ),
    ],
)
def test_kv_spec_comes_from_the_configuration_alone(tmp_path, architecture, config, groups):
    spec = models.kv_spec(checkpoint(tmp_path, architecture, **config), block_size=64)
    assert (spec.block_size, spec.dtype) == (64, "bfloat16")
    assert spec.groups == tuple(
        KVGroup(kind=kind, layers=layers, kv_heads=heads, head_dim=dim, window=window)
        for kind, layers, heads, dim, window in groups
    )


@pytest.mark.parametrize(
    ("rope", "length"),
    [
        ({"rope_type": "default"}, 1000),
        ({"rope_type": "linear", "factor": 2.5}, 2500),
        ({"rope_type": "dynamic", "factor": 4.0}, 4000),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 100}, 1000),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1000}, 4000),
    ],
)
def test_context_length(tmp_path, rope, length):
    config = {"max_position_embeddings": 1000, "rope_parameters": rope}
    assert models.context_length(checkpoint(tmp_path, "LlamaForCausalLM", **config)) == length
