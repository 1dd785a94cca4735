"""The devices that Headrace knows, by name: one YAML file each in `assets/hardware`."""

from difflib import get_close_matches
from pathlib import Path

import msgspec
import yaml

from headrace.cost.hardware import Hardware
from headrace.types.errors import ConfigError

FOLDER = Path(__file__).parent.parent / "assets" / "hardware"


def names() -> list[str]:
    """Of all devices in the catalogue, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def hardware(name: str) -> Hardware:
    """The device of that name. Raises ConfigError naming the nearest match and those known, or what is wrong in its file."""
    known = names()
    if name not in known:
        near = get_close_matches(name.lower(), known, n=1, cutoff=0.4)
        meant = f"; did you mean {near[0]}" if near else ""
        raise ConfigError(f"no hardware {name!r} in the catalogue{meant}. It has: {', '.join(known)}")
    return read(FOLDER / f"{name}.yaml")


def read(path: Path) -> Hardware:
    """A device's file. Raises ConfigError naming the file and the key that is unknown, missing or wrong."""
    try:
        device = msgspec.convert(yaml.safe_load(path.read_text()), Hardware, str_keys=True)
    except (msgspec.ValidationError, yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path.name}: {error}") from error
    if device.name != path.stem:
        raise ConfigError(f"{path.name}: name is {device.name!r}, expected {path.stem!r}")
    return device
