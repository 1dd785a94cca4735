"""How two ends of a connection prove that they know one secret, which never travels (HMAC over challenges of both).

 1. The target says `Challenge`.
 2. The source says who it is, whom it means, and which of its links this is: `Greeting`, with its proof.
 3. The target answers `Verdict`, with its own proof.
What follows is neither encrypted nor signed: between hosts that do not trust the network, use TLS beneath.
"""

import hmac
import secrets
from collections.abc import Callable
from typing import TypeVar

import msgspec

from headrace.live.transfer.channels import Channel, Ended
from headrace.types.errors import TransferError
from headrace.types.ids import Address

FRAME_MAX = 1 << 14
PROTOCOL = 1
"""Counted up when what engines say to each other changes."""

T = TypeVar("T")


class Challenge(msgspec.Struct, frozen=True):
    protocol: int
    nonce: bytes


class Claim(msgspec.Struct, frozen=True):
    """What a source says of a connection."""

    source: Address
    target: Address
    generation: int
    lane: int
    lanes: int


class Greeting(msgspec.Struct, frozen=True):
    claim: Claim
    nonce: bytes
    proof: bytes


class Verdict(msgspec.Struct, frozen=True):
    reason: str
    """Empty: welcome."""
    final: bool
    proof: bytes


class Refusal(TransferError):
    """The other end will not have us. `final`: nor later, and it has severed what links of ours it had."""

    def __init__(self, reason: str, *, final: bool) -> None:
        super().__init__(reason)
        self.final = final


def greet(channel: Channel, secret: str, claim: Claim) -> None:
    """The source's side. Returns when it is welcome. Raises Refusal, OSError."""
    try:
        challenge = _read(channel, Challenge)
    except (Ended, ConnectionResetError):
        raise Refusal(
            f"{claim.target} hung up before it said anything: does it want TLS (--transfer-tls), or has it just ended?",
            final=False,
        ) from None
    if challenge.protocol != PROTOCOL:
        raise Refusal(
            f"{claim.target} speaks protocol {challenge.protocol} of transfers, we speak {PROTOCOL}",
            final=False,
        )
    nonce = secrets.token_bytes(32)
    proof = _prove(secret, b"source", challenge.nonce, claim)
    _write(channel, Greeting(claim, nonce, proof))
    try:
        verdict = _read(channel, Verdict)
    except (Ended, ConnectionResetError):
        raise Refusal(
            f"{claim.target} hung up on the greeting of {claim.source}: do their secrets differ?", final=False
        ) from None
    if not hmac.compare_digest(verdict.proof, _prove(secret, b"target", nonce, verdict.reason)):
        raise Refusal(f"whoever answers for {claim.target} does not know the secret", final=False)
    if verdict.reason:
        raise Refusal(f"{claim.target} refused {claim.source}: {verdict.reason}", final=verdict.final)


def hear(channel: Channel, secret: str, own: Address) -> tuple[Claim, Callable[[str, bool], None]]:
    """The target's side: what a source that knows the secret claims, and how to answer it (reason, final).

    Raises TransferError for a stranger, OSError.
    """
    ours = secrets.token_bytes(32)
    _write(channel, Challenge(PROTOCOL, ours))
    greeting = _read(channel, Greeting)
    claim = greeting.claim
    if not hmac.compare_digest(greeting.proof, _prove(secret, b"source", ours, claim)):
        raise TransferError(f"it calls itself {claim.source} and does not know the secret")

    def answer(reason: str, final: bool) -> None:
        proof = _prove(secret, b"target", greeting.nonce, reason)
        _write(channel, Verdict(reason, final, proof))

    if claim.target != own:
        answer(f"it looks for {claim.target}, and here is {own}", True)
        raise TransferError(f"{claim.source} looks for {claim.target}, and here is {own}")
    if not 0 <= claim.lane < claim.lanes <= 1024:
        raise TransferError(f"{claim.source} offers lane {claim.lane} of {claim.lanes}")
    return claim, answer


def _prove(secret: str, side: bytes, nonce: bytes, said: object) -> bytes:
    return hmac.digest(secret.encode(), side + nonce + msgspec.msgpack.encode(said), "sha256")


def _write(channel: Channel, said: object) -> None:
    frame = msgspec.msgpack.encode(said)
    channel.send(len(frame).to_bytes(4, "little") + frame)


def _read(channel: Channel, kind: type[T]) -> T:
    size = bytearray(4)
    channel.receive(memoryview(size))
    nbytes = int.from_bytes(size, "little")
    if nbytes > FRAME_MAX:
        raise TransferError("what it says is not our protocol")
    frame = bytearray(nbytes)
    channel.receive(memoryview(frame))
    try:
        return msgspec.msgpack.decode(frame, type=kind)
    except msgspec.MsgspecError as error:
        raise TransferError(f"what it says is not our protocol: {error}") from None
