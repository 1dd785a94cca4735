"""The secret that the hosts of a service share, and the keys that are made from it.

Workers of other hosts talk to the hub through CURVE (ZeroMQ RFC 26): encrypted, and only for who knows the hub's key. That key is made from
the secret and never travels, so whoever does not know the secret is dropped in the handshake, before one byte of his is read as a message.
A recorded handshake lets an attacker test guesses at the secret; a slow hash (scrypt) and a least length make that dear.
"""

import os
from dataclasses import dataclass, field
from hashlib import scrypt
from pathlib import Path

import zmq
from zmq.utils import z85

from headrace.types.errors import ConfigError

VARIABLE = "HEADRACE_SECRET"
LENGTH_MIN = 16
"""Bytes of a secret."""
SALT = b"headrace: the keys of a service over several hosts"


@dataclass(frozen=True, slots=True)
class Keys:
    """Made from one secret. None of it is ever shown."""

    hub_secret: bytes = field(repr=False)
    """Of the hub's CURVE socket (Z85)."""
    hub_public: bytes = field(repr=False)


def read_secret(file: Path | None) -> bytes:
    """From the file, else from the variable. Raises ConfigError naming the flag if there is none, or one that is too short."""
    where = f"--secret-file {file}" if file is not None else VARIABLE
    try:
        secret = os.environ.get(VARIABLE, "").encode() if file is None else file.read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"{where}: {error.strerror}") from error
    if not secret:
        raise ConfigError(
            f"a service over several hosts needs a secret that all of them share: give --secret-file FILE (or {VARIABLE}), "
            "with what e.g. `openssl rand -hex 32` prints"
        )
    if len(secret) < LENGTH_MIN:
        raise ConfigError(f"{where}: a secret has at least {LENGTH_MIN} characters")
    return secret


def keys_of(secret: bytes) -> Keys:
    """Takes some 50 ms, on purpose. Raises ConfigError where ZeroMQ cannot encrypt."""
    if not zmq.has("curve"):
        raise ConfigError("this ZeroMQ was built without CURVE; install pyzmq from its wheels")
    drawn = scrypt(secret, salt=SALT, n=2**14, r=8, p=1, maxmem=2**26, dklen=32)
    hub_secret = z85.encode(drawn)
    return Keys(hub_secret, zmq.curve_public(hub_secret))


def door_of(text: str, flag: str, port_min: int = 1) -> tuple[str, int]:
    """HOST and PORT of "HOST:PORT" or "[HOST]:PORT". Raises ConfigError naming the flag."""
    host, colon, port = text.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if host.startswith("[") != host.endswith("]"):
        bare = ""
    if not colon or not bare or not port.isascii() or not port.isdigit() or not port_min <= int(port) < 2**16:
        raise ConfigError(f"{flag} {text!r} is not HOST:PORT")
    if ":" in bare and host == bare:
        raise ConfigError(f"{flag} {text!r}: write an IPv6 address as [ADDRESS]:PORT")
    return bare, int(port)
