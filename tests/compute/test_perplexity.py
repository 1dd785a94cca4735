import math

import pytest
import torch

from headrace.compute import perplexity
from tests.compute import harness


def test_as_transformers_has_it(tmp_path):
    """Windows that predict across their ends, chunks inside them, and a last window that is shorter."""
    model = harness.make_model("llama", seed=3, num_key_value_heads=2)
    model.save_pretrained(tmp_path)
    ids = torch.randint(0, 160, (701,), generator=torch.Generator().manual_seed(1)).tolist()
    loss = 0.0
    for begin in range(0, 700, 300):
        window = ids[begin : begin + 300][: 700 - begin]
        logits = harness.reference(model, window)
        wanted = torch.tensor(ids[begin + 1 : begin + 1 + len(window)])
        loss += float(torch.nn.functional.cross_entropy(logits.double(), wanted, reduction="sum"))
    told = []
    decoder, spec = harness.load(tmp_path, length=300)
    found = perplexity.measure(
        decoder, spec, ids, window=300, threads=1, progress=lambda done, total: told.append((done, total))
    )
    assert found.tokens == 700
    assert found.loss == pytest.approx(loss / 700, rel=1e-5)
    assert found.value == pytest.approx(math.exp(loss / 700), rel=1e-4)
    assert told == [(256, 700), (300, 700), (556, 700), (600, 700), (700, 700)]
    with pytest.raises(ValueError, match="at least two tokens"):
        perplexity.measure(decoder, spec, ids[:1], window=300, threads=1)
