import pytest
import yaml

from headrace.cli import catalogue
from headrace.cost.hardware import SOURCED
from headrace.types.errors import ConfigError


def test_every_file_is_valid():
    assert set(catalogue.names()) == {
        "a100-80g-sxm",
        "epyc-2core",
        "h100-sxm",
        "h200-sxm",
        "h20",
        "l20",
        "l40s",
        "rtx-4090",
        "rtx-pro-6000",
    }
    for name in catalogue.names():
        device = catalogue.hardware(name)
        assert device.name == name
        assert all(len(device.source[key]) > 5 for key in SOURCED)
        assert device.rates.bf16 > 1e11 and device.memory_bandwidth > 1e10
        assert all(
            0.2 < gemm.compute <= 1 and 0.5 < gemm.memory <= 1 for gemm in device.efficiency.gemm.values()
        )
        if device.devices_per_host > 1:
            assert device.all_reduce(device.devices_per_host).seconds(1 << 20) < 0.01


def test_an_unknown_name_gives_the_nearest():
    with pytest.raises(ConfigError, match="did you mean h100-sxm"):
        catalogue.hardware("H100-SMX")
    with pytest.raises(ConfigError, match=r"'zzz' in the catalogue. It has: a100-80g-sxm, epyc-2core"):
        catalogue.hardware("zzz")


def written(tmp_path, change):
    tree = yaml.safe_load((catalogue.FOLDER / "h100-sxm.yaml").read_text())
    change(tree)
    path = tmp_path / "h100-sxm.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("nic"), "nic"),
        (lambda t: t["rates"].pop("fp8"), "fp8"),
        (lambda t: t.update(colour="green"), "colour"),
        (lambda t: t["efficiency"]["gemm"]["bf16"].update(warmth=1.0), "warmth"),
        (lambda t: t.update(memory_bandwidth="fast"), "memory_bandwidth"),
        (lambda t: t.update(memory_bandwidth=-1.0), "memory_bandwidth is -1"),
        (lambda t: t["efficiency"]["gemm"]["bf16"].update(compute=0.0), "efficiency.gemm.bf16.compute is 0"),
        (lambda t: t["efficiency"]["gemm"].pop("bf16"), "needs bf16"),
        (lambda t: t["source"].pop("price"), "price"),
        (lambda t: t.update(devices_per_host=0), "devices_per_host"),
        (lambda t: t.update(name="h300"), "name is 'h300', expected 'h100-sxm'"),
    ],
)
def test_a_file_that_is_wrong(tmp_path, change, words):
    with pytest.raises(ConfigError) as caught:
        catalogue.read(written(tmp_path, change))
    assert "h100-sxm.yaml" in str(caught.value) and words in str(caught.value)


def test_a_file_that_is_no_yaml(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("name: [")
    with pytest.raises(ConfigError, match=r"x.yaml"):
        catalogue.read(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"x.yaml"):
        catalogue.read(path)
