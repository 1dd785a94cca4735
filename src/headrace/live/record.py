"""`--record DIR`: what was asked of a service, when, and what became of it (see `types.recording` for what lies in the folder).

A request is followed from `submitted` to `ended`, which writes its line at once: a killed service loses the requests that it was at.
"""

import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path

import msgspec
import yaml

from headrace import __version__
from headrace.live.journal import JOURNALS
from headrace.live.machine import processor
from headrace.live.settings import Model, RecordSettings
from headrace.types.errors import ConfigError, Overloaded
from headrace.types.hashing import block_hashes
from headrace.types.ids import Address, RequestId
from headrace.types.messages import AnyMessage, InstanceInfo, Resume, Role, Start
from headrace.types.payload import Chunk, Submission
from headrace.types.recording import (
    CANCELLED,
    FAILED,
    REJECTED,
    RecordedChoice,
    RecordedInstance,
    RecordedRequest,
    Recording,
)
from headrace.types.request import FinishReason, Timeline

log = logging.getLogger(__name__)

TRACE = "trace.jsonl"
META = "meta.json"
CLUSTER = "cluster.yaml"
KEY_BYTES = 32
TENANT_HEX = 12
"""Digits of a tenant's name."""


@dataclass(slots=True)
class Progress:
    """One choice as it goes. Instants are the service's."""

    sent: list[int] = field(default_factory=list[int])
    timeline: Timeline = field(default_factory=Timeline)
    """As last told."""
    attempts: int = 0
    prefill: str = ""
    decode: str = ""
    first_ns: int = 0
    finished_ns: int = 0
    finish: str = ""
    """Empty while it runs."""


@dataclass(slots=True)
class Open:
    """One request under way."""

    submission: Submission
    choices: list[Progress]


def check_folder(settings: RecordSettings) -> None:
    """Raises ConfigError if the folder holds something, or cannot be made."""
    folder = Path(settings.folder)
    try:
        (folder / JOURNALS).mkdir(parents=True, exist_ok=True)
        taken = any(path.name != JOURNALS for path in folder.iterdir()) or any((folder / JOURNALS).iterdir())
    except OSError as error:
        raise ConfigError(f"--record {folder}: {error.strerror}") from error
    if taken:
        raise ConfigError(f"--record {folder} is not empty; name a new folder for each recording")


def describe(
    record: RecordSettings,
    model: Model,
    threads: int,
    now_ns: int,
    numerics: str,
    infos: Sequence[tuple[str, InstanceInfo]],
) -> Recording:
    """`threads`: of each worker. `infos`: the workers by name."""
    pools = {info.pool: info.blocks_total for _, info in infos}
    return Recording(
        version=__version__,
        started=datetime.now(UTC).isoformat(timespec="milliseconds"),
        started_ns=now_ns,
        device=processor(),
        threads=threads,
        model=model.name,
        config=record.config,
        fingerprint=model.fingerprint,
        numerics=numerics,
        spec=model.spec,
        vocabulary=model.vocabulary,
        length_max=model.length_max,
        pools=tuple(pools[pool] for pool in sorted(pools)),
        instances=tuple(RecordedInstance(name, info.leaning, info.pool) for name, info in infos),
        text=record.text,
    )


class Place(msgspec.Struct, order=True):
    """Of a line."""

    arrival_ns: int
    number: int


def put_in_order(trace: Path) -> None:
    """By arrival. The file is replaced at once, so a kill leaves it as it was or as it is to be."""
    decode = msgspec.json.Decoder(Place).decode
    ordered = trace.with_suffix(".ordered")
    try:
        lines = trace.read_bytes().splitlines(keepends=True)
        ordered.write_bytes(b"".join(sorted(lines, key=decode)))
        ordered.replace(trace)
    except OSError as error:
        log.error("%s stays in the order in which requests ended: %s", trace, error)


