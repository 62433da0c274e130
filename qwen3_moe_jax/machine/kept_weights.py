"""Weights of a CPU in a file of the cache folder, arranged as its kernels read them, and mapped.

What memory does not hold of a mapped file, the system reads from the disk when it is used; llama.cpp does so
with a GGUF file (``--mmap``). These kernels read another order of bytes, so a file of theirs is written once
for each model file, when its weights do not fit::

    weights/KEY/weights.bin      the arrays one after the other, each from a multiple of 4,096 bytes on
    weights/KEY/manifest.json    what they were made from, their dtypes and shapes, SHA-256 of pieces

KEY is made of the model file's identity, which changes with its bytes and its time of change. A file appears
whole, synced to the disk, or not at all (``convert.output_folder``). Each start compares it with its digests:
a damaged one is removed and written again. To remove one, delete its folder.
"""

import hashlib
import json
import logging
import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from qwen3_moe_jax.convert.output_folder import OutputError, output_folder, remove_tree
from qwen3_moe_jax.convert.source import ModelSource
from qwen3_moe_jax.core.errors import MemoryPlanError
from qwen3_moe_jax.machine.folders import CACHE_VARIABLE, cache_folder, writable_cache
from qwen3_moe_jax.machine.memory import MemoryPlan

FORMAT = 1
"""Of the files, their arrays' layout included: ``tests/model/test_mapped_weights.py`` holds both together."""

FOLDER, ARRAYS, MANIFEST = "weights", "weights.bin", "manifest.json"

MAX_MANIFEST_BYTES = 16 << 20

IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs")
"""File systems whose files are in memory."""

Row = tuple[str, tuple[int, ...], int]
"""An array: its dtype, its shape, and its first byte in the file."""

log = logging.getLogger("qwen3_moe_jax")


@dataclass(frozen=True)
class Manifest:
    """What a file holds.

    Attributes:
      source: path of the model file; it may be gone.
      identity: of the model file.
      nbytes: of the file.
      arrays: in the order of the parameters' leaves.
      sha256: digests of pieces (``convert.manifest.pieces``), hexadecimal.
      format: FORMAT when it was written.
    """

    source: str
    identity: str
    nbytes: int
    arrays: tuple[Row, ...]
    sha256: tuple[str, ...]
    format: int = FORMAT

    @classmethod
    def read(cls, folder: Path) -> "Manifest | None":
        """Of a file that was written; None where there is none, or one that cannot be used."""
        try:
            path = folder / MANIFEST
            if path.stat().st_size > MAX_MANIFEST_BYTES:
                return None
            fields: dict[str, Any] = json.loads(path.read_bytes())
            rows = tuple((str(d), tuple(map(int, shape)), int(at)) for d, shape, at in fields.pop("arrays"))
            digests = tuple(map(str, fields.pop("sha256")))
            found = cls(**fields, arrays=rows, sha256=digests)
            return found if os.path.getsize(folder / ARRAYS) == found.nbytes else None
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return None

    def write(self, folder: Path) -> None:
        """Beside the arrays."""
        (folder / MANIFEST).write_bytes(json.dumps(asdict(self)).encode())


def folder_of(source: ModelSource) -> Path | None:
    """Where the file of a model is, or will be; None without a cache folder."""
    folder = cache_folder()
    key = hashlib.sha256(f"{FORMAT} {source.identity}".encode()).hexdigest()[:32]
    return None if folder is None else folder / FOLDER / key


def all_kept() -> list[tuple[Path, Manifest | None]]:
    """Every folder of weights, and what it has; None for one that is damaged, or unfinished."""
    folder = cache_folder()
    try:
        found = sorted((folder / FOLDER).iterdir()) if folder is not None else []
    except OSError:
        return []
    return [(path, Manifest.read(path)) for path in found if path.is_dir()]


@contextmanager
def new_folder(source: ModelSource, plan: MemoryPlan, nbytes: int) -> Generator[Path]:
    """A folder to fill with a model's file; it becomes ``folder_of`` when the block ends well.

    Files that were made from the same path before, when it had other bytes, are removed then.

    Args:
      source: the model.
      plan: of the load, for messages.
      nbytes: that will be written.

    Raises:
      MemoryPlanError: the disk cannot have it; nothing is left behind.
    """
    folder = folder_of(source)
    if folder is None or writable_cache(FOLDER) is None:
        raise _no_file(plan, f"there is no cache folder that can be written ({CACHE_VARIABLE})")
    if (kind := _file_system(folder.parent)) in IN_MEMORY:
        raise _no_file(plan, f"{folder.parent} is in memory itself ({kind})")
    remove_tree(folder)  # one that cannot be used
    try:
        with output_folder(folder, nbytes) as temporary:
            log.warning(
                f"weights of {nbytes / 1e9:.2f} GB do not fit memory: they are written once, to {folder}, "
                "and mapped from there; delete that folder to remove them"
            )
            yield temporary
    except OutputError as error:
        if error.code == "E_BUSY":
            raise MemoryPlanError(str(error)) from error
        raise _no_file(plan, str(error)) from error
    for path, kept in all_kept():
        if kept is not None and kept.source == str(source.path.absolute()) and path != folder:
            remove_tree(path)


def _no_file(plan: MemoryPlan, reason: str) -> MemoryPlanError:
    return MemoryPlanError(
        f"weights of {plan.weights / 1e9:.2f} GB do not fit memory, and no file can be made to map them: "
        f"{reason}; {CACHE_VARIABLE} names a folder on another disk"
    )


def _file_system(folder: Path) -> str:
    """The kind of the file system that a folder is on; "" where that is not known."""
    try:
        mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    except (OSError, RuntimeError):
        return ""
    resolved = folder.resolve()
    return next((mounts[path] for path in (resolved, *resolved.parents) if path in mounts), "")
