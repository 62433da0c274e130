"""Writes packed checkpoints (:mod:`qwen3_moe_jax.convert.checkpoint_source` says what is in one).

Orbax writes the arrays, uncompressed: packed weights do not compress. One orbax
checkpoint a layer, so that no more than two layers are ever in memory: one is
hashed while orbax writes it, the next is being read. What orbax leaves undone is
done here: the manifest, syncing every file and folder, and a rename that a crash
cannot tear.
"""

import json
import logging
import os
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from qwen3_moe_jax.convert.checkpoint_source import array_files, item_and_key
from qwen3_moe_jax.convert.manifest import (
    CHECKSUM_NAME,
    MANIFEST_NAME,
    METADATA_NAME,
    TENSORS_NAME,
    FileRecord,
    Manifest,
    checksum_file,
    piece_digest,
    pieces,
)
from qwen3_moe_jax.convert.output_folder import output_folder
from qwen3_moe_jax.convert.packed import PackedTensor, packed_nbytes
from qwen3_moe_jax.convert.progress import ProgressCallback
from qwen3_moe_jax.convert.source import READ_THREADS, ModelSource

_SMALL_FILES_BYTES = 64 << 10
"""Room on the disk for the small files beside one tensor's arrays."""

_Save = Callable[[Path, Mapping[str, Any]], None]


def write_checkpoint(
    source: ModelSource, out: str | os.PathLike[str], *, progress: ProgressCallback | None = None
) -> int:
    """Writes the packed checkpoint of a model to a new folder.

    The folder appears when everything in it is on the disk, or not at all.

    Args:
      source: the model.
      out: the folder; must not exist, or be empty.
      progress: told the bytes of packed tensors that are written.

    Returns:
      Bytes of packed tensors.

    Raises:
      ModelFileError: the model is damaged.
      OutputError: the folder cannot be written.
    """
    with output_folder(out, checkpoint_nbytes(source)) as folder:
        files = _write_tensors(source, folder, progress)
        _write_file(folder / METADATA_NAME, _to_json(source.metadata))
        _write_manifest(source, folder, files | _small_files(folder, files))
    return _tensors_nbytes(source)


def checkpoint_nbytes(source: ModelSource) -> int:
    """Bytes that the checkpoint of a model takes on the disk, rather a little more than less."""
    return _tensors_nbytes(source) + len(_to_json(source.metadata)) + _SMALL_FILES_BYTES * len(source.specs)


def _tensors_nbytes(source: ModelSource) -> int:
    return sum(packed_nbytes(source.types[path], spec.shape) for path, spec in source.specs.items())


def _write_tensors(
    source: ModelSource, folder: Path, progress: ProgressCallback | None
) -> dict[str, FileRecord]:
    """Writes all arrays, item by item; returns the records of their files."""
    done, total = 0, _tensors_nbytes(source)
    files: dict[str, FileRecord] = {}
    os.mkdir(folder / TENSORS_NAME)
    # Orbax saves in a thread of the pool, which an interrupt waits for: a save that was torn out of its
    # event loop would go on writing while the folder is being removed.
    with _orbax() as save, ThreadPoolExecutor(READ_THREADS + 2) as pool:
        for item, tensors in _read_ahead(source, pool):
            hashing = _start_hashing(pool, tensors)
            pool.submit(save, folder / TENSORS_NAME / item, _tree(tensors)).result()
            for name, (nbytes, digests) in hashing.items():
                files[name] = FileRecord(nbytes, tuple(digest.result() for digest in digests))
            done += sum(tensor.nbytes for tensor in tensors.values())
            if progress:
                progress(done, total)
    _check_sizes(folder, files)
    return files


