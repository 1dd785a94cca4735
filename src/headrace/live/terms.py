"""What all workers of a service must agree on, or they are refused."""

from typing import Any

import msgspec

from headrace.live import wire
from headrace.live.settings import Model
from headrace.types.hashing import chain_root
from headrace.types.ids import BlockHash


class Terms:
    """What a worker's greeting must say; completed by the first one."""

    def __init__(self, model: Model, mixed_numerics: bool) -> None:
        """The fingerprint may be left open, and what the first worker's arithmetic is decides for the others."""
        spec = model.spec
        self._spec = spec
        self._mixed = mixed_numerics
        self._promise = ""
        self._expected: dict[str, Any] = {
            "protocol": wire.PROTOCOL,
            "dtype": spec.dtype,
            "block_size": spec.block_size,
            "spec": spec,
            "vocabulary": model.vocabulary,
            "length_max": model.length_max,
        }
        if model.fingerprint:
            self._expected["fingerprint"] = model.fingerprint

    def consider(self, apply: wire.Apply) -> None:
        """Of one that has not loaded yet. Raises IncompatiblePeer naming the first field that differs."""
        wire.check_compatible(self._expected, apply)

    def accept(self, hello: wire.Hello) -> None:
        """Raises IncompatiblePeer naming the first field that differs."""
        wire.check_compatible(self._expected, hello)
        self._expected["fingerprint"] = hello.fingerprint
        self._promise = self._promise or hello.promise
        if not self._mixed:
            self._expected["numerics"] = hello.numerics

    @property
    def numerics(self) -> str:
        """Id of the workers' arithmetic; empty while none is known, or where they may differ."""
        return self._expected.get("numerics", "")

    @property
    def promise(self) -> str:
        """What is promised in place of equal bits; empty: equal bits are."""
        mixed = "workers may differ in arithmetic: equal requests need not give equal tokens"
        return mixed if self._mixed else self._promise

    @property
    def equal_numerics(self) -> str:
        """The id under which equal bits are promised; empty if they are not."""
        return "" if self._promise else self.numerics

    def root(self, salt: str) -> BlockHash:
        """Of hash chains. Covers all that makes two caches differ for equal tokens."""
        spec = msgspec.json.encode(self._spec).decode()
        return chain_root(self._expected["fingerprint"], spec, self._expected.get("numerics", "mixed"), salt)
