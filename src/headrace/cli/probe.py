"""The process that reads a checkpoint's configuration for the server, which itself never imports torch. See `wiring.probe`."""

import sys
from pathlib import Path

import msgspec

from headrace.cli.wiring import Probe
from headrace.compute import models
from headrace.compute.checkpoint import Checkpoint
from headrace.compute.sources import FolderSource
from headrace.types.errors import CheckpointError, ConfigError
from headrace.types.kv import Layout


def look(folder: Path, dtype: str, block_size: int, length: int, layout: Layout) -> Probe:
    """Read the configuration and the tensors' names and shapes; `length` 0 is the model's own."""
    checkpoint = Checkpoint(folder)
    meant = models.context_length(checkpoint)
    if length > meant:
        raise ConfigError(f"--max-model-len {length} exceeds the {meant} tokens that the model is meant for")
    return Probe(
        fingerprint=checkpoint.fingerprint(),
        spec=models.kv_spec(checkpoint, dtype=dtype, block_size=block_size, layout=layout),
        vocabulary=int(checkpoint.config["vocab_size"]),
        length_max=length or meant,
        tensors=FolderSource(folder).tensors(),
        scheme="" if checkpoint.scheme is None else checkpoint.scheme.summary,
    )


def main() -> int:
    folder, dtype, block_size, length, layout = sys.argv[1:]
    try:
        found = look(Path(folder), dtype, int(block_size), int(length), Layout(layout))
    except (CheckpointError, ConfigError) as error:
        sys.stderr.write(str(error))
        return 2
    sys.stdout.buffer.write(msgspec.json.encode(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
