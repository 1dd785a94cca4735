"""What the command line says of itself."""

import pytest
from typer.testing import CliRunner

from headrace.cli.main import app

COMMANDS = (
    "serve",
    "worker",
    "generate",
    "bench",
    "simulate",
    "compare",
    "replay",
    "trace",
    "profile",
    "fuzz",
    "demo",
    "version",
)


def said(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "TERM": "dumb"})
    assert done.exit_code == 0, done.output
    return " ".join(done.output.split())


def test_all_commands_are_listed() -> None:
    text = said("--help")
    assert [name for name in COMMANDS if f" {name} " not in text] == []


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (
            "serve",
            (
                "--stream-interval",
                "[default: 512]",
                "[default: least_load]",
                "[default: 1 if no --instances]",
            ),
        ),
        (
            "worker",
            (
                "--join",
                "HOST:PORT where",
                "--leaning decode",
                "HEADRACE_SECRET",
                "openssl rand",
                "--join-timeout",
            ),
        ),
        ("simulate", ("h100-1p1d", "--tensor-parallel", "--kv-memory", "[default: none]", "--perfetto")),
        ("compare", ("--vary", "--seeds", "[default: 5]", "--hardware")),
        ("replay", ("--verify", "--profile", "DIR")),
        ("profile", ("--quick", "--out")),
        ("fuzz", ("--seeds", "0:1000", "--keep-going")),
    ],
)
def test_help_is_enough_to_begin_with(command: str, words: tuple[str, ...]) -> None:
    text = said(command, "--help").replace("│ │ ", "")
    assert [word for word in words if word not in text] == []


def test_simulations_have_no_flags_of_the_live_engine() -> None:
    text = said("simulate", "--help")
    assert "--threads" not in text and "--record" not in text and "--port" not in text


def test_trace_has_commands_of_its_own() -> None:
    text = said("trace", "--help")
    assert all(name in text for name in ("describe", "generate", "fit", "convert"))
    assert "--html" in said("trace", "describe", "--help")


def test_fuzz_runs_seeds() -> None:
    assert "none failed" in said("fuzz", "--seeds", "0:2", "--jobs", "1")
