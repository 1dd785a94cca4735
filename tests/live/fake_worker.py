"""The worker process of these tests."""

import logging

from headrace.live.worker import read_config, run
from tests.live.fake import make_executor

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    run(read_config(), make_executor)
