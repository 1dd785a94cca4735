"""A worker of these tests that joins a service by its port. Its setting is one JSON object on the command line."""

import json
import logging
import os
import sys
from typing import Any, NoReturn

from headrace.live.joining import Joining, run_joined
from headrace.live.keys import keys_of
from headrace.live.pools import layout_for
from headrace.live.wire import Apply
from tests.live.fake import SPEC, VOCABULARY, make_executor

MS = 1_000_000


def joining_of(port: int, secret: str, settings: dict[str, Any]) -> Joining:
    layout = layout_for(SPEC, settings.get("kv_bytes", 2**20))
    said = {
        "name": settings.get("name", ""),
        "leaning": settings.get("leaning", "mixed"),
        "host": "elsewhere",
        "fingerprint": "fake",
        "dtype": SPEC.dtype,
        "block_size": SPEC.block_size,
        "spec": SPEC,
        "vocabulary": VOCABULARY,
        "length_max": 4096,
        "blocks": layout.blocks,
    }
    return Joining(
        host="127.0.0.1",
        port=port,
        keys=keys_of(secret.encode()),
        apply=Apply(**{**said, **settings.get("odd", {})}),
        layout=layout,
        threads=1,
        timeout_ns=settings.get("timeout_ms", 60_000) * MS,
        retire_ns=settings.get("retire_ms", 60_000) * MS,
        silence_ns=settings.get("silence_ms", 10_000) * MS,
        options=settings.get("options", {}),
    )


def start_over() -> NoReturn:
    os.execv(sys.executable, [sys.executable, "-m", "tests.live.fake_joiner", *sys.argv[1:]])


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    told = json.loads(sys.argv[1])
    run_joined(joining_of(told["port"], told["secret"], told), make_executor, start_over)
