"""Fetch public traces from their publishers into a data folder, each by its checksum.

    python tools/fetch_data.py --list
    python tools/fetch_data.py --data DIR mooncake/conversation_trace.jsonl azure2023

A file whose checksum is wrong is not kept. Of some files the checksum is not known here: the tool then prints the one that it got, keeps
nothing, and takes the file with `--accept SHA256`. Each file has its publisher's licence, not this project's.
"""

import argparse
import hashlib
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

RAW = "https://raw.githubusercontent.com"
LFS = "https://media.githubusercontent.com/media"
CHUNK = 1 << 20
TIMEOUT_S = 60


@dataclass(frozen=True, slots=True)
class Entry:
    """One file as its publisher has it."""

    name: str
    """Below the data folder."""
    url: str
    sha256: str | None
    """None: not known here."""
    licence: str


class FetchError(Exception):
    """What went wrong with a file, and what to do."""


AZURE = "CC-BY-4.0; credit Splitwise (ISCA'24) for 2023, DynamoLLM (HPCA'25) for 2024"
AZURE_2023 = f"{RAW}/Azure/AzurePublicDataset/790921015d50dd6aae7f7e47f39ba0e235ad6b08/data"
AZURE_2024 = "https://azurepublicdatasettraces.blob.core.windows.net/azurellminfererencetrace"
BURSTGPT = "CC-BY-4.0; credit BurstGPT (KDD'25)"
BURSTGPT_LFS = f"{LFS}/HPMLL/BurstGPT/5d93d820d9b6bee4e26914df003e5713538164ae/data"
BURSTGPT_RELEASE = "https://github.com/HPMLL/BurstGPT/releases/download/v2.0"
MOONCAKE = "Apache-2.0; credit Mooncake (FAST'25)"
VIDUR = f"{RAW}/microsoft/vidur/6d98aa8f71696520acc603d87439e77cc78160a7/data/processed_traces"

ENTRIES = (
    Entry(
        "azure2023/AzureLLMInferenceTrace_conv.csv",
        f"{AZURE_2023}/AzureLLMInferenceTrace_conv.csv",
        "2f1e5b666d4e3055fdbba98598ce2ec307767b9064e03e2fa46676dbcc7d0bf8",
        AZURE,
    ),
    Entry(
        "azure2023/AzureLLMInferenceTrace_code.csv",
        f"{AZURE_2023}/AzureLLMInferenceTrace_code.csv",
        None,
        AZURE,
    ),
    Entry(
        "azure2024/AzureLLMInferenceTrace_code_1week.csv",
        f"{AZURE_2024}/AzureLLMInferenceTrace_code_1week.csv",
        None,
        AZURE,
    ),
    Entry(
        "azure2024/AzureLLMInferenceTrace_conv_1week.csv",
        f"{AZURE_2024}/AzureLLMInferenceTrace_conv_1week.csv",
        None,
        AZURE,
    ),
    Entry(
        "mooncake/conversation_trace.jsonl",
        f"{RAW}/kvcache-ai/Mooncake/a2a4b18ac537fd798d50e6e9f57031ce86419a37/FAST25-release/traces/conversation_trace.jsonl",
        "b8cbb061a85206d729d91cdc2981f43c9e0d99209dce588d3af5f7934408b9df",
        MOONCAKE,
    ),
    Entry(
        "mooncake/synthetic_trace.jsonl",
        f"{RAW}/kvcache-ai/Mooncake/3cca71daccf2a7afb8fe3f0295358f70e3a69fdb/FAST25-release/traces/synthetic_trace.jsonl",
        "bd070915a98fc0ed264d7cfef2ce746002eb3076a695ec31ba2674c0111ec131",
        MOONCAKE,
    ),
    Entry(
        "mooncake/toolagent_trace.jsonl",
        f"{RAW}/kvcache-ai/Mooncake/main/FAST25-release/traces/toolagent_trace.jsonl",
        None,
        MOONCAKE,
    ),
    Entry(
        "burstgpt/BurstGPT_1.csv",
        f"{BURSTGPT_LFS}/BurstGPT_1.csv",
        "4bb3783693d0a435686fbfc885615d2349bd067239079fa4b749f2e679e12122",
        BURSTGPT,
    ),
    Entry(
        "burstgpt/BurstGPT_2.csv",
        f"{BURSTGPT_LFS}/BurstGPT_2.csv",
        "44bf5942b03fca42c01a226a545ad3a750ec62688faecd67b6831c56a8928bf7",
        BURSTGPT,
    ),
    Entry("burstgpt/BurstGPT_3.csv", f"{BURSTGPT_RELEASE}/BurstGPT_3.csv", None, BURSTGPT),
    Entry(
        "vidur_lengths/arxiv_summarization_stats_llama2_tokenizer_filtered_v2.csv",
        f"{VIDUR}/arxiv_summarization_stats_llama2_tokenizer_filtered_v2.csv",
        "9d3580538d915ca75e4aaaa54590b42dbb17abc6d74c8913310cf07c232adcdc",
        "MIT (microsoft/vidur)",
    ),
)


