"""`headrace worker`: one worker, started by hand on any host, for a service that listens elsewhere."""

import asyncio
import os
import sys
from socket import gethostname
from typing import NoReturn

from headrace.cli import transferring, wiring
from headrace.cli.options import WorkerOptions
from headrace.cli.worker import make_executor
from headrace.live.joining import Joining, run_joined
from headrace.live.keys import door_of, keys_of, read_secret
from headrace.live.launch.local import worker_environment
from headrace.live.pools import layout_for
from headrace.live.settings import ServiceConfig
from headrace.live.wire import Apply
from headrace.types.errors import ConfigError


def join(options: WorkerOptions) -> NoReturn:
    """Until it is told to end. Raises ConfigError, CheckpointError for what is wrong before it connects."""
    if not options.join:
        raise ConfigError("give --join HOST:PORT, where `headrace serve --listen HOST:PORT` takes workers")
    host, port = door_of(options.join, "--join")
    keys = keys_of(read_secret(options.secret_file))
    found = asyncio.run(wiring.probe(options))
    wiring.check_ranges(found.spec)
    layout = layout_for(found.spec, wiring.kv_bytes(options, found, 1))
    threads = options.threads or len(os.sched_getaffinity(0))
    # Before torch is loaded, which reads it once.
    os.environ.update(worker_environment(threads))
    apply = Apply(
        name=options.name,
        leaning=options.leaning,
        host=gethostname(),
        fingerprint=found.fingerprint,
        dtype=found.spec.dtype,
        block_size=found.spec.block_size,
        spec=found.spec,
        vocabulary=found.vocabulary,
        length_max=found.length_max,
        blocks=layout.blocks,
    )
    joining = Joining(
        host=host,
        port=port,
        keys=keys,
        apply=apply,
        layout=layout,
        threads=threads,
        timeout_ns=int(options.join_timeout * 1e9),
        retire_ns=int(options.shutdown_timeout * 1e9),
        silence_ns=ServiceConfig(workers=()).silence_ns,
        transfer_hosts=transferring.transfer_hosts(options),
        transfer_tls=transferring.transfer_tls(options),
        options={
            "folder": str(wiring.folder(options)),
            "dtype": options.dtype,
            "shared_prefixes": options.shared_prefixes,
        },
    )
    run_joined(joining, make_executor, start_over)


def start_over() -> NoReturn:
    """As a new program, so that nothing of the old life is left: memory, connections, native threads."""
    os.execv(sys.executable, [sys.executable, "-m", "headrace.cli.main", *sys.argv[1:]])
