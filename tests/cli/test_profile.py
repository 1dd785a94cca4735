"""`headrace profile` on the bundled model, with limits that make the grid tiny."""

import asyncio
from pathlib import Path

import msgspec
import pytest

from headrace.cli.options import EngineOptions, resolve
from headrace.cli.profile import check_limits, profile
from headrace.live.shapes import Limits
from headrace.types.errors import ConfigError
from headrace.types.profile import Profile

LIMITS = {"threads": 1, "max_model_len": 128, "max_num_batched_tokens": 32, "max_num_seqs": 4}
SMALL = resolve(EngineOptions, None, LIMITS)


def test_a_profile_holds_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "profile.json"
    made = asyncio.run(profile(SMALL, out, quick=True))
    read = msgspec.json.decode(out.read_bytes(), type=Profile)
    assert read == made and read.format == 1
    said = capsys.readouterr().out
    assert "decode, 1 sequence," in said and "prefill beside" in said and "GB/s" in said
    assert (read.model, read.dtype, read.block_size, read.threads) == (
        "headrace-python-5m",
        "bfloat16",
        32,
        1,
    )
    assert read.config["hidden_size"] == 256 and read.device and read.engine_version
    kinds = {(bool(step.prefills), step.decodes > 0) for step in read.steps}
    assert kinds == {(True, False), (False, True), (True, True)}
    for step in read.steps:
        assert len(step.seconds) >= 7 and 0 < min(step.seconds) <= max(step.seconds) < 5
        assert sum(tokens for tokens, _ in step.prefills) + step.decodes <= 32 and step.decodes <= 4
    assert [(pair.kind, pair.beside) for pair in read.pairs] == [
        (kind, beside) for kind in ("prefill", "decode") for beside in ("prefill", "decode")
    ]
    assert all(pair.slowdown > 0 for pair in read.pairs)
    assert {copy.writes for copy in read.copies} >= {1, 4} and all(len(c.seconds) == 7 for c in read.copies)
    sizes = sorted({copy.nbytes for copy in read.copies})
    assert sizes[0] == 32 * 6 * 2 * 2 * 32 * 2
    assert 0 < read.message_s < 5 and 0 <= read.step_overhead_s < 5 and 0 <= read.request_overhead_s < 5


def test_limits_that_leave_nothing_to_measure_are_named() -> None:
    with pytest.raises(ConfigError, match="64 are needed"):
        check_limits(Limits(tokens=512, sequences=8, length=32, blocks=300, block_size=32))
    with pytest.raises(ConfigError, match="room for 3 each"):
        check_limits(Limits(tokens=512, sequences=8, length=2048, blocks=3, block_size=32))


def test_what_cannot_be_written_is_said_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        asyncio.run(profile(SMALL, tmp_path / "none" / "p.json", quick=True))
    with pytest.raises(ConfigError, match="is a folder"):
        asyncio.run(profile(SMALL, tmp_path, quick=True))
