"""From a settings file to a cluster: what is read, what follows from what, and which words meet a mistake."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from headrace.cli import catalogue, models
from headrace.cli.cluster import cluster_of
from headrace.cli.flags import EXAMPLES, ClusterSource
from headrace.cli.machines import COST_ERRORS
from headrace.cli.models import length_max, model_config
from headrace.cli.options import CLUSTERS, ClusterOptions, EngineOptions, ServeOptions, resolve
from headrace.cost.arithmetic import shape_of
from headrace.cost.memory import memory_bytes_for_kv
from headrace.sim.cluster import Cluster
from headrace.sim.topology import Links
from headrace.types.errors import ConfigError
from tests.cli.recordings import profile_file
from tests.cost import models as known_models

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def options(**settings: Any) -> ClusterOptions:
    stated = {"model": "llama-3.1-8b", "hardware": "h100-sxm", **settings}
    return resolve(ClusterOptions, None, {key: value for key, value in stated.items() if value is not None})


def cluster(**settings: Any) -> Cluster:
    return cluster_of(options(**settings))


def test_one_file_serves_every_command(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(
        "model: llama-3.1-8b\nport: 8123\nthreads: 1\nhardware: h100-sxm\nfaults: {kills: [{at: 1, instance: worker0}]}\n"
        "cluster.placement: round_robin\nengine.ordering: priority\nkv.evict: {name: lru}\n"
        "max-num-seqs: 7\ninstances: 2\nstream_interval: 4\n"
    )
    simulated = resolve(ClusterOptions, file, {})
    served = resolve(ServeOptions, file, {})
    assert served.port == 8123 and served.max_num_seqs == simulated.max_num_seqs == 7
    assert served.placement.name == simulated.placement.name == "round_robin"
    assert served.scheduling_policy.name == "priority" and served.stream_interval == 4
    assert resolve(EngineOptions, file, {}).threads == 1
    assert simulated.faults is not None and simulated.faults.kills[0].instance == "worker0"
    made = cluster_of(simulated)
    assert made.instance.sequences_max == 7 and made.instance.stream_interval == 4
    assert made.mishaps.kills == ((1_000_000_000, "worker0"),)
    placement = made.policy("cluster.placement")
    assert placement is not None and placement.name == "round_robin"
    assert made.settings["placement"] == "round_robin" and made.settings["max-num-seqs"] == 7
    assert "batching" not in made.settings


def test_what_is_simulated_is_served(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("roles: load_states\nrebalance: virtual_usage\n")
    for options in (ClusterOptions, ServeOptions):
        made = resolve(options, file, {})
        assert made.rebalance is not None and made.rebalance.name == "virtual_usage"


def test_memory_and_blocks_follow_from_model_and_device() -> None:
    made = cluster(instances=2, block_size=64, gpu_memory_utilization=0.8, max_num_batched_tokens=1024)
    shape = shape_of(known_models.LLAMA_8B)
    left = memory_bytes_for_kv(shape, catalogue.hardware("h100-sxm"), utilization=0.8, tokens_max=1024)
    assert made.members[0].blocks == (left // (64 * 131072),)
    assert cluster(instances=1, kv_memory="1GiB", block_size=64).members[0].blocks == (128,)
    assert made.members[0].pool is None and [m.name for m in made.members] == ["worker0", "worker1"]


def test_roles_have_devices_and_hosts_of_their_own() -> None:
    made = cluster(
        prefill=2,
        decode=3,
        hardware={"prefill": "h100-sxm", "decode": "h20"},
        tensor_parallel={"prefill": 4, "decode": 8},
    )
    assert [m.place for m in made.members] == [(0, 0), (0, 1), (1, 0), (2, 0), (3, 0)]
    assert made.members[0].costs.step_ps([(1024, 0)], 0, 0) != made.members[2].costs.step_ps(
        [(1024, 0)], 0, 0
    )
    inner = min(
        4 * catalogue.hardware("h100-sxm").link.bandwidth, 8 * catalogue.hardware("h20").link.bandwidth
    )
    assert made.topology.levels[0].out_bytes_per_s == int(inner)
    assert "h20 (decode)" in made.facts["cost_model"]
    Links(made.topology).check(m.place for m in made.members)


def test_instances_fill_hosts_and_racks_as_asked() -> None:
    network = {
        "rack": {"bandwidth": "4e9", "latency": 1e-5},
        "steps": [{"at": 3, "level": "rack", "factor": 0.5}],
    }
    made = cluster(instances=8, hosts={"instances": 2, "per_rack": 2}, network=network)
    assert [m.place for m in made.members] == [(i // 2, i % 2) for i in range(8)]
    assert [host.rack for host in made.topology.hosts] == [0, 0, 1, 1]
    assert [level.name for level in made.topology.levels] == ["device", "host", "rack"]
    assert made.topology.levels[2].out_bytes_per_s == 4_000_000_000
    assert made.topology.steps[0].at_ns == 3_000_000_000


def test_a_shared_pool_is_one_and_on_one_host() -> None:
    made = cluster(
        model=None, hardware="epyc-2core", prefill=1, decode=1, separate_pools=False, kv_memory="64MiB"
    )
    assert {m.pool for m in made.members} == {0} and {m.place[0] for m in made.members} == {0}
    with pytest.raises(ConfigError, match="cannot share a pool"):
        cluster(instances=4, separate_pools=False, hosts={"instances": 2})


def test_what_is_measured_on_a_machine(tmp_path: Path) -> None:
    path = profile_file(tmp_path)
    made = cluster(model=None, hardware=None, profile=path, kv_memory="32MiB", prefill=1, decode=1)
    assert made.slowdown is not None and made.slowdown("decode", ("prefill",)) == 1.5
    assert (made.ingress_ns, made.egress_ns, made.message_ns) == (1_000_000, 1_000_000, 100_000)
    assert {m.pool for m in made.members} == {0}
    assert "profile of" in made.facts["cost_model"] and "held-out median of" in made.facts["cost_error"]
    apart = cluster(model=None, hardware=None, profile=path, kv_memory="32MiB", separate_pools=True)
    assert [m.pool for m in apart.members] == [None, None]
    assert apart.topology.levels[0].out_bytes_per_s == pytest.approx(1e9, rel=0.01)
    for wrong, named in (
        ({"kv_memory": "auto"}, "--kv-memory"),
        ({"hardware": "h20"}, "--hardware"),
        ({"model": "llama-3.1-8b"}, "profile that one"),
    ):
        with pytest.raises(ConfigError, match=named):
            cluster(**{"model": None, "hardware": None, "profile": path, "kv_memory": "32MiB", **wrong})


@pytest.mark.parametrize("name", models.names())
def test_known_shapes_are_whole(name: str) -> None:
    known = options(model=name)
    config = model_config(known)
    assert shape_of(config).parameters > 5e8
    assert length_max(known, config) == config["max_position_embeddings"]


def test_known_shapes_are_those_of_the_cost_tests() -> None:
    for name, known in (
        ("llama-3.1-8b", known_models.LLAMA_8B),
        ("llama-3.1-70b", known_models.LLAMA_70B),
        ("deepseek-v3", known_models.DEEPSEEK_V3),
        ("mixtral-8x7b", known_models.MIXTRAL),
        ("qwen3-0.6b", known_models.QWEN3_06B),
    ):
        assert shape_of(model_config(options(model=name))) == shape_of(known)


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_clusters(name: str) -> None:
    file, called = ClusterSource().file(Path(name))
    assert file == CLUSTERS / f"{name}.yaml" and called == name
    assert len(cluster_of(resolve(ClusterOptions, file, {}, called)).members) >= 2


def test_the_errors_that_are_shown_are_those_of_the_fit() -> None:
    shown: dict[str, dict[str, float]] = yaml.safe_load(COST_ERRORS.read_text())
    tables = json.loads((RESULTS / "cost_fit.json").read_text())["figures"]["tables"]
    for device, errors in shown.items():
        for kind, value in errors.items():
            fitted = [
                table["held_out"]["median"]
                for table in tables
                if table["device"] == device and table["what"].replace(", ", "_").replace(" ", "_") == kind
            ]
            assert value == fitted[0]
    assert (
        cluster(instances=1).facts["cost_error"]["held-out median of"]["products bf16"]
        == shown["h100-sxm"]["products_bf16"]
    )
    assert "not measured" in cluster(instances=1, hardware="h20").facts["cost_error"]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"hardware": None}, "--hardware, one of: a100"),
        ({"hardware": "h100"}, "did you mean h100-sxm"),
        ({"hardware": {"decode": "h20"}, "prefill": 1}, "add prefill"),
        ({"hardware": {"prefil": "h20"}}, "'prefil' is not a role"),
        ({"model": "llama-8b"}, "did you mean llama-3.1-8b"),
        ({"model": "llama-3.1-70b"}, r"61\.\d GiB more than there is"),
        ({"hardware": "rtx-4090", "max_model_len": 100_000}, r"GiB more\. Use a shorter context"),
        ({"kv_memory": "1GiB", "max_model_len": 10_000}, r"57 more, 228\.0 MiB"),
        ({"tensor_parallel": 3}, "does not divide the 32 attention heads"),
        ({"placement": "best"}, "there are: .*least_load"),
        ({"roles": "dance"}, "--roles: .*load_states"),
        ({"faults": {"kils": []}}, "faults: kils is not a setting of it; did you mean kills"),
        (
            {"faults": {"kills": [{"at": -1, "instance": "worker0"}]}},
            r"faults: kills\.0\.at: .*greater than or equal",
        ),
        ({"faults": {"slow": {"nobody": 2}}}, "no instance 'nobody'"),
        ({"faults": {"slow": {"prefill0": 0}}}, "give more than 0"),
        ({"hosts": {"count": 1, "instances": 1}}, "take 2 hosts"),
        ({"hosts": {"instances": 1, "per_rack": 1}}, "add the level `rack`"),
        ({"network": {"host": {"bandwidth": 0}}}, "must be positive"),
        ({"network": {"steps": [{"at": 1, "level": "rack", "factor": 0.5}]}}, "no such level"),
        ({"prefill": 0, "decode": 0}, "leaves no worker"),
    ],
)
def test_what_is_wrong_is_named(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        cluster(**settings)


def test_a_key_that_nobody_knows_meets_the_nearest(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    for line, near in (
        ("placment: x", "placement"),
        ("cluster.placemnt: x", "cluster.placement"),
        ("hardwear: x", "hardware"),
    ):
        file.write_text(line + "\n")
        with pytest.raises(ConfigError, match=f"is not a setting; did you mean {near}"):
            resolve(ClusterOptions, file, {}, str(file))
        with pytest.raises(ConfigError, match="did you mean"):
            resolve(ServeOptions, file, {})


def test_more_than_the_model_is_meant_for() -> None:
    asked = options(max_model_len=200_000)
    with pytest.raises(ConfigError, match="exceeds the 131072 tokens"):
        length_max(asked, model_config(asked))