class Recorder:
    """Everything is called on the service's loop, in the order in which it happens."""

    def __init__(self, settings: RecordSettings, recording: Recording) -> None:
        """Writes all of the folder but the journals. Raises ConfigError."""
        self._text = settings.text
        self._started_ns = recording.started_ns
        self._block_size = recording.spec.block_size
        self._key = secrets.token_bytes(KEY_BYTES)
        self._open: dict[RequestId, Open] = {}
        self._last = (-1, 0)
        self._unordered = False
        """Some request ended before one that had come earlier."""
        self._encode = msgspec.json.Encoder().encode
        folder = Path(settings.folder)
        try:
            (folder / CLUSTER).write_text(yaml.safe_dump(settings.settings, sort_keys=False), "utf-8")
            (folder / META).write_bytes(msgspec.json.format(self._encode(recording)) + b"\n")
            self._path = folder / TRACE
            self._file = open(self._path, "xb", buffering=0)  # noqa: SIM115 (closed by close)
        except OSError as error:
            raise ConfigError(f"--record {folder}: {error.strerror}") from error

    def submitted(self, submission: Submission) -> None:
        choices = [Progress() for _ in range(submission.request.choices)]
        self._open[submission.request.id] = Open(submission, choices)

    def told(self, target: Address, message: AnyMessage) -> None:
        """The router says this to an instance."""
        if not isinstance(message, Start | Resume):
            return
        request = self._open.get(message.key.request)
        if request is None:
            return
        choice = request.choices[message.key.choice]
        choice.attempts = message.key.attempt + 1
        if isinstance(message, Resume):
            choice.decode = target.name
            return
        if message.role is not Role.DECODE:
            choice.prefill, choice.decode = target.name, ""
        if message.role is not Role.PREFILL:
            choice.decode = target.name

    def delivered(self, request: RequestId, chunk: Chunk, now_ns: int) -> None:
        """These tokens were handed to the API."""
        choice = self._open[request].choices[chunk.choice]
        choice.sent += chunk.token_ids
        choice.first_ns = choice.first_ns or now_ns
        choice.timeline = chunk.timeline or choice.timeline
        if chunk.finish is not None:
            choice.finish, choice.finished_ns = chunk.finish.value, now_ns

    def withdrawn(self, request: RequestId, index: int, now_ns: int) -> None:
        """The API found a stop string."""
        at_hand = self._open.get(request)
        if at_hand is None:
            # What is read ahead of the API may have ended before it finds the string.
            return
        choice = at_hand.choices[index]
        if not choice.finish:
            choice.finish, choice.finished_ns = FinishReason.STOP.value, now_ns

    def ended(self, request: RequestId, error: Exception | None, now_ns: int) -> None:
        """Its stream is closed: by its end, by `error`, or by the client."""
        at_hand = self._open.pop(request)
        finish = CANCELLED if error is None else REJECTED if isinstance(error, Overloaded) else FAILED
        for choice in at_hand.choices:
            if not choice.finish:
                choice.finish, choice.finished_ns = finish, now_ns
        line = self._line(at_hand, str(error or ""))
        if self._file.closed:
            return
        self._unordered |= (line.arrival_ns, line.number) < self._last
        self._last = (line.arrival_ns, line.number)
        try:
            self._file.write(self._encode(line) + b"\n")
        except OSError as failed:
            log.error("the recording ends here: %s", failed)
            self._file.close()

    def close(self) -> None:
        """Put the lines in order of arrival."""
        self._file.close()
        if self._unordered:
            put_in_order(self._path)

    def _line(self, at_hand: Open, error: str) -> RecordedRequest:
        request, payload = at_hand.submission.request, at_hand.submission.payload
        tenant = request.tenant if self._text or not request.tenant else self._tenant(request.tenant)
        return RecordedRequest(
            number=request.id,
            arrival_ns=self._from_begin(request.arrival_ns),
            prompt=request.prompt,
            output=tuple(len(choice.sent) for choice in at_hand.choices),
            block_size=self._block_size,
            prompt_blocks=self._names(request.hashes),
            output_blocks=tuple(self._blocks_behind(at_hand.submission, c.sent) for c in at_hand.choices),
            finish=tuple(choice.finish for choice in at_hand.choices),
            tokens_max=request.tokens_max,
            choices=tuple(self._choice(choice) for choice in at_hand.choices),
            category=request.category,
            tenant=tenant,
            priority=request.priority,
            ttft_ns=request.slo.ttft_ns,
            tpot_ns=request.slo.tpot_ns,
            error=error,
            prompt_ids=tuple(payload.token_ids[: request.prompt]) if self._text else (),
            output_ids=tuple(tuple(choice.sent) for choice in at_hand.choices) if self._text else (),
        )

    def _blocks_behind(self, submission: Submission, sent: list[int]) -> tuple[int, ...]:
        """Names of the full blocks that begin behind the prompt's last full one."""
        request, payload = submission.request, submission.payload
        known = len(request.hashes)
        parent = request.hashes[-1] if known else payload.root
        behind = payload.token_ids[known * self._block_size : request.prompt] + sent
        return self._names(block_hashes(parent, behind, self._block_size))

    def _choice(self, choice: Progress) -> RecordedChoice:
        times = choice.timeline
        return RecordedChoice(
            placed_ns=self._from_begin(times.placed_ns),
            prefill_ns=self._from_begin(times.prefill_ns),
            prefilled_ns=self._from_begin(times.prefilled_ns),
            first_ns=self._from_begin(choice.first_ns),
            joined_ns=self._from_begin(times.joined_ns),
            finished_ns=self._from_begin(choice.finished_ns),
            cached=times.cached,
            cached_decode=times.cached_decode,
            blocks_moved=times.blocks_moved,
            bytes_moved=times.bytes_moved,
            writes=times.writes,
            recomputed=times.recomputed,
            attempts=choice.attempts,
            prefill=choice.prefill,
            decode=choice.decode,
        )

    def _from_begin(self, at_ns: int) -> int:
        return at_ns - self._started_ns if at_ns else 0

    def _names(self, hashes: Sequence[bytes]) -> tuple[int, ...]:
        return tuple(int.from_bytes(self._digest(h, 8), "little") >> 1 for h in hashes)

    def _tenant(self, name: str) -> str:
        return self._digest(name.encode(), TENANT_HEX // 2).hex()

    def _digest(self, secret: bytes, size: int) -> bytes:
        return blake2b(secret, key=self._key, digest_size=size).digest()
