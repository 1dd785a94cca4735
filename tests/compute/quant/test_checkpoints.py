"""Checkpoints of all schemes give the logits of the dense model that their weights stand for."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from headrace.compute.checkpoint import Checkpoint, Weights
from headrace.compute.layers.decoder import Decoder
from headrace.types.errors import CheckpointError, ConfigError, HeadraceError
from tests.compute import harness
from tests.compute.quant import stored
from tests.compute.quant.stored import Drawn, compressed_settings, draw

IDS = [[3, 1, 4, 1, 5, 92, 65, 35, 89, 79, 32, 38]]
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    harness.make_model("llama", seed=0, num_key_value_heads=2).save_pretrained(folder)
    return folder


def seed_of(module: str) -> int:
    return sum(map(ord, module))


def drawn(**options) -> Callable[[str, int, int], Drawn]:
    """The same order of inputs in what is stacked: modules of one part share the seed of their permutation."""

    def make(module: str, rows: int, features_in: int) -> Drawn:
        made = draw(rows, features_in, seed=seed_of(module), **options)
        if options.get("act_order"):
            made.groups = draw(1, features_in, seed=seed_of(module.rsplit(".", 1)[0]), **options).groups
        return made

    return make


def logits(folder: Path, dtype: str = "float32") -> torch.Tensor:
    return harness.all_logits(*harness.load(folder, dtype), IDS)[0]


def model(folder: Path) -> Decoder:
    return harness.load(folder)[0]


SCHEMES = {
    "gptq": (GPTQ, stored.gptq, dict(bits=4, group=32)),
    "gptq asymmetric": (GPTQ | {"sym": False}, stored.gptq, dict(bits=4, group=32, asymmetric=True)),
    "gptq version 2": (
        GPTQ | {"checkpoint_format": "gptq_v2", "bits": 8},
        partial(stored.gptq, version=2),
        dict(bits=8, group=16, asymmetric=True),
    ),
    "gptq act-order": (GPTQ | {"desc_act": True}, stored.gptq, dict(bits=4, group=16, act_order=True)),
    "gptq 2 bits": (GPTQ | {"bits": 2}, stored.gptq, dict(bits=2, group=32, asymmetric=True)),
    "gptq 3 bits per column": (
        GPTQ | {"bits": 3, "group_size": -1},
        stored.gptq,
        dict(bits=3, group=-1, asymmetric=True),
    ),
    "awq": (AWQ, stored.awq, dict(bits=4, group=32, asymmetric=True)),
    "packed": (compressed_settings(4), stored.compressed, dict(bits=4, group=32, dtype=torch.bfloat16)),
    "packed per column": (
        compressed_settings(8, strategy="channel"),
        stored.compressed,
        dict(bits=8, group=-1, dtype=torch.float32),
    ),
    "packed asymmetric": (
        compressed_settings(4, symmetric=False),
        stored.compressed,
        dict(bits=4, group=16, asymmetric=True),
    ),
    "packed act-order": (
        compressed_settings(4, actorder="group"),
        stored.compressed,
        dict(bits=4, group=16, act_order=True),
    ),
    "int-quantized": (
        compressed_settings(8, "int-quantized", strategy="channel"),
        stored.naive,
        dict(bits=8, group=-1),
    ),
    "int-quantized asymmetric": (
        compressed_settings(8, "int-quantized", symmetric=False),
        stored.naive,
        dict(bits=8, group=32, asymmetric=True),
    ),
}
for bits in (1, 2, 3, 5, 6, 7):
    SCHEMES[f"packed {bits} bits"] = (
        compressed_settings(bits, symmetric=False),
        stored.compressed,
        dict(bits=bits, group=32, asymmetric=True),
    )
for bits in (3, 6):
    SCHEMES[f"packed {bits} bits, padded words"] = (
        compressed_settings(bits, symmetric=False),
        partial(stored.compressed, dense=False),
        dict(bits=bits, group=32, asymmetric=True),
    )


@pytest.mark.parametrize("name", SCHEMES)
def test_schemes(name, plain, tmp_path):
    settings, store, options = SCHEMES[name]
    stored.quantize_folder(plain, tmp_path / "model", settings, store, drawn(**options))
    dense = logits(tmp_path / "model-dense")
    torch.testing.assert_close(logits(tmp_path / "model"), dense, rtol=0, atol=1e-4)
    assert dense.abs().max() > 0.1
    layer = model(tmp_path / "model").layers[1]
    assert [len(layer.mixer.qkv.pieces), len(layer.feed.gate_up.pieces)] == [1, 1]


def float_weights(module: str, rows: int, features_in: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed_of(module))
    return torch.randn(rows, features_in, generator=generator).mul_(20).to(torch.float8_e4m3fn)


@pytest.mark.parametrize("method", ["compressed-tensors", "fp8"])
@pytest.mark.parametrize("shape", ["tensor", "channel", "block"])
def test_float_weights(shape, method, plain, tmp_path):
    """8-bit floats with a scale of the tensor, of each output, and of blocks that do not divide the outputs."""
    tensors = load_file(plain / "model.safetensors")
    dense = dict(tensors)
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        rows, features_in = tensors[name].shape
        tensors[name] = float_weights(name, rows, features_in)
        scales = {
            "tensor": torch.rand(1),
            "channel": torch.rand(rows, 1),
            "block": torch.rand(-(-rows // 24), features_in // 32),
        }[shape].mul(0.01)
        tensors[f"{name}_scale" + ("_inv" if method == "fp8" and shape == "block" else "")] = scales
        tensors[name.replace("weight", "input_scale")] = torch.ones(1)
        spread = scales
        if shape == "block":
            spread = torch.kron(scales, torch.ones(24, 32))[:rows]
        dense[name] = tensors[name].float() * spread
    settings = compressed_settings(
        8, "float-quantized", type="float", strategy=shape, block_structure=[24, 32], group_size=None
    )
    if method == "fp8":
        settings = {"quant_method": "fp8", "weight_block_size": [24, 32] if shape == "block" else None}
    for folder, held in (("model", tensors), ("dense", dense)):
        (tmp_path / folder).mkdir()
        save_file(held, tmp_path / folder / "model.safetensors")
        config = json.loads((plain / "config.json").read_text())
        added = {"quantization_config": settings} if folder == "model" else {}
        (tmp_path / folder / "config.json").write_text(json.dumps(config | added))
    torch.testing.assert_close(logits(tmp_path / "model"), logits(tmp_path / "dense"), rtol=0, atol=1e-4)


def test_what_differs_is_not_stacked(plain, tmp_path):
    """Other widths, and other orders of inputs, in q, k and v; and one module left as it is."""
    widths = {"q_proj": 4, "k_proj": 8, "v_proj": 8}

    def mixed(module: str, rows: int, features_in: int) -> Drawn:
        bits = widths.get(module.rsplit(".", 1)[-1], 4)
        return draw(rows, features_in, bits=bits, group=16, act_order=True, seed=seed_of(module))

    groups = {
        f"group_{bits}": compressed_settings(bits)["config_groups"]["group_0"] | {"targets": targets}
        for bits, targets in ((4, ["Linear"]), (8, ["re:.*[kv]_proj$"]))
    }
    settings = compressed_settings(4) | {"config_groups": groups, "format": "mixed-precision"}
    stored.quantize_folder(plain, tmp_path / "model", settings, stored.compressed, mixed)
    torch.testing.assert_close(
        logits(tmp_path / "model"), logits(tmp_path / "model-dense"), rtol=0, atol=1e-4
    )
    assert len(model(tmp_path / "model").layers[0].mixer.qkv.pieces) == 3
    path = tmp_path / "model" / "model.safetensors"
    tensors, dense = load_file(path), load_file(tmp_path / "model-dense" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = {k: v for k, v in tensors.items() if not k.startswith(name)} | {name: dense[name]}
    save_file(tensors, path)
    torch.testing.assert_close(
        logits(tmp_path / "model"), logits(tmp_path / "model-dense"), rtol=0, atol=1e-4
    )


def test_bfloat16(plain, tmp_path):
    stored.quantize_folder(plain, tmp_path / "model", GPTQ, stored.gptq, drawn(bits=4, group=32))
    found, dense = (logits(tmp_path / name, "bfloat16") for name in ("model", "model-dense"))
    assert (found - dense).square().mean() < 1e-3 * dense.square().mean()


@pytest.fixture
def folder(plain, tmp_path) -> Path:
    """A GPTQ checkpoint that a test may spoil."""
    stored.quantize_folder(
        plain, tmp_path / "model", GPTQ, stored.gptq, drawn(bits=4, group=32, asymmetric=True)
    )
    return tmp_path / "model"


def spoil(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")


def configure(folder: Path, **settings) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= settings
    (folder / "config.json").write_text(json.dumps(config))


MODULE = "model.layers.1.mlp.up_proj"


def test_biases_that_are_zero(folder):
    """AutoGPTQ gives every layer one."""
    before = logits(folder)
    spoil(folder, lambda t: t.update({f"{MODULE}.bias": torch.zeros(96)}))
    assert torch.equal(logits(folder), before)
    spoil(folder, lambda t: t[f"{MODULE}.bias"].add_(1))
    with pytest.raises(CheckpointError, match=rf"unexpected tensors for LlamaForCausalLM: {MODULE}.bias"):
        model(folder)


def test_a_quantized_head(plain, folder):
    head = draw(160, 64, bits=8, group=16)
    spoil(
        folder,
        lambda t: (
            t.pop("lm_head.weight"),
            t.update({f"lm_head.{k}": v for k, v in stored.gptq(head).items()}),
        ),
    )
    dense = load_file(folder.with_name("model-dense") / "model.safetensors") | {"lm_head.weight": head.weight}
    save_file(dense, folder.with_name("model-dense") / "model.safetensors")
    torch.testing.assert_close(logits(folder), logits(folder.with_name("model-dense")), rtol=0, atol=1e-4)


def test_float16_models_run_in_bfloat16(folder):
    """Unless they are told to."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    assert Checkpoint(folder).dtype() == "bfloat16"
    assert Checkpoint(folder).dtype("float16") == "float16"
    exact = logits(folder, "float32")
    for dtype in ("auto", "float16"):
        assert (logits(folder, dtype) - exact).square().mean() < 1e-2 * exact.square().mean()


