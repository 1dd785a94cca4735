"""What "equal" means: the same bits of every logit, however a sequence's tokens are batched, chunked or threaded."""

import pytest
import torch

from headrace.compute import ops
from headrace.compute.layers.rotary import Rope, Rotary
from headrace.compute.numerics import self_test
from tests.compute.harness import all_logits, load, make_model

FAMILIES = {
    "llama": dict(num_key_value_heads=2, head_dim=32),
    "mistral": dict(num_key_value_heads=1, head_dim=16, sliding_window=40),
    "qwen2": dict(num_key_value_heads=2, attention_bias=True, use_sliding_window=True, max_window_layers=1),
    "qwen3": dict(num_key_value_heads=4, head_dim=64),
}
LENGTHS = (130, 17, 48, 1, 75)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def dtype(request) -> str:
    return request.param


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request, dtype, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_model(request.param, seed=3, **FAMILIES[request.param]).save_pretrained(folder)
    return load(folder, dtype)


@pytest.fixture(scope="module")
def wide(dtype, tmp_path_factory):
    """As wide as it takes for torch's own linear to differ between a lone row and many."""
    folder = tmp_path_factory.mktemp("wide")
    sizes = dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=2, num_attention_heads=8)
    make_model("qwen3", seed=1, num_key_value_heads=4, head_dim=128, **sizes).save_pretrained(folder)
    return load(folder, dtype)


def sequences(lengths=LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(9)
    return [torch.randint(0, 160, (n,), generator=generator).tolist() for n in lengths]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor], dtype: str) -> None:
    """The same bits where that is promised (native kernels), else about the same."""
    promised = ops.describe(getattr(torch, dtype))["invariant"]
    tolerance = 0.0 if promised else 1e-4 if dtype == "float32" else 0.5
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("threads", [1, 2])
def test_every_batch_and_chunking_gives_the_same_bits(loaded, dtype, threads):
    model, spec = loaded
    ids = sequences()
    alone = [all_logits(model, spec, [one])[0] for one in ids]
    assert_same(all_logits(model, spec, ids, threads=threads), alone, dtype)
    for seed in range(3):
        assert_same(all_logits(model, spec, ids, seed=seed, threads=threads), alone, dtype)


def test_recomputation_gives_the_same_bits(loaded, dtype):
    """A failover prefills what was decoded one by one."""
    model, spec = loaded
    ids = sequences((40,))
    decoded = [all_logits(model, spec, [ids[0][:n]])[0][-1:] for n in range(1, 41)]
    assert_same(all_logits(model, spec, ids), [torch.cat(decoded)], dtype)


def test_rotary_tables_do_not_depend_on_their_length_or_threads():
    rope = Rope(rope_type="dynamic", factor=4.0)
    torch.set_num_threads(2)
    long, short = (Rotary(rope, 20, length, 512, torch.float32) for length in (5000, 1111))
    assert torch.equal(long.cos[:1111], short.cos)
    assert torch.equal(long.sin[:1111], short.sin)


def test_wide_layers(wide, dtype):
    model, spec = wide
    ids = sequences((33, 5, 64))
    alone = [all_logits(model, spec, [one])[0] for one in ids]
    assert_same(all_logits(model, spec, ids, seed=5, threads=2), alone, dtype)


def test_bfloat16_is_as_close_to_the_truth_as_transformers(tmp_path):
    model = make_model("llama", seed=4, num_key_value_heads=2)
    model.save_pretrained(tmp_path)
    ids = sequences((80,))
    # Rounded weights in f32: what remains is the error of the arithmetic.
    rounded = model.bfloat16().float()
    with torch.no_grad():
        truth = rounded(torch.tensor(ids)).logits[0]
        theirs = model.bfloat16()(torch.tensor(ids)).logits[0].float()
    ours = all_logits(*load(tmp_path, "bfloat16"), ids)[0]
    assert (ours - truth).square().mean() < 1.2 * (theirs - truth).square().mean()


def test_self_test(wide, loaded, dtype):
    for model, spec in (wide, loaded):
        numerics = self_test(model, spec, threads=2)
        assert numerics == self_test(model, spec, threads=1) or not numerics.invariant
        assert numerics.invariant == ops.describe(model.dtype)["invariant"]
        assert len(numerics.id) == 16


def test_self_test_tells_models_and_types_apart(tmp_path):
    ids = set()
    for seed in (1, 2):
        make_model("llama", seed=seed).save_pretrained(tmp_path / str(seed))
        for dtype in ("float32", "bfloat16"):
            ids.add(self_test(*load(tmp_path / str(seed), dtype), threads=1).id)
    assert len(ids) == 4


def test_self_test_of_a_short_model(tmp_path):
    make_model("llama", seed=1).save_pretrained(tmp_path)
    assert len(self_test(*load(tmp_path, length=3), threads=1).id) == 16


def test_float16_runs_and_promises_nothing(tmp_path):
    make_model("qwen2", seed=2, num_key_value_heads=2).save_pretrained(tmp_path)
    ids = sequences((50,))
    exact = all_logits(*load(tmp_path, "float32"), ids)[0]
    torch.testing.assert_close(all_logits(*load(tmp_path, "float16"), ids)[0], exact, rtol=0, atol=0.05)
    assert not self_test(*load(tmp_path, "float16"), threads=1).invariant
