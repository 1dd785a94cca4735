"""Whole checkpoint folders: what is written, and that the engine reads it back as what was meant."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from headrace.compute import models
from headrace.compute.checkpoint import Checkpoint, Weights
from headrace.compute.quant.conversion import Calibration, convert, samples_of
from headrace.compute.quant.recipe import Recipe, round_to_nearest
from headrace.compute.quant.weight import PER_COLUMN
from headrace.types.errors import CheckpointError, ConfigError
from tests.compute import harness

IDS = [[3, 1, 4, 1, 5, 92, 65, 35, 89, 79, 32, 38, 46]]


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """In two shards, with biases, and inputs of the last projection (96) that groups of 64 do not divide."""
    folder = tmp_path_factory.mktemp("plain")
    model = harness.make_model("qwen2", seed=0, dtype=torch.bfloat16, num_key_value_heads=2)
    model.save_pretrained(folder, max_shard_size="200KB")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "README.md").write_text("of the other model")
    return folder


def samples(count: int = 4, length: int = 48) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 160, (count, length), generator=generator)


def logits(folder: Path) -> torch.Tensor:
    return harness.all_logits(*harness.load(folder), IDS)[0]


def test_round_to_nearest(plain, tmp_path):
    source, told = Checkpoint(plain), []
    recipe = Recipe(4, 64)
    outcome = convert(
        source, tmp_path / "out", recipe, threads=1, progress=lambda done, total: told.append((done, total))
    )
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert outcome.modules == 21
    assert outcome.groups["model.layers.0.mlp.up_proj"] == PER_COLUMN
    assert outcome.groups["model.layers.0.mlp.down_proj"] == 32
    assert {f"{kind}_proj" for kind in ("q", "k", "v", "o", "gate", "up", "down")} == set(outcome.errors)
    weights = Weights(Checkpoint(tmp_path / "out"), torch.float32)
    for module, group in outcome.groups.items():
        weight = source.tensor(f"{module}.weight")
        (found,) = weights.matrices([(module, len(weight))], weight.shape[1])
        expected = round_to_nearest(weight, recipe, group=group, scale_dtype=torch.bfloat16)
        assert torch.equal(found.dequantize(), expected.dequantize())


def test_the_folder(plain, tmp_path):
    """Shards and other files as the source has them; sizes as announced; nothing else left behind."""
    outcome = convert(Checkpoint(plain), tmp_path / "out", Recipe(3, 32, symmetric=False), threads=1)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    expected = {path.name for path in plain.iterdir()} - {"README.md"}
    assert names == expected and len(list(plain.glob("*.safetensors"))) > 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    stored = 0
    for name in {*index["weight_map"].values()}:
        with safe_open(tmp_path / "out" / name, "pt") as shard:
            held = set(shard.keys())
            assert held == {tensor for tensor, file in index["weight_map"].items() if file == name}
            stored += sum(shard.get_tensor(tensor).nbytes for tensor in held)
    assert stored == index["metadata"]["total_size"] == outcome.quantized_bytes + outcome.other_bytes
    before, after = (load_of(folder) for folder in (plain, tmp_path / "out"))
    for name, tensor in before.items():
        assert (name not in after) if "_proj.weight" in name else torch.equal(after[name], tensor)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.pop("quantization_config")["format"] == "pack-quantized"
    assert config == json.loads((plain / "config.json").read_text())


def load_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


@pytest.mark.parametrize("order", ["none", "static", "group"])
@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (2, False)])
def test_calibrated(plain, tmp_path, order, bits, symmetric):
    """On the texts that it was calibrated on, the model is closer to what it was than rounding leaves it."""
    recipe = Recipe(bits, 32, symmetric)
    convert(Checkpoint(plain), tmp_path / "nearest", recipe, threads=1)
    texts = samples()
    calibration = Calibration(texts, order)
    outcome = convert(Checkpoint(plain), tmp_path / "fit", recipe, calibration, threads=1)
    assert outcome.modules == sum(map(len, outcome.errors.values())) == 21
    exact, nearest, fit = (
        torch.cat(harness.all_logits(*harness.load(folder), texts.tolist()))
        for folder in (plain, tmp_path / "nearest", tmp_path / "fit")
    )
    assert (fit - exact).square().mean() < 0.9 * (nearest - exact).square().mean()
    stored = [name for name in load_of(tmp_path / "fit") if name.endswith("weight_g_idx")]
    assert len(stored) == (21 if order == "group" else 0)


def test_a_second_layer_sees_the_first_one_quantized(plain, tmp_path):
    """The text goes on through what was written: the last layer's moment differs from the unquantized model's."""
    seen = []
    source = Checkpoint(plain)
    for bits in (2, 8):
        target = tmp_path / str(bits)
        convert(source, target, Recipe(bits, 32), Calibration(samples()), threads=1)
        weights = Weights(Checkpoint(target), torch.float32)
        (found,) = weights.matrices([("model.layers.2.mlp.up_proj", 96)], 64)
        exact = source.tensor("model.layers.2.mlp.up_proj.weight").float()
        seen.append(float((found.dequantize() - exact).norm() / exact.norm()))
    assert seen[1] < 0.03 < seen[0]


def test_quantized_models_are_told_apart(plain, tmp_path):
    convert(Checkpoint(plain), tmp_path / "out", Recipe(8, 32), threads=1)
    assert Checkpoint(tmp_path / "out").fingerprint() != Checkpoint(plain).fingerprint()
    assert not torch.equal(logits(tmp_path / "out"), logits(plain))
    torch.testing.assert_close(logits(tmp_path / "out"), logits(plain), rtol=0, atol=0.5)


def test_nothing_is_overwritten(plain, tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    convert(Checkpoint(plain), target, Recipe(4, 32), threads=1)
    before = {path.name: path.stat().st_mtime_ns for path in target.iterdir()}
    with pytest.raises(ConfigError, match=r"out exists and is not empty; nothing is overwritten"):
        convert(Checkpoint(plain), target, Recipe(8, 32), threads=1)
    assert {path.name: path.stat().st_mtime_ns for path in target.iterdir()} == before
    with pytest.raises(
        ConfigError, match=r"is quantized already \(compressed-tensors pack-quantized, int4\)"
    ):
        convert(Checkpoint(target), tmp_path / "again", Recipe(8, 32), threads=1)


def test_a_failure_leaves_nothing(plain, tmp_path, monkeypatch):
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(Checkpoint(plain), tmp_path / "out", Recipe(4, 32), threads=1, progress=interrupt)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="cannot be written"):
        convert(Checkpoint(plain), Path(os.devnull) / "out", Recipe(4, 32), threads=1)


def test_a_weight_that_is_no_number(plain, tmp_path):
    harness.make_model("llama", seed=0).save_pretrained(tmp_path / "model")
    path, name = tmp_path / "model" / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(path)
    tensors[name][3, 4] = torch.nan
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=rf"'{name}' holds NaN"):
        convert(Checkpoint(tmp_path / "model"), tmp_path / "out", Recipe(4, 32), threads=1)
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match=rf"'{name}' holds NaN"):
        models.load(Checkpoint(tmp_path / "model"))


def test_samples():
    ids = list(range(1000))
    assert samples_of(ids, 3, 100).tolist() == [ids[0:100], ids[450:550], ids[900:1000]]
    assert samples_of(ids, 100, 100).shape == (10, 100)
    with pytest.raises(ConfigError, match="the text has 1000 tokens, and one sample takes 1001"):
        samples_of(ids, 3, 1001)
