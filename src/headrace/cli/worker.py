"""The worker process: loads the model on its executor's thread and serves until its parent says otherwise."""

from pathlib import Path

from headrace.live.settings import WorkerConfig
from headrace.live.worker import Loaded, read_config, run


def make_executor(config: WorkerConfig, buffers: list[memoryview]) -> Loaded:
    """Load the model and prove its arithmetic. Imports torch here: the loop's thread says hello meanwhile."""
    from headrace.cli.loading import load

    return load(Path(config.options["folder"]), config.options["dtype"], config, buffers)


if __name__ == "__main__":
    run(read_config(), make_executor)
