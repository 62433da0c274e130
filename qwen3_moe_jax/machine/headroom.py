"""How many bytes a program can still take: of main memory, of a control group, of a limit, of a GPU.

Main memory is the minimum of what the host has, what each control group on the path of this
process allows (a container's limit is one), and what ``ulimit`` allows. File pages that the
kernel can drop count as free, as they do in the host's own ``MemAvailable``: a model's file that
was read before must not look like memory in use.

Sources: https://docs.kernel.org/admin-guide/cgroup-v2.html (memory.max, memory.high, memory.stat),
https://docs.kernel.org/admin-guide/cgroup-v1/memory.html, proc(5), getrlimit(2).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import psutil

from qwen3_moe_jax.machine.cuda import free_on_card
from qwen3_moe_jax.machine.threads import cores

ROOT = Path("/")
"""Where ``proc`` and ``sys`` are."""

UNLIMITED = 1 << 60
"""Control groups of version 1 write a number of about 2^63 for no limit."""

MAIN_MEMORY = "main memory"

COMPILER_BYTES = 480 << 20
"""What XLA's compilers of a CPU take for a while beside a plan's working memory: a first run of the embedded
model grew by 890 MB at the peak with XLA's operations, by 660 MB with the CPU's own kernels (two cores)."""

COMPILER_THREADS = 8
THREAD_ADDRESS_BYTES = 72 << 20
"""A thread's stack and its arena of the C library. That run's address space grew by 1,420 MB."""


@dataclass(frozen=True)
class Headroom:
    """Bytes that are free in one place.

    Attributes:
      nbytes: how many; None where the system does not tell.
      where: the place's name.
      origin: the limit that sets the figure; "" for all that the place has.
      kept: bytes that were free too, and are kept for what a compiler takes for a while.
      addresses: bytes of address space that are left, which files that are mapped take too; None is no limit.
    """

    nbytes: int | None
    where: str = MAIN_MEMORY
    origin: str = ""
    kept: int = 0
    addresses: int | None = None

    def __str__(self) -> str:
        free = "an unknown size" if self.nbytes is None else f"{self.nbytes / 1e9:.2f} GB free"
        free += f" beside {self.kept / 1e9:.2f} GB for the compiler" if self.kept else ""
        return f"{self.where}, {free}" + (f" ({self.origin})" if self.origin else "")

    def with_nbytes(self, nbytes: int) -> "Headroom":
        """The same place with another size."""
        return replace(self, nbytes=nbytes)

    def keeping(self, nbytes: int) -> "Headroom":
        """What is left when so many bytes are kept for a compiler."""
        return self if self.nbytes is None else replace(self, nbytes=self.nbytes - nbytes, kept=nbytes)


class Device(Protocol):
    """What is asked of a ``jax.Device``."""

    @property
    def platform(self) -> str:
        """ "cpu", "gpu" or "tpu"."""
        ...

    @property
    def device_kind(self) -> str:
        """The device's name."""
        ...

    @property
    def local_hardware_id(self) -> int | None:
        """CUDA's number of the device."""
        ...

    def memory_stats(self) -> Mapping[str, int] | None:
        """The allocator's figures."""
        ...


def available_memory(device: Device) -> Headroom:
    """What is free where a JAX device keeps its arrays."""
    if device.platform == "cpu":
        return main_memory(compiles=True)
    stats: Mapping[str, int] = device.memory_stats() or {}
    on_card = free_on_card(device.local_hardware_id)
    return device_headroom(device.device_kind, stats, on_card)


def device_headroom(name: str, stats: Mapping[str, int], on_card: int | None) -> Headroom:
    """What JAX's allocator can still get of a GPU.

    Args:
      name: the device's.
      stats: of ``jax.Device.memory_stats``; empty where the allocator keeps none.
      on_card: bytes that no program holds; None where the driver does not tell.
    """
    in_use = stats.get("bytes_in_use", 0)
    found: list[Headroom] = []
    if limit := stats.get("bytes_limit"):
        found.append(Headroom(limit - in_use, name, "JAX's share of it, XLA_CLIENT_MEM_FRACTION"))
    if on_card is not None and ("pool_bytes" in stats or not stats):
        in_pool = max(0, stats.get("pool_bytes", 0) - in_use)
        found.append(Headroom(on_card + in_pool, name, "other programs hold the rest"))
    return _minimum(found) or Headroom(None, name)


def main_memory(
    root: Path | None = None, limits: Mapping[str, int] | None = None, *, compiles: bool = False
) -> Headroom:
    """What this process can still take of main memory without swapping.

    Args:
      root: the folder that holds ``proc`` and ``sys``; None is the system's.
      limits: bytes by name, "RLIMIT_AS" and "RLIMIT_DATA"; None asks the system.
      compiles: keeps what XLA takes while it compiles for a CPU. Where that is missing the process ends
        without a word: a thread of C++ cannot be told.
    """
    root = root or ROOT
    found = [Headroom(_host_memory(root)), *_group_headrooms(root)]
    by_limit = _limit_headrooms(root, limits)
    if compiles:
        found = [place.keeping(COMPILER_BYTES) for place in found]
        by_limit = {name: place.keeping(_kept_of(name)) for name, place in by_limit.items()}
    space = by_limit.get("RLIMIT_AS")
    minimum = _minimum([*found, *by_limit.values()]) or Headroom(None)
    return replace(minimum, addresses=space and space.nbytes)


def _kept_of(limit: str) -> int:
    """Of address space also what threads reserve and do not use."""
    reserved = THREAD_ADDRESS_BYTES * (COMPILER_THREADS + cores()) if limit == "RLIMIT_AS" else 0
    return COMPILER_BYTES + reserved


def available_main_memory() -> int | None:
    """Bytes of ``main_memory``; None where the system does not tell."""
    return main_memory().nbytes


