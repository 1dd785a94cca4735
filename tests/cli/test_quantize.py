"""`headrace quantize` as a user runs it, and what it wrote as `headrace generate` and `headrace serve` take it."""

import json
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

from headrace.cli.wiring import BUNDLED
from headrace.compute import models
from headrace.compute.checkpoint import Checkpoint
from headrace.compute.numerics import self_test
from tests.cli.running import serving
from tests.cli.test_commands import headrace

TEXT = "\n".join(f"def function_{i}(self, value):\n    return self.value_{i} + value\n" for i in range(120))


@pytest.fixture(scope="module")
def quantized(tmp_path_factory) -> Path:
    """The bundled model at 4 bits, with GPTQ on a short text."""
    folder = tmp_path_factory.mktemp("quantized")
    (folder / "text.py").write_text(TEXT)
    done = headrace(
        *(
            "quantize",
            "--bits",
            "4",
            "--calibrate",
            str(folder / "text.py"),
            "--samples",
            "4",
            "--length",
            "64",
        ),
        *("--evaluate-tokens", "500", "--threads", "1", "--output", str(folder / "model")),
    )
    assert done.returncode == 0, done.stderr
    assert "42 matrices: 6.9 MiB became 1.8 (3.85x smaller)" in done.stdout
    assert f"{folder / 'model'}: 4 bits, GPTQ" in done.stdout
    assert "Groups of 128 do not divide the inputs of all matrices" in done.stdout
    assert "Perplexity on 248 tokens (the last tenth of text.py, not calibrated on)" in done.stdout
    return folder / "model"


def test_generate_and_serve(quantized):
    """The same text from both, and other arithmetic than the plain model's."""
    flags = ("--prefill", "1", "--decode", "1", "--threads", "1")
    done = headrace("generate", str(quantized), "--max-tokens", "8", *flags, given="import os")
    assert done.returncode == 0, done.stderr
    (choice,) = json.loads(done.stdout)["choices"]
    assert choice["finish_reason"] == "length" and choice["text"]
    body = {"model": "model", "prompt": "import os", "max_tokens": 8, "temperature": 0}
    with serving(str(quantized), *flags) as server:
        asked = Request(
            f"{server.url}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urlopen(asked, timeout=60) as answer:
            said = json.load(answer)
    assert said["choices"][0]["text"] == choice["text"]
    assert numerics_id(quantized) in said["system_fingerprint"]
    assert numerics_id(quantized) != numerics_id(BUNDLED)


def numerics_id(folder: Path) -> str:
    checkpoint = Checkpoint(folder)
    return self_test(models.load(checkpoint, length=256), models.kv_spec(checkpoint), 1).id


def test_serve_refuses_pushes(quantized):
    done = headrace("serve", str(quantized), "--port", "0", "--push-key", "secret")
    assert done.returncode == 2
    assert "--push-key: weights can be pushed to a model that is not quantized" in done.stderr
    assert "compressed-tensors pack-quantized, int4" in done.stderr


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--bits", "9"], "weights of 9 bits are not supported: 1 to 8"),
        (["--bits", "1"], "one bit cannot be symmetric"),
        (["--group", "100"], "groups of 100 do not divide its 256 inputs"),
        (["--scales", "guess"], "--scales is search or minmax"),
        (["--act-order", "random"], "--act-order is none, static or group"),
        (["--calibrate", "no/such.txt"], "--calibrate no/such.txt"),
        (["--output", str(BUNDLED)], "exists and is not empty; nothing is overwritten"),
        (["no/such/folder"], "config.json does not exist"),
    ],
)
def test_what_is_wrong_is_named(flags, named, tmp_path):
    output = [] if "--output" in flags else ["--output", str(tmp_path / "out")]
    done = headrace("quantize", *flags, *output)
    assert done.returncode == 2, done.stderr
    assert named in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