def main(arguments: Sequence[str] | None = None, entries: Sequence[Entry] = ENTRIES) -> int:
    """0: everything asked for lies in the folder; 1: not everything; 2: what is asked for is not known."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", help="files, or folders of them; all if none is given")
    parser.add_argument(
        "--data", type=Path, default=os.environ.get("HEADRACE_DATA"), help="folder [HEADRACE_DATA]"
    )
    parser.add_argument(
        "--accept", default="", metavar="SHA256", help="take a file of unknown checksum if it has this one"
    )
    parser.add_argument("--list", action="store_true", help="print what there is, and fetch nothing")
    options = parser.parse_args(arguments)
    if options.list:
        for entry in entries:
            print(
                f"{entry.name}\n  {entry.url}\n  sha256 {entry.sha256 or 'not known here'}\n  {entry.licence}"
            )
        return 0
    if options.data is None:
        parser.error("give --data DIR, or set HEADRACE_DATA")
    wanted = [entry for entry in entries if not options.names or _asked(entry, options.names)]
    unknown = [name for name in options.names if not any(_asked(entry, [name]) for entry in entries)]
    if unknown:
        parser.error(f"no file or folder {', '.join(unknown)}; --list names them")
    failed = 0
    for entry in wanted:
        try:
            print(f"{entry.name}: {fetch(entry, options.data, options.accept)}")
        except FetchError as error:
            failed += 1
            print(f"{entry.name}: {error}", file=sys.stderr)
    return 1 if failed else 0


def _asked(entry: Entry, names: Sequence[str]) -> bool:
    return any(entry.name == name or entry.name.startswith(name.rstrip("/") + "/") for name in names)


def fetch(entry: Entry, data: Path, accept: str = "") -> str:
    """Bring one file into the folder unless it lies there; what was done. Raises FetchError; then nothing is kept."""
    target = data / entry.name
    right = entry.sha256 or accept.lower()
    if target.exists():
        found = _digest(target)
        if right and found != right:
            raise FetchError(
                f"{target} has the checksum {found}, not {right}; move it away and fetch it again"
            )
        return "is there" if right else f"is there; its checksum is not known here, and is {found}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".fetching-") as file:
            with urlopen(entry.url, timeout=TIMEOUT_S) as answer:
                while piece := answer.read(CHUNK):
                    file.write(piece)
            file.flush()
            found = _digest(Path(file.name))
            if not right:
                raise FetchError(
                    f"its checksum is not known here; it has {found}. If that is right, add --accept {found}"
                )
            if found != right:
                raise FetchError(
                    f"it has the checksum {found}, not {right}: the publisher changed it, or it broke on its way"
                )
            os.link(file.name, target)
            target.chmod(0o644)
    except (URLError, HTTPException, OSError) as error:
        raise FetchError(f"cannot fetch {entry.url}: {error}") from error
    return f"fetched, {target.stat().st_size:,} bytes; {entry.licence}"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    sys.exit(main())
