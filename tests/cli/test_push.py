"""`headrace weights push` into a real server, with real clients: old weights, new weights, and nothing in between."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from safetensors.torch import load_file, save_file

from headrace.cli.push import push_weights
from headrace.cli.wiring import BUNDLED
from headrace.types.errors import CheckpointError, PushRefused
from headrace.types.weights import Running
from tests.cli.running import Server, started

KEY = "let-me-in"
PROMPTS = [
    "def add(a, b):\n    return",
    "import os\n\n\nclass Path:",
    "for i in range(10):\n    print(i)\n" * 12,
]
LONG = 1900
"""Tokens of an answer that takes longer than a push, by far."""
FLAGS = (
    *("--push-key", KEY, "--served-model-name", "m", "--separate-pools", "--threads", "1"),
    # What lies in host memory is KV of one version, too.
    *("--host-cache", "64MiB", "--preemption", "swap", "--swap-space", "0.05"),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model after a training step that went wild."""
    folder = tmp_path_factory.mktemp("trained") / "model"
    shutil.copytree(BUNDLED, folder)
    [file] = folder.glob("*.safetensors")
    torch.manual_seed(5)
    tensors = {
        name: (t.float() * (1 + 0.5 * torch.randn(t.shape))).to(t.dtype)
        for name, t in load_file(file).items()
    }
    save_file(tensors, file)
    return folder


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with started(*FLAGS) as running:
        yield running


@pytest.fixture(scope="module")
def answers(trained: Path, server: Server) -> dict[str, list[str]]:
    """What either model says to each prompt, on a server that began with it."""
    begin(server)
    with started(str(trained), *FLAGS) as other:
        said = {
            name: [ask(where, prompt).choices[0].text for prompt in PROMPTS]
            for name, where in (("old", server), ("new", other))
        }
    assert all(old != new for old, new in zip(said["old"], said["new"], strict=True))
    return said


def begin(server: Server) -> int:
    """The bundled weights serve, as a version of its own."""
    return push_weights(BUNDLED, server.url, key=KEY).pushed.version


def ask(server: Server, prompt: str, tokens: int = 24, **fields: Any) -> Any:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        return client.completions.create(
            model="m",
            prompt=prompt,
            max_tokens=tokens,
            temperature=0,
            extra_body={"ignore_eos": True, "return_timings": True},
            **fields,
        )


def versions(answer: Any) -> list[int]:
    """Of the weights that had part in it."""
    return (answer.usage.model_extra or {}).get("weights", [0])


def test_push_under_load(server: Server, trained: Path, answers: dict[str, list[str]]):
    old = begin(server)
    for prompt in PROMPTS:
        ask(server, prompt)
    seen: dict[tuple[int, ...], int] = {}
    answered: list[int] = []
    with ThreadPoolExecutor(4) as clients:
        stop: list[bool] = []

        def client(number: int) -> list[tuple[int, Any]]:
            got: list[tuple[int, Any]] = []
            while not stop:
                index = (number + len(got)) % len(PROMPTS)
                got.append((index, ask(server, PROMPTS[index])))
                answered.append(number)
            return got

        loads = [clients.submit(client, number) for number in range(3)]
        reports = [push_weights(trained, server.url, key=KEY, running=running) for running in Running]
        server.wait_until("more than three answers", lambda: len(answered) > 3)
        stop.append(True)
        for index, answer in [pair for load in loads for pair in load.result()]:
            by = tuple(versions(answer))
            seen[by] = seen.get(by, 0) + 1
            if by == (old,):
                assert answer.choices[0].text == answers["old"][index]
            elif old not in by:
                # The two later versions have the same tensors.
                assert answer.choices[0].text == answers["new"][index]
            assert answer.system_fingerprint.endswith(f"-w{by[-1]}")
    assert [report.pushed.version for report in reports] == [old + 1, old + 2]
    assert reports[0].pushed.fingerprint == reports[1].pushed.fingerprint
    assert sum(seen.values()) > 3, seen
    first = ask(server, PROMPTS[2])
    assert first.choices[0].text == answers["new"][2] and versions(first) == [old + 2]
    ready = server.ready()
    assert ready["weights"] == old + 2 and {i["weights"] for i in ready["instances"]} == {old + 2}


