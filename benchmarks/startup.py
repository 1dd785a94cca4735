"""From `headrace serve` to a ready API, on the bundled model, with one prefill and one decode worker.

make bench NAME=startup [ARGS="--rounds 5"]
"""

import argparse
import socket
import subprocess
import sys
from http.client import HTTPConnection
from time import perf_counter, sleep

from _report import target, write

GOAL_S = 5.0


def ready(port: int) -> bool:
    """Whether the API says so."""
    connection = HTTPConnection("127.0.0.1", port, timeout=1)
    try:
        connection.request("GET", "/ready")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def once(arguments: list[str]) -> float:
    """Seconds until ready; the server is ended afterwards."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = perf_counter()
    server = subprocess.Popen(
        [sys.executable, "-m", "headrace.cli.main", "serve", "--port", str(port), *arguments]
    )
    try:
        while not ready(port):
            if server.poll() is not None or perf_counter() - started > 120:
                raise SystemExit(f"the server did not get ready (exit code {server.poll()})")
            sleep(0.02)
        return perf_counter() - started
    finally:
        server.terminate()
        server.wait(30)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    once([])
    split = [once(["--prefill", "1", "--decode", "1"]) for _ in range(rounds)]
    whole = [once(["--instances", "1"]) for _ in range(rounds)]
    median = sorted(split)[len(split) // 2]
    figures = {"prefill_1_decode_1_s": split, "instances_1_s": whole}
    goal = target("serve to ready, 1 prefill + 1 decode", split, "s", f"< {GOAL_S:g}", met=median < GOAL_S)
    write("startup", figures, [goal], {}, "Page cache warm; the first start is not counted.")


if __name__ == "__main__":
    main()
