"""How much memory is there: of the machine, and of the control groups (containers) that this process is in."""

from pathlib import Path


def available_bytes(root: Path = Path("/")) -> int:
    """Bytes that can still be used without swapping or being killed."""
    return min([_machine(root / "proc/meminfo"), *_groups(root)])


def _machine(meminfo: Path) -> int:
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{meminfo} does not say MemAvailable")


def _groups(root: Path) -> list[int]:
    """What each control group around this process leaves (versions 1 and 2)."""
    left: list[int] = []
    mount = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return left
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            left += _up(mount, path, "memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            left += _up(mount / "memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes")
    return left


def _up(mount: Path, path: str, limit: str, usage: str) -> list[int]:
    """Limits of a group and of all around it. Inside a container the path may not exist: the mount itself is the group then."""
    left: list[int] = []
    group = mount / path.strip("/")
    while True:
        try:
            most, used = (group / limit).read_text().strip(), int((group / usage).read_text())
            cached = _cached(group / "memory.stat")
            if most != "max":
                left.append(int(most) - used + cached)
        except (OSError, ValueError):
            pass
        if group == mount:
            return left
        group = group.parent


def _cached(stat: Path) -> int:
    """File pages that the kernel gives back when memory is short: they count as used, and are not."""
    for line in stat.read_text().splitlines():
        if line.startswith(("inactive_file ", "total_inactive_file ")):
            return int(line.split()[1])
    return 0
