"""What the flags say of the tiers below pools."""

from headrace.cli.options import DeploymentOptions
from headrace.cli.sizes import parse_size
from headrace.live.tiers import check_tiers
from headrace.nodes.limits import TierConfig
from headrace.types.errors import ConfigError
from headrace.types.kv import KVSpec

STAGING_BYTES = 64 * 2**20
"""What goes to disk goes through so much host memory at least."""
AHEAD_SHARE, AHEAD_BLOCKS_MAX = 32, 256
"""One block in so many is kept free ahead of need where there are tiers below, but no more than this."""


def tier_config(options: DeploymentOptions, spec: KVSpec, blocks: int) -> TierConfig | None:
    """What lies below each pool of so many blocks; None: nothing. Raises ConfigError."""
    if options.host_cache is None and options.disk_cache is None:
        return None
    check_tiers(spec)
    size = spec.block_bytes(0)
    host = parse_size(options.host_cache) // size if options.host_cache is not None else 0
    if options.host_cache is not None and not host:
        raise ConfigError(f"--host-cache {options.host_cache} holds not one block of {size / 2**20:.2f} MiB")
    disk = parse_size(options.disk_cache_size) // size if options.disk_cache is not None else 0
    if options.disk_cache is not None and not disk:
        raise ConfigError(
            f"--disk-cache-size {options.disk_cache_size} holds not one block of {size / 2**20:.2f} MiB"
        )
    return TierConfig(
        host_blocks=max(host, -(-STAGING_BYTES // size)) if disk else host,
        disk_blocks=disk,
        ahead_blocks=max(1, min(AHEAD_BLOCKS_MAX, blocks // AHEAD_SHARE)),
    )