def _read_ahead(
    source: ModelSource, pool: ThreadPoolExecutor
) -> Iterator[tuple[str, dict[str, PackedTensor]]]:
    """Each item with its tensors; the next is read while the caller writes this one."""

    def read(paths: list[str]) -> dict[str, PackedTensor]:
        return {path: source.tensor(path) for path in paths}

    items = list(_items(source.paths()).items())
    upcoming = pool.submit(read, items[0][1])
    for i, (item, _) in enumerate(items):
        tensors = upcoming.result()
        if i + 1 < len(items):
            upcoming = pool.submit(read, items[i + 1][1])
        yield item, tensors


def _items(paths: list[str]) -> dict[str, list[str]]:
    """Parameter paths by the orbax checkpoint that holds them."""
    items: dict[str, list[str]] = {}
    for path in paths:
        items.setdefault(item_and_key(path)[0], []).append(path)
    return items


def _tree(tensors: Mapping[str, PackedTensor]) -> dict[str, Any]:
    """The arrays of one item as the nested dictionary that orbax saves."""
    tree: dict[str, Any] = {}
    for path, tensor in tensors.items():
        node = tree
        for part in filter(None, item_and_key(path)[1].split(".")):
            node = node.setdefault(part, {})
        node.update(tensor.arrays)
    return tree


@contextmanager
def _orbax() -> Generator[_Save]:
    """A function that saves a tree of NumPy arrays as one orbax checkpoint."""
    ocp: Any = import_module("orbax.checkpoint")  # it has no types
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=False, use_compression=False)
    with ocp.Checkpointer(handler) as checkpointer, _silenced("absl"):
        yield lambda folder, tree: checkpointer.save(folder, args=ocp.args.PyTreeSave(tree))


@contextmanager
def _silenced(logger_name: str) -> Generator[None]:
    """Orbax warns at every save of OCDBT, which it was told not to use, and logs what it raises as well."""
    logger = logging.getLogger(logger_name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _start_hashing(
    pool: ThreadPoolExecutor, tensors: Mapping[str, PackedTensor]
) -> dict[str, tuple[int, list[Future[str]]]]:
    """Size and digests to be of every array's file, whose bytes are those of the array."""
    hashing: dict[str, tuple[int, list[Future[str]]]] = {}
    for path, tensor in tensors.items():
        for array, name in array_files(path, tensor.type, tensor.shape).items():
            data = tensor.arrays[array].reshape(-1).view(np.uint8)
            hashing[name] = data.size, [pool.submit(piece_digest, data[p]) for p in pieces(data.size)]
    return hashing


def _check_sizes(folder: Path, files: Mapping[str, FileRecord]) -> None:
    """Holds what orbax wrote against what the reader relies on.

    Raises:
      RuntimeError: orbax lays arrays out in another way than the reader knows.
    """
    for name, record in files.items():
        found = os.lstat(folder / name).st_size
        if found != record.nbytes:
            raise RuntimeError(
                f"orbax wrote {found} bytes to {name}, not {record.nbytes}: install the version of orbax "
                "that pyproject.toml names"
            )


def _small_files(folder: Path, arrays: Mapping[str, FileRecord]) -> dict[str, FileRecord]:
    """Records of the files that hold no array."""
    records: dict[str, FileRecord] = {}
    for root, _, names in os.walk(folder):
        for path in (Path(root, name) for name in names):
            inside = path.relative_to(folder).as_posix()
            if inside not in arrays:
                data = memoryview(path.read_bytes())
                records[inside] = FileRecord(
                    len(data), tuple(piece_digest(data[p]) for p in pieces(len(data)))
                )
    return records


def _write_manifest(source: ModelSource, folder: Path, files: Mapping[str, FileRecord]) -> None:
    manifest = Manifest(
        source={"name": source.path.name, "identity": source.identity, "nbytes": source.nbytes},
        config=asdict(source.config),
        types={path: kind.name for path, kind in source.types.items()},
        files=dict(sorted(files.items())),
    ).to_json()
    _write_file(folder / MANIFEST_NAME, manifest)
    _write_file(folder / CHECKSUM_NAME, checksum_file(manifest))


def _to_json(metadata: Mapping[str, object]) -> bytes:
    return json.dumps(dict(metadata)).encode()


def _write_file(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