def test_nothing_cached_under_the_old_weights_is_found(
    server: Server, trained: Path, answers: dict[str, list[str]]
):
    def cached() -> int:
        return ask(server, PROMPTS[2]).usage.prompt_tokens_details.cached_tokens

    begin(server)
    assert (cached(), cached() > 0) == (0, True)
    push_weights(trained, server.url, key=KEY)
    assert (cached(), cached() > 0) == (0, True)
    state = load_file(next(BUNDLED.glob("*.safetensors")))
    push_weights({name: tensor.float() for name, tensor in state.items()}, server.url, key=KEY)
    assert cached() == 0, "the same tensors as at first are another version, too"
    assert ask(server, PROMPTS[0]).choices[0].text == answers["old"][0]


@pytest.mark.parametrize("running", list(Running))
def test_an_answer_that_spans_a_push_names_both_versions(server: Server, trained: Path, running: Running):
    old = begin(server)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    fields: dict[str, Any] = {"model": "m", "prompt": PROMPTS[0], "max_tokens": LONG, "temperature": 0}
    stream = client.completions.create(
        **fields, stream=True, stream_options={"include_usage": True}, extra_body={"ignore_eos": True}
    )
    chunks = iter(stream)
    next(chunks)
    report = push_weights(trained, server.url, key=KEY, running=running)
    rest = list(chunks)
    client.close()
    assert (report.pushed.kept, report.pushed.recomputed) == ((1, 0) if running is Running.KEEP else (0, 1))
    assert versions(rest[-1]) == [old, old + 1] and rest[-1].usage.completion_tokens == LONG
    assert rest[0].system_fingerprint != rest[-2].system_fingerprint


def test_what_does_not_fit_is_refused_by_name(server: Server, trained: Path):
    old = begin(server)
    tensors = load_file(next(trained.glob("*.safetensors")))
    name = next(iter(tensors))
    short = {**tensors, name: tensors[name][:-1]}
    more = {**tensors, "model.layers.99.weight": tensors[name]}
    fewer = {key: tensor for key, tensor in tensors.items() if key != name}
    for wrong, words in (
        (short, f"tensor {name!r} has shape"),
        (more, "'model.layers.99.weight' is none of the served model's"),
        (fewer, f"tensor {name!r} is missing"),
        ({**tensors, name: tensors[name].int()}, f"tensor {name!r} is no floating-point"),
    ):
        with pytest.raises(PushRefused, match=words):
            push_weights(wrong, server.url, key=KEY)
    for key in ("", "guess"):
        with pytest.raises(PushRefused, match="no valid push key"):
            push_weights(trained, server.url, key=key)
    with pytest.raises(CheckpointError):
        push_weights(trained / "nowhere", server.url, key=KEY)
    assert server.ready()["weights"] == old
    command = [
        sys.executable,
        "-m",
        "headrace.cli.main",
        "weights",
        "push",
        str(trained),
        "--url",
        server.url,
    ]
    refused = subprocess.run([*command, "--push-key", "guess"], capture_output=True, text=True, check=False)
    assert (
        refused.returncode == 2
        and "no valid push key" in refused.stderr
        and "Traceback" not in refused.stderr
    )
    taken = subprocess.run([*command, "--push-key", KEY], capture_output=True, text=True, check=False)
    assert taken.returncode == 0 and "GB/s" in taken.stdout, taken.stderr


@pytest.mark.parametrize("leaning", ["prefill", "decode"])
def test_a_worker_that_dies_meanwhile_comes_back_with_the_weights_that_serve(
    server: Server, trained: Path, answers: dict[str, list[str]], leaning: str
):
    """Killed at whatever moment: the push is taken by all, or by none and says so."""
    begin(server)
    with ThreadPoolExecutor(2) as threads:
        pushing = threads.submit(push_weights, trained, server.url, key=KEY)
        asked = threads.submit(ask, server, PROMPTS[1], 200)
        server.kill(leaning)
        error = pushing.exception()
        assert error is None or "the old weights go on serving" in str(error)
        assert asked.result().usage.completion_tokens == 200
    server.wait_ready()
    told = "old" if error else "new"
    assert ask(server, PROMPTS[0]).choices[0].text == answers[told][0]
    epochs = {i["name"]: i["epoch"] for i in server.instances()}
    for pid in [i["pid"] for i in server.instances()]:
        os.kill(pid, signal.SIGKILL)
    server.wait_until("new", lambda: all(i["epoch"] > epochs[i["name"]] for i in server.instances()))
    server.wait_ready()
    assert ask(server, PROMPTS[0]).choices[0].text == answers[told][0], "who starts later has the same"
    assert {i["weights"] for i in server.instances()} == {server.ready()["weights"]}
