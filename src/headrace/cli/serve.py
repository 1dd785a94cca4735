"""`headrace serve`: the service and its HTTP API in one process, its workers as children."""

import asyncio
import logging
from pathlib import Path

from headrace.api.app import create_app
from headrace.api.server import close, listen, listen_unix, serve_api
from headrace.api.settings import ApiSettings
from headrace.api.tokenizer import Tokenizer
from headrace.cli import wiring
from headrace.cli.options import ServeOptions, check_policies
from headrace.live.keys import Keys, door_of, keys_of, read_secret
from headrace.live.service import Service
from headrace.types.errors import ConfigError

log = logging.getLogger(__name__)


def api_settings(options: ServeOptions) -> ApiSettings:
    return ApiSettings(
        api_keys=(options.api_key,) if options.api_key else (),
        push_key=options.push_key or "",
        allowed_origins=tuple(o.strip() for o in options.allowed_origins.split(",") if o.strip()),
        request_timeout_s=options.request_timeout,
        requests_max=options.max_requests,
    )


def door_keys(options: ServeOptions) -> Keys | None:
    """Of the door for other hosts, if there is one. Raises ConfigError without a secret, or for an address that is none."""
    if options.listen is None:
        if options.secret_file is not None:
            raise ConfigError("--secret-file is for workers of other hosts: give --listen HOST:PORT, too")
        return None
    door_of(options.listen, "--listen", port_min=0)
    return keys_of(read_secret(options.secret_file))


async def serve(options: ServeOptions) -> None:
    """Until SIGTERM or SIGINT has drained it. Raises a HeadraceError for what cannot work, before a model is loaded where it can."""
    check_policies(options)
    wiring.workers(options)
    keys = door_keys(options)
    listener = listen_unix(options.uds) if options.uds else listen(options.host, options.port)
    try:
        folder = wiring.folder(options)
        probing = asyncio.create_task(wiring.probe(options))
        tokenizer = await asyncio.to_thread(Tokenizer.load, folder, options.chat_template)
        found = await probing
        config = wiring.service_config(
            options,
            found,
            choices_max=options.max_requests,
            shutdown_s=options.shutdown_timeout,
            push_key=options.push_key or "",
        )
        service = Service(
            config, wiring.model(options, found, options.served_model_name), wiring.WORKER, keys
        )
        async with wiring.running(service):
            _announce(options, folder, config.kv_bytes, service.info().promise)
            serving = asyncio.ensure_future(
                serve_api(
                    create_app(service, tokenizer, api_settings(options), service.pushes),
                    listener=listener,
                    drain_timeout_s=options.shutdown_timeout,
                    access_log=options.access_log,
                    listening=lambda address: log.info("ready: %s/v1", address),
                )
            )
            await asyncio.wait((serving, service.failed), return_when=asyncio.FIRST_COMPLETED)
            if service.failed.done():
                serving.cancel()
                await asyncio.gather(serving, return_exceptions=True)
                service.failed.result()
            serving.result()
    finally:
        close(listener)


def _announce(options: ServeOptions, folder: Path, kv_bytes: int, promise: str) -> None:
    team = ", ".join(w.name for w in wiring.workers(options)) or "no worker of this host"
    pools = "a KV pool each" if options.separate_pools else "one KV pool"
    log.info("serving %s on %s, with %s of %.0f MiB", folder.name, team, pools, kv_bytes / 2**20)
    if promise:
        log.warning("%s", promise)
