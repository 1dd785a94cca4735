"""The model that a simulation is of: a config.json from a folder, a file, a profile, or one of the shapes known by name."""

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import msgspec

from headrace.cli import wiring
from headrace.cli.options import ClusterOptions
from headrace.types.errors import ConfigError
from headrace.types.profile import Profile

FOLDER = Path(__file__).parent.parent / "assets" / "models"
KV_DTYPES = ("float32", "bfloat16", "float16")
LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length")


def names() -> list[str]:
    """Shapes that are known by name, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def model_config(options: ClusterOptions, profile: Profile | None = None) -> dict[str, Any]:
    """The config.json that `model` means: of a folder, a file, a known shape, else of the profile, else of the bundled model.

    Raises ConfigError with the nearest name.
    """
    if options.model is None:
        return profile.config if profile is not None else read_config(wiring.BUNDLED / "config.json")
    model = options.model
    if model.is_dir():
        return read_config(model / "config.json")
    if model.is_file():
        return read_config(model)
    if str(model) in names():
        return read_config(FOLDER / f"{model}.json")
    near = get_close_matches(str(model).lower(), names(), 1, 0.4)
    meant = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(
        f"MODEL {model} is no folder with a config.json, and no shape known by name{meant} Known: {', '.join(names())}"
    )


def read_config(path: Path) -> dict[str, Any]:
    """Raises ConfigError."""
    try:
        found = msgspec.json.decode(path.read_bytes())
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"MODEL {path}: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"MODEL {path}: is no JSON object")
    return found


def length_max(options: ClusterOptions, config: Mapping[str, Any]) -> int | None:
    """Tokens of a sequence: as asked, else as the model is meant for, if it says. Raises ConfigError for more than that."""
    meant = next((config[key] for key in LENGTH_KEYS if isinstance(config.get(key), int)), None)
    asked = options.max_model_len
    if asked is not None and meant is not None and asked > meant:
        raise ConfigError(f"--max-model-len {asked} exceeds the {meant} tokens that the model is meant for")
    return asked or meant


def kv_dtype(options: ClusterOptions, config: Mapping[str, Any], profile: Profile | None) -> str:
    """As asked, as it was profiled, or the checkpoint's."""
    if options.dtype != "auto":
        return options.dtype
    if profile is not None:
        return profile.dtype
    said = config.get("dtype") or config.get("torch_dtype")
    return said if said in KV_DTYPES else "bfloat16"