def test_the_fingerprint_tells_codes_apart(folder):
    before = Checkpoint(folder).fingerprint()
    spoil(folder, lambda t: t[f"{MODULE}.qweight"].add_(1))
    assert Checkpoint(folder).fingerprint() != before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[f"{MODULE}.scales"].fill_(torch.nan), rf"{MODULE}: scales hold NaN"),
        (lambda t: t["model.norm.weight"].fill_(torch.inf), "'model.norm.weight' holds NaN or infinite"),
        (lambda t: t.pop(f"{MODULE}.qzeros"), rf"'{MODULE}.qzeros' is missing"),
        (lambda t: t.update({f"{MODULE}.scales": torch.ones(3, 96)}), "3 groups do not divide its 64 inputs"),
        (
            lambda t: t.update(
                {f"{MODULE}.scales": torch.ones(3, 96), f"{MODULE}.qzeros": t[f"{MODULE}.qzeros"][[0, 0, 0]]}
            ),
            "3 groups do not divide its 64 inputs",
        ),
        (
            lambda t: t[f"{MODULE}.g_idx"][:3].fill_(1),
            "groups of 29 to 35 inputs: a group size that does not divide",
        ),
        (lambda t: t[f"{MODULE}.g_idx"].fill_(7), "does not give each of 64 inputs one of 2 groups"),
        (lambda t: t.update({f"{MODULE}.qweight": t[f"{MODULE}.qweight"][:, 1:]}), f"{MODULE}: .*do not fit"),
        (
            lambda t: t.update({f"{MODULE}.qweight": t[f"{MODULE}.qweight"][:1]}),
            r"qweight \[1, 96\].*GPTQ, 4 bits",
        ),
    ],
)
def test_weights_that_cannot_be_served(folder, change, message):
    spoil(folder, change)
    with pytest.raises(HeadraceError, match=message):
        model(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "'bitsandbytes' are not supported; supported: awq, compressed"),
        ({"checkpoint_format": "marlin"}, "GPTQ checkpoint format 'marlin' is not supported"),
        ({"bits": 5}, "bits 5 and group_size 32 is not supported; bits are one of"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "FP8 weights of kind 'e5m2' are not supported"),
        (AWQ | {"version": "gemv"}, "AWQ version 'gemv' is not supported"),
        (AWQ | {"bits": 8}, "AWQ with bits 8"),
        (compressed_settings(4, "nvfp4-pack-quantized"), "format 'nvfp4-pack-quantized' is not supported"),
        (compressed_settings(4) | {"config_groups": {}}, "no config_groups"),
        (compressed_settings(9), "int weights of 9 bits"),
        (compressed_settings(4, type="float"), "float weights of 4 bits"),
        (compressed_settings(4, dynamic=True), "quantized as they are used"),
        (compressed_settings(4) | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
    ],
)
def test_schemes_that_cannot_be_served(folder, settings, message):
    configure(folder, **settings)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(folder)


def test_a_module_that_no_group_targets(plain, tmp_path):
    settings = compressed_settings(4)
    settings["config_groups"]["group_0"]["targets"] = ["re:.*mlp.*"]
    stored.quantize_folder(plain, tmp_path / "model", settings, stored.compressed, drawn(bits=4, group=32))
    with pytest.raises(CheckpointError, match=r"q_proj: no config group of its compressed-tensors pack"):
        model(tmp_path / "model")


def test_a_weight_of_another_shape(plain, tmp_path):
    stored.quantize_folder(
        plain, tmp_path / "model", compressed_settings(4), stored.compressed, drawn(bits=4, group=32)
    )
    spoil(tmp_path / "model", lambda t: t[f"{MODULE}.weight_shape"].fill_(64))
    with pytest.raises(CheckpointError, match=rf"{MODULE}: weight_shape \[64, 64\] does not fit \[96, 64\]"):
        model(tmp_path / "model")


def test_weights_are_handed_out_once(folder):
    weights = Weights(Checkpoint(folder), torch.float32)
    weights.matrices([(MODULE, 96)], 64)
    with pytest.raises((CheckpointError, ConfigError), match="is missing"):
        weights.matrices([(MODULE, 96)], 64)
