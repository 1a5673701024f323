"""The host memory that this process may still allocate: what the machine has free, within the limits of its control groups."""

from pathlib import Path

import psutil

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


def available_bytes() -> int:
    """Return the bytes of host memory that can be allocated without swapping.

    SLURM and containers limit a job's memory by a control group, whose limit the machine's free memory does not show.
    """
    return min([psutil.virtual_memory().available, *_cgroup_rooms()])


def _cgroup_rooms(own: Path = _OWN_CGROUPS, root: Path = _CGROUPS) -> list[int]:
    """Return the room in each control group of this process that limits memory, version 1 or 2, parents included."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return []
    rooms: list[int] = []
    for line in lines:
        _, _, fields = line.partition(":")
        controllers, has_path, path = fields.partition(":")
        if not has_path or (controllers and "memory" not in controllers.split(",")):
            continue
        base, names = (root / "memory", _VERSION_1) if controllers else (root, _VERSION_2)
        folder = base / path.lstrip("/")
        while folder.is_relative_to(base):
            room = _room(folder, *names)
            if room is not None:
                rooms.append(room)
            folder = folder.parent
    return rooms


_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = ("memory.max", "memory.current", "inactive_file")


def _room(folder: Path, limit_name: str, usage_name: str, cache_name: str) -> int | None:
    """Return limit - usage of a control group; file contents that the kernel may drop are not counted. None: no limit."""
    try:
        limit, usage = int((folder / limit_name).read_text()), int((folder / usage_name).read_text())
        rows = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
        cached = next((int(value) for name, value in rows if name == cache_name), 0)
    except (OSError, ValueError):  # "max": unlimited
        return None
    return max(0, limit - usage + cached)
