import pytest
import torch

from headrace.compute.quant import Format
from headrace.types.errors import ConfigError

INTEGERS = [f"int{bits}" for bits in range(2, 9)] + [f"uint{bits}" for bits in range(1, 9)]
FLOATS = [f"e{e}m{bits - 1 - e}" for bits in range(3, 9) for e in range(1, min(bits, 6))]


@pytest.mark.parametrize("bits", range(1, 9))
def test_integers(bits: int) -> None:
    assert Format("unsigned", bits).values().tolist() == list(range(2**bits))
    if bits > 1:
        half = 2 ** (bits - 1)
        assert Format("signed", bits).values().tolist() == [*range(half), *range(-half, 0)]


def test_known_floats() -> None:
    """Tables of the Microscaling specification, and torch's own 8-bit types."""
    magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert Format.named("e2m1").values().tolist() == magnitudes + [-m for m in magnitudes]
    six = Format.named("e3m2").values()
    assert (six[1].item(), six[31].item()) == (0.0625, 28.0)
    assert Format.named("e2m3").values()[31].item() == 7.5
    codes = torch.arange(256, dtype=torch.uint8)
    for name, dtype in (("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)):
        expected = codes.view(dtype).float()
        assert torch.equal(Format.named(name).values().nan_to_num(nan=1e9), expected.nan_to_num(nan=1e9))


@pytest.mark.parametrize("name", INTEGERS + FLOATS)
def test_every_value_is_exact_in_bf16(name: str) -> None:
    form = Format.named(name)
    assert Format.named(form.name) == form
    values = form.values()
    assert len(values) == 2**form.bits
    finite = values[values.isfinite()]
    assert torch.equal(finite.bfloat16().float(), finite)
    assert len(finite.unique()) == len(finite) - (form.kind == "float")  # of 0 and -0


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("int9", "9 bits"),
        ("int1", "2 to 8"),
        ("uint0", "1 to 8"),
        ("uint16", "16 bits"),
        ("e1m0", "3 to 8"),
        ("e0m3", "exponent"),
        ("e6m1", "exponent"),
        ("e5m3", "9 bits"),
        ("nf4", "not known"),
        ("", "not known"),
    ],
)
def test_what_is_no_format_is_named(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Format.named(name)


def test_odd_fields_are_refused() -> None:
    with pytest.raises(ConfigError, match="kind 'complex'"):
        Format("complex", 4)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no exponent"):
        Format("signed", 4, 2)
