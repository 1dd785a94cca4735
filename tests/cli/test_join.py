"""What `headrace serve --listen` and `headrace worker` say of flags that cannot work."""

from pathlib import Path

import pytest

from tests.cli.test_commands import headrace

SECRET = {"HEADRACE_SECRET": "one that all hosts share"}
NONE = {"HEADRACE_SECRET": ""}


@pytest.mark.parametrize(
    ("command", "variables", "named"),
    [
        ("serve --port 0 --listen 127.0.0.1:0", NONE, "--secret-file"),
        ("serve --port 0 --listen 127.0.0.1:0", {"HEADRACE_SECRET": "short"}, "at least 16"),
        ("serve --port 0 --listen 127.0.0.1:0 --secret-file no/such", SECRET, "--secret-file no/such"),
        ("serve --port 0 --listen nowhere", SECRET, "--listen 'nowhere' is not HOST:PORT"),
        ("serve --port 0 --listen 203.0.113.7:7000", SECRET, "--listen 203.0.113.7:7000"),
        ("serve --port 0 --listen 0.0.0.0:0", SECRET, "--transfer-hosts"),
        ("serve --port 0 --listen 127.0.0.1:0 --transport shm", SECRET, "--transport shm"),
        ("worker", SECRET, "--join"),
        ("worker --join host", SECRET, "--join 'host' is not HOST:PORT"),
        ("worker --join 127.0.0.1:1", NONE, "--secret-file"),
        ("worker no/such/folder --join 127.0.0.1:1", SECRET, "MODEL"),
        ("worker --join 127.0.0.1:1 --join-timeout 0.2", SECRET, "nobody listens at 127.0.0.1:1"),
    ],
)
def test_what_is_wrong_is_named(command: str, variables: dict[str, str], named: str) -> None:
    done = headrace(*command.split(), **variables)
    assert done.returncode == 2, done.stderr
    assert named in done.stderr
    assert "Traceback" not in done.stderr and SECRET["HEADRACE_SECRET"] not in done.stderr


def test_a_lone_secret_is_not_ignored(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("one that all hosts share")
    done = headrace("serve", "--port", "0", "--secret-file", str(file))
    assert done.returncode == 2
    assert "--listen" in done.stderr
