import msgspec
import pytest

from headrace.sim.topology import Change, Host, Level, Links, Path, Step, Topology, regular
from headrace.types.errors import ConfigError

DEVICE = Level("device", 900, 900, 1)
HOST = Level("host", 50, 40, 10)
RACK = Level("rack", 300, 200, 100)
CLUSTER = Level("cluster", 1_000, 1_000, 1_000)
DATACENTRE = Level("datacentre", 10, 10, 10_000)
ALL = (DEVICE, HOST, RACK, CLUSTER, DATACENTRE)


def lay(*levels: Level, **fields: object) -> Topology:
    return msgspec.structs.replace(Topology(levels, (Host(),)), **fields)


def named(links: Links, path: Path) -> list[str]:
    return [links.names[link] for link in path.links]


def test_a_path_goes_up_to_where_two_hosts_meet_and_down_again():
    links = Links(regular(ALL, 16, 2, hosts_per_rack=2, racks_per_cluster=2, clusters_per_datacentre=2))
    here = (0, 1)
    assert links.path(here, here) == Path((), 0)
    inside = links.path(here, (0, 0))
    assert named(links, inside) == ["device 1 out", "device 0 in"] and inside.latency_ns == 1
    same_rack = links.path(here, (1, 1))
    assert named(links, same_rack) == ["host 0 out", "host 1 in"] and same_rack.latency_ns == 10
    same_cluster = links.path(here, (3, 0))
    assert named(links, same_cluster) == ["host 0 out", "rack 0 out", "rack 1 in", "host 3 in"]
    assert same_cluster.latency_ns == 110
    same_datacentre = links.path((4, 0), (1, 0))
    assert named(links, same_datacentre) == [
        "host 4 out", "rack 2 out", "cluster 1 out", "cluster 0 in", "rack 0 in", "host 1 in"
    ]  # fmt: skip
    far = links.path((0, 0), (15, 1))
    assert named(links, far) == [
        "host 0 out", "rack 0 out", "cluster 0 out", "datacentre 0 out",
        "datacentre 1 in", "cluster 3 in", "rack 7 in", "host 15 in",
    ]  # fmt: skip
    assert far.latency_ns == 11_110


def test_devices_are_counted_through_hosts_of_different_sizes():
    links = Links(lay(DEVICE, HOST, hosts=(Host(devices=3), Host(devices=1), Host(devices=2))))
    assert named(links, links.path((2, 1), (2, 0))) == ["device 5 out", "device 4 in"]


def test_links_are_numbered_by_level_then_unit_with_their_capacities():
    links = Links(lay(HOST, DEVICE, hosts=(Host(devices=2), Host())))
    assert links.names == [
        *("device 0 out", "device 0 in", "device 1 out", "device 1 in", "device 2 out", "device 2 in"),
        *("host 0 out", "host 0 in", "host 1 out", "host 1 in"),
    ]
    assert links.capacities == [900] * 6 + [50, 40] * 2


def test_a_level_that_no_two_hosts_need_may_be_missing():
    links = Links(regular((HOST,), 4))
    assert links.path((0, 0), (3, 0)) == Path((0, 7), 10)
    gap = Links(regular((HOST, CLUSTER), 4))
    assert gap.path((0, 0), (3, 0)) == Path((0, 7), 10)


def test_regular_fills_units_in_order():
    topology = regular(ALL, 5, 8, hosts_per_rack=2, racks_per_cluster=2)
    assert [host.rack for host in topology.hosts] == [0, 0, 1, 1, 2]
    assert topology.racks == (0, 0, 1) and topology.clusters == (0, 0) and topology.datacentres == 1
    assert topology.place(4) == (4, 2, 1, 0)


