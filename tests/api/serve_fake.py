"""A process that serves a fake service; `test_server` runs it. Lines on its input let tokens through."""

import logging
import sys
import tempfile
import threading
from pathlib import Path

import uvloop

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from headrace.api.app import create_app  # noqa: E402
from headrace.api.server import serve_api  # noqa: E402
from headrace.api.tokenizer import Tokenizer  # noqa: E402
from tests.api.fakes import FakeGateway, Pace, byte_level, write_checkpoint  # noqa: E402


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    heavy = [name for name in ("torch", "transformers") if name in sys.modules]
    say(f"modules: {heavy or 'ok'}")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Tokenizer.load(write_checkpoint(Path(folder), byte_level()))
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    gateway = FakeGateway(tokenizer)
    gateway.text("abcdef")
    gateway.pace = pace = Pace(1)

    def read() -> None:
        for line in sys.stdin:
            pace.allow(int(line))

    threading.Thread(target=read, daemon=True).start()
    uvloop.run(serve_api(create_app(gateway, tokenizer), port=0, listening=say))
    say(f"cancelled: {gateway.cancelled.is_set()}")


main()
