"""tools/fetch_data.py: by checksum or not at all. Only made-up files, from files and a server of this test's own."""

import hashlib
import sys
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "fetch_data.py"
TEXT = b"timestamp_s,input_tokens,output_tokens\n0,1,1\n"
RIGHT = hashlib.sha256(TEXT).hexdigest()


@pytest.fixture(scope="module")
def tool() -> Any:
    spec = spec_from_file_location("fetch_data", TOOL)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["fetch_data"] = module
    spec.loader.exec_module(module)
    return module


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the test's output is not for it."""


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """Of a server that has one file."""
    folder = tmp_path / "publisher"
    folder.mkdir()
    (folder / "trace.csv").write_bytes(TEXT)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/trace.csv"
        server.shutdown()
        thread.join()


def test_a_file_with_its_checksum_is_kept(
    tool: Any, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    entries = [tool.Entry("made/up.csv", url, RIGHT, "a licence")]
    assert tool.main(["--data", str(tmp_path / "data")], entries) == 0
    assert (tmp_path / "data/made/up.csv").read_bytes() == TEXT
    assert "fetched, 45 bytes; a licence" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "data/made").iterdir()] == ["up.csv"]
    assert tool.main(["--data", str(tmp_path / "data"), "made"], entries) == 0
    assert "is there" in capsys.readouterr().out


def test_a_wrong_checksum_is_refused(tool: Any, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    entries = [tool.Entry("a.csv", url, "0" * 64, "x")]
    assert tool.main(["--data", str(tmp_path / "data"), "--accept", RIGHT], entries) == 1
    assert f"has the checksum {RIGHT}, not {'0' * 64}" in capsys.readouterr().err
    assert list((tmp_path / "data").iterdir()) == []


def test_an_unknown_checksum_is_shown_and_asked_for(
    tool: Any, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    data, entries = tmp_path / "data", [tool.Entry("a.csv", url, None, "x")]
    assert tool.main(["--data", str(data)], entries) == 1
    assert f"add --accept {RIGHT}" in capsys.readouterr().err and list(data.iterdir()) == []
    assert tool.main(["--data", str(data), "--accept", "1" * 64], entries) == 1 and list(data.iterdir()) == []
    assert tool.main(["--data", str(data), "--accept", RIGHT.upper()], entries) == 0
    assert (data / "a.csv").read_bytes() == TEXT


def test_a_broken_file_that_is_there_stays_and_is_named(
    tool: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "a.csv").write_text("broken")
    assert tool.main(["--data", str(tmp_path)], [tool.Entry("a.csv", "http://127.0.0.1:9/", RIGHT, "x")]) == 1
    assert "move it away" in capsys.readouterr().err and (tmp_path / "a.csv").read_text() == "broken"


def test_what_cannot_be_fetched_is_named(
    tool: Any, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    wrong = [tool.Entry("a.csv", url + "x", RIGHT, "x"), tool.Entry("b.csv", url, RIGHT, "x")]
    assert tool.main(["--data", str(tmp_path / "data")], wrong) == 1
    assert "a.csv: cannot fetch" in capsys.readouterr().err
    assert (tmp_path / "data/b.csv").exists()  # one that fails does not stop the others


def test_file_urls(tool: Any, tmp_path: Path):
    (tmp_path / "t.csv").write_bytes(TEXT)
    entries = [tool.Entry("a.csv", (tmp_path / "t.csv").as_uri(), RIGHT, "x")]
    assert tool.main(["--data", str(tmp_path / "data")], entries) == 0


def test_wrong_arguments(
    tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.delenv("HEADRACE_DATA", raising=False)
    for arguments in ([], ["--data", str(tmp_path), "nothing"]):
        with pytest.raises(SystemExit) as caught:
            tool.main(arguments)
        assert caught.value.code == 2
    assert "no file or folder nothing; --list names them" in capsys.readouterr().err


def test_the_table_is_sound(tool: Any, capsys: pytest.CaptureFixture[str]):
    assert tool.main(["--list"]) == 0
    text = capsys.readouterr().out
    assert len({entry.name for entry in tool.ENTRIES}) == len(tool.ENTRIES)
    for entry in tool.ENTRIES:
        assert entry.url.startswith("https://") and entry.licence and entry.name in text
        assert entry.sha256 is None or (len(entry.sha256) == 64 and int(entry.sha256, 16))
    assert "not known here" in text
