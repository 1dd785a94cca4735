"""The measured worker process of these tests."""

from headrace.live.measuring import run
from headrace.live.worker import read_config
from tests.live.fake import make_executor

if __name__ == "__main__":
    run(read_config(), make_executor)
