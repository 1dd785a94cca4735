"""Secrets, keys, and addresses of doors."""

from pathlib import Path

import pytest

from headrace.live.keys import VARIABLE, door_of, keys_of, read_secret
from headrace.types.errors import ConfigError


def test_a_secret_comes_from_a_file_or_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "secret"
    file.write_text("what the file says, and more\n")
    monkeypatch.setenv(VARIABLE, "what the variable says")
    assert read_secret(file) == b"what the file says, and more"
    assert read_secret(None) == b"what the variable says"
    with pytest.raises(ConfigError, match="No such file"):
        read_secret(tmp_path / "nothing")


@pytest.mark.parametrize(("secret", "words"), [("", "give --secret-file FILE"), ("short", "at least 16")])
def test_no_secret_or_a_short_one_is_refused(
    secret: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, secret)
    with pytest.raises(ConfigError, match=words):
        read_secret(None)


def test_keys_follow_from_the_secret_and_are_not_shown() -> None:
    keys = keys_of(b"one secret of many")
    assert keys == keys_of(b"one secret of many") != keys_of(b"another one of many")
    assert keys.hub_public.decode() not in repr(keys) and keys.hub_secret.decode() not in repr(keys)


def test_doors() -> None:
    assert door_of("10.0.0.1:7000", "--join") == ("10.0.0.1", 7000)
    assert door_of("[fe80::1]:7000", "--join") == ("fe80::1", 7000)
    assert door_of("host:0", "--listen", port_min=0) == ("host", 0)
    for wrong in ("host", "host:", ":7000", "host:0", "host:70000", "host:-1", "host:1x"):
        with pytest.raises(ConfigError, match=r"--join .* is not HOST:PORT"):
            door_of(wrong, "--join")
    with pytest.raises(ConfigError, match="IPv6"):
        door_of("fe80::1:7000", "--join")
