import pytest

from headrace import registry
from headrace.types.errors import ConfigError
from tests.contract import check_config, check_module

AXES = (
    "engine.batching",
    "engine.admission",
    "engine.ordering",
    "engine.preemption",
    "cluster.placement",
    "cluster.roles",
    "cluster.rebalance",
    "kv.evict",
)
ALL = [(axis, name) for axis in AXES for name in registry.names(axis)]


@pytest.mark.parametrize("axis", AXES)
def test_every_axis_has_a_policy(axis: str):
    assert registry.names(axis)


@pytest.mark.parametrize(("axis", "name"), ALL)
def test_a_policy_is_one_file_that_says_what_it_is(axis: str, name: str):
    check_module(axis, name)


@pytest.mark.parametrize(("axis", "name"), ALL)
def test_a_wrong_setting_is_named(axis: str, name: str):
    check_config(axis, name)


def test_an_unknown_policy_is_answered_with_what_there_is():
    with pytest.raises(ConfigError, match=r"no kv.evict policy 'no_such'; there are: .*lru"):
        registry.load("kv.evict", "no_such")
