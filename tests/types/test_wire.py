"""Every event, command and message survives msgpack, and their unions are complete."""

import types
from enum import Enum
from typing import Any, Union, get_args, get_origin, get_type_hints

import msgspec
import pytest

from headrace.nodes.journal import Record
from headrace.types import events, lending, messages, swaps, tiers, weights
from headrace.types.events import Command, Event
from headrace.types.ids import Address, RequestId, SequenceKey
from headrace.types.messages import AnyMessage, Message


def sample(kind: Any, seed: int = 1) -> Any:
    """A value of a type: small, not a default, with one element in every container."""
    kind = getattr(kind, "__supertype__", kind)
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return sample(args[0], seed)
    if origin is tuple:
        return tuple(sample(a, seed + i) for i, a in enumerate(args) if a is not Ellipsis)
    if origin is list:
        return [sample(args[0], seed)]
    if origin is dict:
        return {sample(args[0], seed): sample(args[1], seed)}
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        hints = get_type_hints(kind)
        return kind(**{name: sample(hints[name], seed + i) for i, name in enumerate(kind.__struct_fields__)})
    if isinstance(kind, type) and issubclass(kind, Enum):
        return list(kind)[-1]
    plain: dict[Any, Any] = {
        int: seed,
        bool: True,
        str: f"s{seed}",
        bytes: bytes([seed] * 16),
        float: seed / 2,
    }
    return plain[kind]


@pytest.mark.parametrize(
    ("union", "kind"),
    [(union, kind) for union in (Event, Command, AnyMessage) for kind in get_args(union)],
    ids=lambda value: getattr(value, "__name__", "of"),
)
def test_it_survives_the_wire(union: Any, kind: type):
    value = sample(kind)
    packed = msgspec.msgpack.encode(value)
    again = msgspec.msgpack.decode(packed, type=union)
    assert type(again) is kind and again == value
    assert msgspec.msgpack.encode(again) == packed


def test_a_record_of_every_event_survives_the_journal():
    record = Record(7, [sample(kind) for kind in get_args(Event)])
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(record), type=Record) == record


@pytest.mark.parametrize("kind", get_args(AnyMessage), ids=lambda kind: kind.__name__)
def test_every_message_can_be_received_and_sent(kind: type):
    source = Address("a", 2)
    for packed, union in (
        (events.Received(source, sample(kind)), Event),
        (events.Send(source, sample(kind)), Command),
    ):
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(packed), type=union) == packed


def test_the_unions_name_every_message_event_and_command():
    tagged = {
        kind
        for module in (events, lending, messages, swaps, tiers, weights)
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and kind.__struct_config__.tag
    }
    unions = [set(get_args(union)) for union in (AnyMessage, Event, Command)]
    assert tagged - {Message} == set.union(*unions)
    assert sum(map(len, unions)) == len(tagged) - 1, "nothing is of two kinds"


def test_addresses_and_keys_have_an_order():
    a = [Address("b", 0), Address("a", 1), Address("a", 0)]
    assert [str(x) for x in sorted(a)] == ["a#0", "a#1", "b#0"]
    assert str(SequenceKey(RequestId(3), 1, 2)) == "3.1.2"
