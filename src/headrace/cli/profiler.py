"""The worker process of `headrace profile`: loads the model as `cli.worker` does, and measures it."""

from headrace.cli.worker import make_executor
from headrace.live.measuring import run
from headrace.live.worker import read_config

if __name__ == "__main__":
    run(read_config(), make_executor)
