"""What a user can say about transfers between workers, and what becomes of it."""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from headrace.live.settings import TransferSettings
from headrace.types.errors import ConfigError

if TYPE_CHECKING:
    from headrace.cli.options import EngineOptions, WorkerOptions

TRANSPORT: Any = Field(
    "auto",
    description="How KV moves between separate pools; auto: shared memory in a host, TCP between hosts",
)
TransferPath = Literal["runs", "gather"]
TRANSFER_PATH: Any = Field(
    "runs", description="A write for each run of blocks, or scattered ones gathered into one buffer"
)
TRANSFER_LANES: Any = Field(1, ge=1, le=64, description="Copying threads, or connections, of each link")
TRANSFER_HOSTS: Any = Field(
    None,
    description="Addresses of this host for transfers, comma-separated [default: by which others reach it]",
)
TRANSFER_PACE: Any = Field(0, ge=0, description="Bytes a second to each peer at most, over TCP; 0: unlimited")
TRANSFER_TIMEOUT: Any = Field(10, gt=0, description="Seconds after which a transfer that does not move fails")
TRANSFER_TLS: Any = Field(None, description="TLS between workers: CERTIFICATE,KEY,AUTHORITIES (PEM files)")


def transfer_settings(options: "EngineOptions", listening: str) -> TransferSettings:
    """`listening`: where the service takes workers of other hosts, if it does.

    Raises ConfigError for TLS files of which one is missing, or if no address is known at which other hosts find this one.
    """
    host = listening.rpartition(":")[0].strip("[]")
    if host in ("0.0.0.0", "::") and not options.transfer_hosts:
        raise ConfigError(
            f"--listen {host} is all addresses of this host: name one of them in --transfer-hosts, for KV"
        )
    return TransferSettings(
        transport=options.transport,
        path=options.transfer_path,
        lanes=options.transfer_lanes,
        hosts=transfer_hosts(options) or (host or "127.0.0.1",),
        pace=options.transfer_pace,
        tls=transfer_tls(options),
        stall_ns=int(options.transfer_timeout * 1e9),
    )


def transfer_hosts(options: "EngineOptions | WorkerOptions") -> tuple[str, ...]:
    """As stated; empty: nothing was."""
    return tuple(h.strip() for h in (options.transfer_hosts or "").split(",") if h.strip())


def transfer_tls(options: "EngineOptions | WorkerOptions") -> tuple[str, str, str] | None:
    """Certificate, its key, and who signed those of peers. Raises ConfigError if one is missing."""
    if options.transfer_tls is None:
        return None
    files = options.transfer_tls.split(",")
    if len(files) != 3 or not all(files):
        raise ConfigError("--transfer-tls takes three files: CERTIFICATE,KEY,AUTHORITIES")
    return files[0], files[1], files[2]
