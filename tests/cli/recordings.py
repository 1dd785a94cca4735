"""Small recordings and profiles in the form in which serve and profile write them."""

from pathlib import Path
from typing import Any

import msgspec
import yaml

from headrace.cli import wiring
from headrace.cli.options import ServeOptions, resolve
from headrace.cli.wiring import Probe
from headrace.cost.arithmetic import kv_spec, shape_of
from headrace.types.profile import CopySample, PairSample, Profile, StepSample
from headrace.types.recording import RecordedChoice, RecordedInstance, RecordedRequest, Recording

MS = 1_000_000
CONFIG: dict[str, Any] = msgspec.json.decode((wiring.BUNDLED / "config.json").read_bytes())
KV_BYTES = 48 * 2**20


def profile_file(folder: Path, threads: int = 1) -> Path:
    """Of the bundled model: a step takes 2 ms, 20 us a prompt token and 0.1 ms a sequence."""
    prefills = [((tokens, 0),) for tokens in (16, 64, 256, 512)]
    steps = [StepSample(each, 0, 0, (0.002 + each[0][0] * 20e-6,)) for each in prefills]
    steps += [StepSample((), rows, rows * 100, (0.002 + rows * 1e-4,)) for rows in (1, 4, 16, 64)]
    profile = Profile(
        model="headrace-python-5m",
        config=CONFIG,
        engine_version="0",
        device="a test",
        threads=threads,
        dtype="bfloat16",
        block_size=32,
        steps=tuple(steps),
        pairs=(PairSample("decode", "prefill", 1.5),),
        copies=tuple(CopySample(size, 1, (0.001 + size / 1e9,)) for size in (2**20, 2**24, 2**26)),
        message_s=1e-4,
        request_overhead_s=2e-3,
    )
    path = folder / "profile.json"
    path.write_bytes(msgspec.json.encode(profile))
    return path


def recording(folder: Path, requests: int = 40) -> Path:
    """Two mixed workers with a pool each. The first request fails, the second is cancelled in the midst."""
    spec = kv_spec(shape_of(CONFIG), 32)
    names = ("worker0", "worker1")
    blocks = KV_BYTES // sum(spec.block_bytes(group) for group in range(len(spec.groups)))
    made = Recording(
        version="0",
        started="2026-01-01T00:00:00.000+00:00",
        started_ns=0,
        device="a test",
        threads=1,
        model="headrace-python-5m",
        config=CONFIG,
        fingerprint="",
        numerics="",
        spec=spec,
        vocabulary=4096,
        length_max=2048,
        pools=((blocks,), (blocks,)),
        instances=tuple(RecordedInstance(name, "mixed", pool) for pool, name in enumerate(names)),
    )
    folder.mkdir()
    (folder / "meta.json").write_bytes(msgspec.json.encode(made))
    options = resolve(ServeOptions, None, {"instances": 2, "separate_pools": True, "max_num_seqs": 8})
    found = Probe(fingerprint="", spec=spec, vocabulary=4096, length_max=2048)
    (folder / "cluster.yaml").write_text(yaml.safe_dump(wiring.settled(options, found, KV_BYTES)))
    lines = [msgspec.json.encode(_request(number)) for number in range(1, requests + 1)]
    (folder / "trace.jsonl").write_bytes(b"\n".join(reversed(lines)) + b"\n")
    return folder


def _request(number: int) -> RecordedRequest:
    arrival_ns = 100 * MS + number * 20 * MS + number % 7 * MS
    output = {1: 0, 2: 3}.get(number, 10 + number % 5)
    choice = RecordedChoice(
        placed_ns=arrival_ns + MS,
        prefill_ns=arrival_ns + 2 * MS,
        prefilled_ns=arrival_ns + 8 * MS,
        first_ns=arrival_ns + 9 * MS if output else 0,
        finished_ns=arrival_ns + (9 + 3 * output) * MS,
        attempts=1,
        prefill=f"worker{number % 2}",
        decode=f"worker{number % 2}",
    )
    return RecordedRequest(
        number=number,
        arrival_ns=arrival_ns,
        prompt=200 + number,
        output=(output,),
        block_size=32,
        prompt_blocks=tuple(range(number % 3, number % 3 + 6)),
        output_blocks=((),),
        finish=({1: "failed", 2: "cancelled"}.get(number, "length"),),
        tokens_max=16,
        choices=(choice,),
    )
