"""What all workers of a service must agree on, or they are refused."""

from typing import Any

import msgspec

from headrace.live import wire
from headrace.live.settings import Model
from headrace.types.errors import IncompatiblePeer
from headrace.types.hashing import chain_root
from headrace.types.ids import BlockHash


class Terms:
    """What a worker's greeting must say; completed by the first one."""

    def __init__(self, model: Model, mixed_numerics: bool) -> None:
        """The fingerprint may be left open, and what the first worker's arithmetic is decides for the others."""
        spec = model.spec
        self._spec = spec
        self.mixed = mixed_numerics
        """Workers may differ in arithmetic."""
        self._promise = ""
        self._expected: dict[str, Any] = {
            "protocol": wire.PROTOCOL,
            "dtype": spec.dtype,
            "block_size": spec.block_size,
            "spec": spec,
            "vocabulary": model.vocabulary,
            "length_max": model.length_max,
        }
        self.version = 0
        """Of the weights."""
        self._of_version: dict[int, dict[str, Any]] = {0: {}}
        """What is expected of workers by the weights that they have."""
        self._roots: tuple[str, ...] = ()
        """What makes roots under pushed weights."""
        if model.fingerprint:
            self._of_version[0]["fingerprint"] = model.fingerprint

    def consider(self, apply: wire.Apply) -> None:
        """Of one that has its folder's weights, to be loaded yet. Raises IncompatiblePeer naming the first field that differs."""
        if self.version:
            raise IncompatiblePeer(
                f"the service has pushed weights, version {self.version}, which workers of other hosts cannot get: restart it with them"
            )
        fingerprint = self._of_version[0].get("fingerprint")
        own = {"fingerprint": fingerprint} if fingerprint else {}
        wire.check_compatible({**self._expected, **own}, apply)

    def accept(self, hello: wire.Hello) -> None:
        """Raises IncompatiblePeer naming the first field that differs."""
        own = self._of_version.get(hello.version)
        if own is None:
            raise IncompatiblePeer(
                f"the worker has version {hello.version} of the weights, which is not known"
            )
        wire.check_compatible({**self._expected, **own}, hello)
        own["fingerprint"] = hello.fingerprint
        self._promise = self._promise or hello.promise
        if not self.mixed:
            own["numerics"] = hello.numerics

    def renew(self, version: int, fingerprint: str, numerics: str) -> None:
        """From now on the service has these weights. `numerics`: of the workers' arithmetic on them; empty: not known yet."""
        self.version = version
        own = self._of_version[version] = {"fingerprint": fingerprint}
        if numerics and not self.mixed:
            own["numerics"] = numerics
        # Unlike the first version's it does not wait for a greeting: a root must not change while its version is served.
        self._roots = (fingerprint, numerics or "not known", f"weights {version}")

    @property
    def fingerprint(self) -> str:
        """Of the weights that are served; empty while none is known."""
        return self._of_version[self.version].get("fingerprint", "")

    @property
    def numerics(self) -> str:
        """Id of the workers' arithmetic; empty while none is known, or where they may differ."""
        return self._of_version[self.version].get("numerics", "")

    @property
    def promise(self) -> str:
        """What is promised in place of equal bits; empty: equal bits are."""
        mixed = "workers may differ in arithmetic: equal requests need not give equal tokens"
        return mixed if self.mixed else self._promise

    @property
    def equal_numerics(self) -> str:
        """The id under which equal bits are promised; empty if they are not."""
        return "" if self._promise else self.numerics

    def root(self, salt: str) -> BlockHash:
        """Of hash chains. Covers all that makes two caches differ for equal tokens."""
        spec = msgspec.json.encode(self._spec).decode()
        if self._roots:
            return chain_root(*self._roots, spec, salt)
        return chain_root(self.fingerprint, spec, self.numerics or "mixed", salt)
