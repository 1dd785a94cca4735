"""What a source is told when a target does not shake hands."""

import socket

import pytest

from headrace.live.transfer.channels import Plain
from headrace.live.transfer.handshake import Claim, Refusal, greet
from headrace.types.ids import Address


def test_a_target_that_says_nothing_may_want_tls() -> None:
    """It waits for the first words of TLS, as we for its challenge, and hangs up."""
    ours, theirs = socket.socketpair()
    theirs.close()
    with ours, pytest.raises(Refusal, match=r"b#1 hung up before .*--transfer-tls") as refused:
        greet(Plain(ours), "secret", Claim(Address("a", 0), Address("b", 1), 1, 0, 1))
    assert not refused.value.final