def test_steps_of_levels_and_units():
    steps = (
        Step(30, "host", 1.0, unit=1),
        Step(10, "host", 0.5),
        Step(10, "host", 0.1, unit=1),
        Step(20, "rack", 0.0),
    )
    links = Links(regular((HOST, RACK), 2, steps=steps))
    assert links.changes() == [
        *(Change(10, 0, 25), Change(10, 1, 20), Change(10, 2, 5), Change(10, 3, 4)),
        *(Change(20, 4, 0), Change(20, 5, 0)),
        *(Change(30, 2, 50), Change(30, 3, 40)),
    ]


def test_it_is_read_from_plain_data():
    data = {
        "levels": [{"name": "host", "out_bytes_per_s": 5, "in_bytes_per_s": 6}],
        "hosts": [{}, {"rack": 0}],
        "steps": [{"at_ns": 5, "level": "host", "factor": 0.2}],
    }
    topology = msgspec.convert(data, Topology)
    assert Links(topology).changes() == [Change(5, link, 1) for link in range(4)]
    with pytest.raises(msgspec.ValidationError, match="unknown field `bandwidth`"):
        msgspec.convert({**data, "levels": [{"bandwidth": 1}]}, Topology)


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        (lay(HOST, hosts=()), "there are no hosts"),
        (lay(HOST, hosts=(Host(devices=0),)), "host 0 has 0 devices"),
        (lay(HOST, hosts=(Host(), Host(rack=1))), "host 1 lies in rack 1, which does not exist: there are 1"),
        (lay(HOST, hosts=(Host(rack=-1),)), "host 0 lies in rack -1"),
        (lay(HOST, racks=(2,)), "rack 0 lies in cluster 2"),
        (lay(HOST, clusters=(0, 1)), "cluster 1 lies in datacentre 1"),
        (lay(HOST, HOST), "level `host` is given twice"),
        (lay(Level("host", 0, 5)), "level `host` has out_bytes_per_s 0: it must be positive"),
        (lay(Level("host", 5, -5)), "level `host` has in_bytes_per_s -5"),
        (lay(Level("host", 5, 5, -1)), "latency_ns -1"),
        (lay(HOST, hosts=(Host(), Host(devices=2))), "the 2 devices of host 1 .* add the level `device`"),
        (lay(DEVICE, hosts=(Host(), Host())), "hosts 0 and 1 lie in different hosts.*add the level `host`"),
        (regular((HOST,), 3, hosts_per_rack=2), "hosts 0 and 2 lie in different racks.*the level `rack`"),
        (regular((HOST, RACK), 2, 1, 1, 1), "the level `cluster`"),
        (regular((HOST, RACK, CLUSTER), 2, 1, 1, 1, 1), "the level `datacentre`"),
        (lay(HOST, steps=(Step(-1, "host", 1.0),)), "at_ns must be at least 0"),
        (lay(HOST, steps=(Step(1, "host", -0.5),)), "factor -0.5"),
        (lay(HOST, steps=(Step(1, "host", float("nan")),)), "factor nan"),
        (lay(HOST, steps=(Step(1, "rack", 0.5),)), "no such level"),
        (lay(HOST, steps=(Step(1, "host", 0.5, unit=1),)), "of unit 1: there are 1"),
    ],
)
def test_an_impossible_topology_says_what_to_do(topology: Topology, message: str):
    with pytest.raises(ConfigError, match=message):
        Links(topology)


def test_numbers_of_a_regular_topology_are_positive():
    with pytest.raises(ConfigError, match="at least 1"):
        regular(ALL, 0)
    with pytest.raises(ConfigError, match="at least 1"):
        regular(ALL, 4, hosts_per_rack=0)


def test_a_place_that_is_not_there():
    links = Links(regular(ALL, 2, 4))
    links.check([(0, 0), (1, 3)])
    with pytest.raises(ConfigError, match="on host 2, but there are 2"):
        links.check([(0, 0), (2, 0)])
    with pytest.raises(ConfigError, match="device 4 of host 1, which has 4"):
        links.check([(1, 4)])