def _minimum(found: list[Headroom]) -> Headroom | None:
    known = [(h.nbytes, -i) for i, h in enumerate(found) if h.nbytes is not None]
    if not known:
        return None
    nbytes, index = min(known, key=lambda pair: (pair[0], -pair[1]))
    return found[-index].with_nbytes(max(0, nbytes))


def _host_memory(root: Path) -> int | None:
    """``MemAvailable``, or what the system calls available elsewhere."""
    free = _kilobytes(root / "proc/meminfo", "MemAvailable")
    if free is not None:
        return free
    try:
        return psutil.virtual_memory().available
    except (OSError, RuntimeError, NotImplementedError):
        return None


def _kilobytes(path: Path, name: str) -> int | None:
    """Bytes of a line ``Name:  12 kB``."""
    value = _fields(path, ":").get(name, "").split()
    return int(value[0]) * 1024 if value and value[0].isdigit() else None


def _fields(path: Path, separator: str | None) -> dict[str, str]:
    """Lines of two parts; none where the file cannot be read."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return {}
    parts = (line.split(separator, 1) for line in lines)
    return {part[0].strip(): part[1].strip() for part in parts if len(part) == 2}


@dataclass(frozen=True)
class _Version:
    """The files of one version of control groups.

    Attributes:
      limits: files of which each holds a limit in bytes.
      usage: the file of the bytes in use.
      cached: names in ``memory.stat`` of file pages that the kernel can drop.
      stat_limit: a name in ``memory.stat`` of the minimum limit of all groups above, too.
    """

    limits: tuple[str, ...]
    usage: str
    cached: tuple[str, ...]
    stat_limit: str = ""


_V1 = _Version(
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
    "hierarchical_memory_limit",
)
_V2 = _Version(("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file"))


def _group_headrooms(root: Path) -> Iterator[Headroom]:
    """One for each limit of the control groups from this process' own up to the topmost that is seen."""
    for version, top, folder in _groups(root):
        while True:
            name = "/" if folder == top else f"/{folder.relative_to(top)}"
            yield from _group_headroom(version, folder, name)
            if folder == top:
                break
            folder = folder.parent


def _group_headroom(version: _Version, folder: Path, name: str) -> Iterator[Headroom]:
    stat = _fields(folder / "memory.stat", None)
    limits = {file: _number(_text(folder / file)) for file in version.limits}
    limits[version.stat_limit] = _number(stat.get(version.stat_limit, ""))
    usage = _number(_text(folder / version.usage))
    for file, limit in limits.items():
        if limit is not None and limit < UNLIMITED:
            cached = sum(_number(stat.get(key, "")) or 0 for key in version.cached)
            free = limit - max(0, (usage or 0) - cached)
            yield Headroom(free, origin=f"control group {name} has {file} of {limit / 1e9:.2f} GB")


def _groups(root: Path) -> Iterator[tuple[_Version, Path, Path]]:
    """Of each version: the topmost folder that is seen here, and this process' own."""
    mounts = _mounts(root)
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if number == "0" and not controllers:
            version, key, guess = _V2, "cgroup2", "sys/fs/cgroup"
        elif "memory" in controllers.split(","):
            version, key, guess = _V1, "memory", "sys/fs/cgroup/memory"
        else:
            continue
        mount_root, top = mounts.get(key, ("/", root / guess))
        yield version, top, _own_folder(top, mount_root, path)


def _own_folder(top: Path, mount_root: str, path: str) -> Path:
    """The folder of the group ``path``, of which a mount shows what lies under ``mount_root``."""
    inside = path.removeprefix(mount_root.rstrip("/")) if path.startswith(mount_root) else ""
    parts = [part for part in inside.split("/") if part]
    folder = top.joinpath(*parts)
    return folder if ".." not in parts and folder.is_dir() else top


def _mounts(root: Path) -> dict[str, tuple[str, Path]]:
    """By "cgroup2", or "memory" of version 1: the root of the mount and the folder where it is."""
    found: dict[str, tuple[str, Path]] = {}
    for line in _text(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, kinds = before.split(), after.split()
        if len(fields) < 5 or len(kinds) < 3:
            continue
        group = fields[3], root / fields[4].lstrip("/")
        if kinds[0] == "cgroup2":
            found.setdefault("cgroup2", group)
        elif kinds[0] == "cgroup" and "memory" in kinds[2].split(","):
            found.setdefault("memory", group)
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _number(text: str) -> int | None:
    """A count of bytes; None for "max", an empty or an unreadable file."""
    text = text.strip()
    return int(text) if text.isdecimal() else None


_COUNTED = {"RLIMIT_AS": "VmSize", "RLIMIT_DATA": "VmData"}
"""What each limit counts, as ``/proc/self/status`` names it."""

_SHELL = {"RLIMIT_AS": "ulimit -v", "RLIMIT_DATA": "ulimit -d"}


def _limit_headrooms(root: Path, limits: Mapping[str, int] | None) -> dict[str, Headroom]:
    found: dict[str, Headroom] = {}
    for name, limit in (_system_limits() if limits is None else limits).items():
        used = _kilobytes(root / "proc/self/status", _COUNTED[name]) or 0
        origin = f"{name} ({_SHELL[name]}) is {limit / 1e9:.2f} GB"
        found[name] = Headroom(limit - used, origin=origin)
    return found


def _system_limits() -> dict[str, int]:
    """The limits of this process that are set; none on systems without them."""
    try:
        import resource
    except ImportError:
        return {}
    found: dict[str, int] = {}
    for name in _COUNTED:
        soft = resource.getrlimit(getattr(resource, name))[0] if hasattr(resource, name) else -1
        if 0 <= soft < UNLIMITED:
            found[name] = soft
    return found
