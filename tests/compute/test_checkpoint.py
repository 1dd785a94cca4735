import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from headrace.compute import models
from headrace.compute.checkpoint import Checkpoint
from headrace.types.errors import CheckpointError
from tests.compute import harness
from tests.compute.harness import all_logits, make_model, reference

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    make_model("llama", seed=0, num_key_value_heads=2).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A checkpoint that a test may spoil."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def edit_config(folder: Path, **fields) -> None:
    """Set fields of config.json; None removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def load(folder: Path, **options):
    return models.load(Checkpoint(folder), length=64, **options)


def logits(folder: Path, ids: list[int]) -> torch.Tensor:
    return all_logits(*harness.load(folder), [ids])[0][-1]


def test_shards(folder):
    model = make_model("llama", seed=0, num_key_value_heads=2)
    model.save_pretrained(folder / "shards", max_shard_size="100KB")
    assert len(list((folder / "shards").glob("*.safetensors"))) > 1
    assert torch.equal(logits(folder / "shards", [1, 2, 3]), logits(folder, [1, 2, 3]))
    next((folder / "shards").glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match=r"model-00.*incomplete"):
        load(folder / "shards")


def test_tensors_are_mapped_not_read(folder):
    checkpoint = Checkpoint(folder)
    name = "model.norm.weight"
    assert checkpoint.tensor(name).data_ptr() == checkpoint.tensor(name).data_ptr()
    assert "model.safetensors" in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("theta", [10000.0, 777.0])
def test_version_4_configurations(folder, theta):
    """transformers 4 wrote `rope_theta` and `rope_scaling`, with "type" in its early releases, and `torch_dtype`."""
    ids = list(range(100, 160)) * 2
    stated = {**LLAMA3, "rope_theta": theta}
    edit_config(folder, rope_parameters=stated)
    expected = reference(transformers.AutoModelForCausalLM.from_pretrained(folder), ids)[-1]
    edit_config(
        folder, rope_parameters=None, rope_theta=theta, rope_scaling=LLAMA3, dtype=None, torch_dtype="float32"
    )
    torch.testing.assert_close(logits(folder, ids), expected, rtol=0, atol=1e-4)
    edit_config(folder, rope_scaling={"type": "linear", "factor": 4.0})
    linear = logits(folder, ids)
    edit_config(folder, rope_scaling={"rope_type": "linear", "factor": 4.0})
    assert torch.equal(linear, logits(folder, ids))
    assert not torch.allclose(linear, expected, atol=1e-3)


def test_missing_fields_take_the_defaults_of_transformers(folder):
    before = logits(folder, [1, 2, 3])
    for field in ("rope_parameters", "head_dim", "hidden_act", "attention_bias", "mlp_bias", "rms_norm_eps"):
        edit_config(folder, **{field: None})
    assert torch.equal(logits(folder, [1, 2, 3]), before)


def test_dtype(folder):
    assert Checkpoint(folder).dtype() == "float32"
    assert load(folder, dtype="bfloat16").dtype == torch.bfloat16
    edit_config(folder, dtype="bfloat16")
    assert load(folder).dtype == torch.bfloat16
    edit_config(folder, dtype=None)
    assert load(folder).dtype == torch.float32
    with pytest.raises(CheckpointError, match=r"float8.*known: auto, float32"):
        load(folder, dtype="float8")


def test_end_of_text_tokens(folder):
    (folder / "generation_config.json").unlink(missing_ok=True)
    edit_config(folder, eos_token_id=7)
    assert Checkpoint(folder).eos_token_ids == (7,)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [8, 9]}))
    assert Checkpoint(folder).eos_token_ids == (8, 9)
    (folder / "generation_config.json").write_text("{}")
    edit_config(folder, eos_token_id=None)
    assert Checkpoint(folder).eos_token_ids == ()


def test_fingerprint(folder):
    before = Checkpoint(folder).fingerprint()
    assert before == Checkpoint(folder).fingerprint()
    edit_tensors(folder, lambda tensors: tensors["model.norm.weight"].add_(1))
    weights = Checkpoint(folder).fingerprint()
    edit_config(folder, rms_norm_eps=1e-3)
    assert len({before, weights, Checkpoint(folder).fingerprint()}) == 3


def test_tied_models(folder):
    """The head is the embedding, unless the file holds one that differs."""
    head = logits(folder, [1, 2, 3])
    edit_config(folder, tie_word_embeddings=True)
    assert torch.equal(logits(folder, [1, 2, 3]), head)
    edit_tensors(folder, lambda tensors: tensors.pop("lm_head.weight"))
    tied = logits(folder, [1, 2, 3])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(tied, reference(model, [1, 2, 3])[-1], rtol=0, atol=1e-4)
    edit_config(folder, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' is missing"):
        load(folder)


def test_old_buffers_are_ignored(folder):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(8)}))
    load(folder)


def test_wrong_tensors(folder):
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))
    with pytest.raises(CheckpointError, match=rf"{name}' is \[95, 64\], expected \[96, 64\]"):
        load(folder)
    edit_tensors(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(
        CheckpointError, match=rf"{name}' is missing; LlamaForCausalLM expects it as \[96, 64\]"
    ):
        load(folder)


def test_unexpected_tensors(folder):
    names = {f"model.layers.{i}.self_attn.q_norm.weight": torch.ones(16) for i in range(5)}
    edit_tensors(folder, lambda tensors: tensors.update(names))
    with pytest.raises(
        CheckpointError, match=r"unexpected .*LlamaForCausalLM.*layers.0.*q_norm.* and 2 more"
    ):
        load(folder)


def test_wrong_element_type(folder):
    name = "model.norm.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    with pytest.raises(CheckpointError, match=rf"{name}' is I8; expected one of F32, BF16, F16"):
        load(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"architectures": ["GPT5ForCausalLM"]},
            r"GPT5ForCausalLM is not supported; supported: .*LlamaForCausalLM",
        ),
        ({"architectures": None}, "not stated is not supported"),
        ({"quantization_config": {"quant_method": "hqq"}}, "'hqq' are not supported; supported: awq, "),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "large"}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_key_value_heads": 3}, "4 is not a multiple of num_key_value_heads 3"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"hidden_act": "magic"}, "hidden_act 'magic' is unknown; known: silu"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "'spiral' is unknown; known: default, linear"),
        ({"rope_parameters": {"rope_type": "linear"}}, "'linear' needs 'factor'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "per layer type"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_theta": "big"}}, "rope_theta"),
    ],
)
def test_configurations_that_cannot_be_served(folder, fields, message):
    edit_config(folder, **fields)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_types": ["full_attention"] * 2}, "2 layer_types for 3 layers"),
        ({"layer_types": ["linear_attention"] * 3}, "linear_attention"),
        ({"layer_types": ["sliding_attention"] * 3}, "sliding_window is not in use"),
    ],
)
def test_layer_types_that_cannot_be_served(tmp_path, fields, message):
    make_model("qwen3", seed=0, num_key_value_heads=2, head_dim=16).save_pretrained(tmp_path)
    edit_config(tmp_path, **fields)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_folders_that_are_no_checkpoint(tmp_path, folder):
    with pytest.raises(CheckpointError, match=r"config.json does not exist"):
        Checkpoint(tmp_path / "nowhere")
    (folder / "model.safetensors").write_bytes(b"garbage!" * 4)
    with pytest.raises(CheckpointError, match=r"model.safetensors is not a valid safetensors file"):
        load(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin is a pickle, which may execute code"):
        load(folder)
    (folder / "config.json").write_text("[")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        Checkpoint(folder)


def test_an_index_stays_in_its_folder(folder):
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"x": "../../secret.safetensors"}})
    )
    with pytest.raises(CheckpointError, match="not a plain file name"):
        load(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": ["x"]}))
    with pytest.raises(CheckpointError, match="weight_map"):
        load(folder)
