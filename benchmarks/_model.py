"""The model that benchmarks share: Qwen3-0.6B's shape with random weights, made once by `tools/make_model.py`."""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
FOLDER = HERE / ".cache" / "qwen3-0.6b-shape"
VOCABULARY = 32_000


def qwen3_shape() -> Path:
    """Its folder; made on the first call (0.9 GiB, about ten seconds)."""
    if not all((FOLDER / name).exists() for name in ("model.safetensors", "tokenizer.json")):
        make(FOLDER)
    return FOLDER


def make(folder: Path, **sizes: int) -> None:
    """Run `tools/make_model.py`."""
    flags = [text for name, size in sizes.items() for text in (f"--{name.replace('_', '-')}", str(size))]
    subprocess.run([sys.executable, HERE.parent / "tools" / "make_model.py", folder, *flags], check=True)


def prompt(number: int, length: int) -> list[int]:
    """Token ids without structure, other ones for every number: no two prompts share a block."""
    return [
        (17 + 7919 * i + 104_729 * (number + 1) * (i % 13 + 1)) % (VOCABULARY - 1) + 1 for i in range(length)
    ]
