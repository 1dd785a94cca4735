"""One server for most tests; those that need other settings start their own."""

from collections.abc import Iterator

import httpx
import openai
import pytest

from headrace.api.tokenizer import Tokenizer
from tests.api.fakes import WAIT_S, FakeGateway, Running, byte_level, sentencepiece, serving, write_checkpoint


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_checkpoint(tmp_path_factory.mktemp("byte_level"), byte_level()))


@pytest.fixture(scope="session")
def spaced(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("sentencepiece")
    return Tokenizer.load(write_checkpoint(folder, sentencepiece(), add_bos_token=True))


@pytest.fixture(scope="module")
def shared(tokenizer: Tokenizer) -> Iterator[tuple[FakeGateway, Running]]:
    gateway = FakeGateway(tokenizer)
    with serving(gateway, tokenizer) as running:
        yield gateway, running


@pytest.fixture
def gateway(shared: tuple[FakeGateway, Running]) -> FakeGateway:
    shared[0].reset()
    return shared[0]


@pytest.fixture
def running(shared: tuple[FakeGateway, Running]) -> Running:
    return shared[1]


# Clients are kept for a module: each reads the system's certificates when it is made.


@pytest.fixture(scope="module")
def client(shared: tuple[FakeGateway, Running]) -> Iterator[openai.OpenAI]:
    url = f"{shared[1].address}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=WAIT_S) as client:
        yield client


@pytest.fixture(scope="module")
def plain(shared: tuple[FakeGateway, Running]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=shared[1].address, timeout=WAIT_S) as client:
        yield client
