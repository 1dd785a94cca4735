"""What machine this is."""

import os
import platform
from pathlib import Path


def processor() -> str:
    """The processor's name, and how many of its cores this process may use."""
    cores = len(os.sched_getaffinity(0))
    return f"{_name()}, {cores} core{'s' if cores != 1 else ''}"


def _name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()
