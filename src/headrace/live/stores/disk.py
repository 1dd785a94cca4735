"""Local disk as a tier: one file a block, which outlives the service.

`FOLDER/<terms>/<pool>/<2 digits>/<hash>.kv`, each as `kv.frames` says. A file is written under another name and renamed, so that there is a
whole one or none; whatever the disk makes of it, nothing is served whose checksums are not right. What is damaged is deleted and counted;
what is no file of ours is left alone. Folders of other terms (models, arithmetic) are not looked into. A lock keeps a second service out.

The terms are those of the weights with which the service was started. What is written after new ones were pushed names other terms in its
header (`renew`): this life serves it, and the next one, which does not have those weights, deletes it.
"""

import fcntl
import logging
import os
from contextlib import suppress
from pathlib import Path

from headrace.kv import frames
from headrace.kv.frames import Verdict
from headrace.types.errors import ConfigError
from headrace.types.ids import BlockHash

log = logging.getLogger(__name__)

SUFFIX, UNFINISHED = ".kv", ".tmp"
HASH_DIGITS = 32


class DiskStore:
    """Implements `ports.Store`. One thread uses it."""

    def __init__(self, folder: Path, terms: bytes, pool: str, block_bytes: int) -> None:
        """`terms`: 16 bytes, of all that must be alike. Raises ConfigError for a folder that cannot be used."""
        self._terms = terms
        self._newest = terms
        """What is written now is of these,"""
        self._known = {terms}
        """and what this life has written, of one of these."""
        self._block_bytes = block_bytes
        self.folder = folder / terms.hex() / pool
        self.damaged = 0
        """Files that were not what they are called, and are deleted now."""
        self.foreign = 0
        """Files that are none of ours, and are left alone."""
        self.outdated = 0
        """Files of weights that were pushed to an earlier life, and are deleted now."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"--disk-cache {folder}: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise ConfigError(
                f"--disk-cache {folder} is in use by another service: give each its own"
            ) from error

    def recover(self) -> tuple[BlockHash, ...]:
        """What is there and looks whole, used longest ago first. Deletes what was never finished, or is damaged."""
        found: list[tuple[int, BlockHash]] = []
        for folder in sorted(path for path in self.folder.iterdir() if path.is_dir()):
            for path in sorted(folder.iterdir()):
                if path.suffix == UNFINISHED and _name_of(path) is not None:
                    self._remove(path)
                    continue
                name = _name_of(path) if path.suffix == SUFFIX else None
                if name is None or self._path(name) != path:
                    self._ignore(path)
                elif self._looks_whole(path, name):
                    found.append((path.stat().st_mtime_ns, name))
        if self.foreign or self.damaged:
            log.warning(
                "%s: %d files are none of ours and are ignored, %d were damaged and are deleted",
                self.folder,
                self.foreign,
                self.damaged,
            )
        return tuple(name for _, name in sorted(found))

    def renew(self, terms: bytes) -> None:
        """What is written from now on is of other weights: 16 bytes with which no life begins."""
        self._newest = terms
        self._known.add(terms)

    def put(self, key: BlockHash, value: memoryview) -> None:
        """Raises OSError: a full disk, say."""
        path = self._path(key)
        unfinished = path.with_suffix(UNFINISHED)
        try:
            path.parent.mkdir(exist_ok=True)
            with open(unfinished, "wb", buffering=0) as file:
                file.write(frames.header(self._newest, key, value))
                rest = value
                while len(rest):
                    rest = rest[file.write(rest) :]
            os.replace(unfinished, path)
        except OSError:
            self._remove(unfinished)
            raise

    def get(self, key: BlockHash, target: memoryview) -> bool:
        """What is damaged is deleted. `target` may have been written in vain."""
        path = self._path(key)
        try:
            with open(path, "rb", buffering=0) as file:
                head = file.read(frames.HEADER_BYTES)
                done = 0
                while done < len(target) and (count := file.readinto(target[done:])):
                    done += count
                whole = done == len(target) and not file.read(1)
        except OSError as error:
            log.warning("%s cannot be read: %s", path, error.strerror)
            return False
        terms = frames.stated(head)
        terms = terms if terms in self._known else self._terms
        verdict = frames.verify(head, target, terms, key) if whole else Verdict.TORN
        if verdict is Verdict.GOOD:
            self._touch(path)
            return True
        self._damaged(path, verdict)
        return False

    def delete(self, key: BlockHash) -> None:
        self._remove(self._path(key))

    def close(self) -> None:
        os.close(self._lock)

    def _path(self, name: BlockHash) -> Path:
        digits = name.hex()
        return self.folder / digits[:2] / f"{digits}{SUFFIX}"

    def _looks_whole(self, path: Path, name: BlockHash) -> bool:
        """By its header and its size: all of it is only read when it is wanted."""
        try:
            with open(path, "rb", buffering=0) as file:
                head = file.read(frames.HEADER_BYTES)
            size = path.stat().st_size - frames.HEADER_BYTES
        except OSError:
            self._ignore(path)
            return False
        terms = frames.stated(head)
        verdict = frames.judge(head, size, terms, name)
        if verdict is Verdict.GOOD and size == self._block_bytes:
            if terms == self._terms:
                return True
            self.outdated += 1
            self._remove(path)
            return False
        if verdict is Verdict.FOREIGN:
            self._ignore(path)
        else:
            self._damaged(path, verdict)
        return False

    def _damaged(self, path: Path, verdict: Verdict) -> None:
        """A file of ours by its name, in a folder that is ours."""
        log.warning("%s is %s and is not served", path, verdict.value)
        if verdict is Verdict.FOREIGN:
            self.foreign += 1
            return
        self.damaged += 1
        self._remove(path)

    def _ignore(self, path: Path) -> None:
        self.foreign += 1

    def _touch(self, path: Path) -> None:
        # It only serves to know what was used last.
        with suppress(OSError):
            os.utime(path)

    def _remove(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s cannot be deleted: %s", path, error.strerror)


def _name_of(path: Path) -> BlockHash | None:
    try:
        return BlockHash(bytes.fromhex(path.stem)) if len(path.stem) == HASH_DIGITS else None
    except ValueError:
        return None
