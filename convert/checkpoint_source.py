"""The packed checkpoint: a model's packed tensors on disk, verified when read.

::

    out/
      manifest.json      format and layout version, config, types, every file's size and SHA-256
      manifest.sha256    SHA-256 of the manifest
      metadata.json      the GGUF metadata: tokenizer, chat template, everything
      tensors/           one orbax checkpoint a layer, and one each for embed_tokens, norm, lm_head
        layers.0/self_attn.q_proj.q/0.0 ...

:mod:`qwen3_moe_jax.convert.checkpoint_writer` writes it with orbax, and orbax can restore it.
The reader here does not go through orbax: an uncompressed Zarr chunk that holds
a whole array *is* the array's bytes, and a reader of its own can hash the very
bytes that it hands out, in parallel, into their final place, one tensor at a
time.

A checkpoint is trusted no more than a GGUF file. Names, shapes and sizes follow
from the checked config; files are opened without following links; sizes are
compared before memory is allocated; nothing is ever unpickled or evaluated.
"""

# Elements of untrusted lists and of NumPy functions have types that no declaration gives.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false, reportUnknownMemberType=false

import math
import os
import re
import stat
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwen3_moe_jax.convert.config import Qwen3MoeConfig
from qwen3_moe_jax.convert.errors import ModelFileError, printable, quote
from qwen3_moe_jax.convert.ggml_types import BLOCK_FORMATS, GGMLType
from qwen3_moe_jax.convert.manifest import (
    CHECKSUM_NAME,
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    MAX_METADATA_BYTES,
    METADATA_NAME,
    PIECE_BYTES,
    TENSORS_NAME,
    Manifest,
    checksum_file,
    damaged,
    parse_object,
    piece_digest,
    pieces,
)
from qwen3_moe_jax.convert.packed import Box, PackedTensor, array_nbytes, array_shapes, packed_nbytes
from qwen3_moe_jax.convert.progress import ProgressCallback
from qwen3_moe_jax.convert.regular_file import Descriptor
from qwen3_moe_jax.convert.source import (
    READ_PIECE_BYTES,
    READ_THREADS,
    ModelSource,
    Run,
    refuse_nonfinite,
    row_runs,
)
from qwen3_moe_jax.convert.tensor_names import TensorSpec, tensor_specs
from qwen3_moe_jax.convert.unpack import block_arrays, empty_packed

_MAX_SMALL_FILE = 16 << 20
_SMALL_FILE_PART = re.compile(r"\.zarray|[A-Za-z0-9_][A-Za-z0-9_.]*")


# Where things are


def item_and_key(path: str) -> tuple[str, str]:
    """The orbax checkpoint that holds a parameter path, and the rest of the path inside it."""
    parts = path.split(".")
    count = 2 if parts[0] == "layers" else 1
    return ".".join(parts[:count]), ".".join(parts[count:])


def array_files(path: str, type: GGMLType, shape: tuple[int, ...]) -> dict[str, str]:
    """Path inside the checkpoint of the file with each array's bytes: its only Zarr chunk."""
    item, key = item_and_key(path)
    prefix = f"{key}." if key else ""
    return {
        name: f"{TENSORS_NAME}/{item}/{prefix}{name}/{'.'.join('0' * len(array_shape))}"
        for name, array_shape in array_shapes(type, shape).items()
    }


# Reading


class CheckpointSource(ModelSource):
    """A model in a packed checkpoint; see :func:`qwen3_moe_jax.convert.source.open_model`."""

    def __init__(self, path: str | os.PathLike[str], *, check: bool = True, threads: int = READ_THREADS):
        self.path = Path(path)
        self.checks = check
        self._folder = _Folder(self.path)
        try:
            self._read_manifest()
        except BaseException:
            self._folder.close()
            raise
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="read")

    def _read_manifest(self) -> None:
        data = self._folder.read(MANIFEST_NAME, MAX_MANIFEST_BYTES)
        checksum = checksum_file(data)
        if self._folder.read(CHECKSUM_NAME, len(checksum)) != checksum:
            raise damaged(MANIFEST_NAME, f"does not match {CHECKSUM_NAME}")
        manifest = Manifest.from_json(data)
        self._files = manifest.files
        self.metadata = _checked_metadata(self._read_listed(METADATA_NAME, MAX_METADATA_BYTES))
        self.config = _checked_config(manifest, self.metadata)
        self.specs = {spec.path: spec for spec in tensor_specs(self.config)}
        self.types = _checked_types(manifest, self.specs)
        self.nbytes = sum(self.tensor_nbytes(path) for path in self.specs)
        self.identity = checksum[:32].decode()
        self._check_files()

    def _read_listed(self, name: str, limit: int) -> bytes:
        """A file of the manifest, whole, verified."""
        record = self._files.get(name)
        if record is None or record.nbytes > limit:
            raise damaged(MANIFEST_NAME, f"lists no {name}, or one too large")
        data = self._folder.read(name, record.nbytes)
        if len(data) != record.nbytes:
            raise damaged(name, f"has {len(data)} bytes, not {record.nbytes}")
        for index, piece in enumerate(pieces(len(data))):
            self._verify(name, index, memoryview(data)[piece])
        return data

    def _verify(self, name: str, index: int, piece: np.ndarray | memoryview) -> None:
        """Compares one piece of a file with its digest in the manifest."""
        if self.checks and piece_digest(piece) != self._files[name].sha256[index]:
            raise damaged(name, f"differs from its SHA-256 in the 16 MiB from byte {index * PIECE_BYTES}")

    def _check_files(self) -> None:
        """The manifest lists every array with the right size; the small files beside them are sound."""
        known = {METADATA_NAME}
        for path, spec in self.specs.items():
            sizes = array_nbytes(self.types[path], spec.shape)
            for array, name in array_files(path, self.types[path], spec.shape).items():
                record = self._files.get(name)
                if record is None or record.nbytes != sizes[array]:
                    raise damaged(MANIFEST_NAME, f"lists no {name} of {sizes[array]} bytes")
                known.add(name)
        for name in self._files.keys() - known:
            if not self._is_small_file(name):
                raise damaged(MANIFEST_NAME, f"lists a file that no checkpoint has: {quote(name)}")
            self._read_listed(name, _MAX_SMALL_FILE)

    def _is_small_file(self, name: str) -> bool:
        """Whether ``name`` can be one of orbax's own files, such as ``_METADATA`` or ``.zarray``."""
        top, *parts = name.split("/")
        return (
            top == TENSORS_NAME
            and 2 <= len(parts) <= 3
            and parts[0] in {item_and_key(path)[0] for path in self.specs}
            and all(_SMALL_FILE_PART.fullmatch(part) for part in parts)
        )

    def tensor_nbytes(self, path: str) -> int:
        return packed_nbytes(self.types[path], self.specs[path].shape)

    def tensor(self, path: str) -> PackedTensor:
        packed = self.unchecked(path)
        if self.checks:
            self._refuse_nonfinite(path, packed, [(0, 0, math.prod(packed.shape[:-1]))])
        return packed

    def unchecked(self, path: str) -> PackedTensor:
        shape = self.specs[path].shape
        return self._rows(path, shape, [(0, 0, math.prod(shape[:-1]))])

    def part(self, path: str, box: Box) -> PackedTensor:
        """As ``ModelSource.part``; reads the pieces alone in which rows of the box lie."""
        *leading, columns = box
        if not leading:
            return self.tensor(path).part(box)
        shape = (*(stop - start for start, stop in leading), self.specs[path].shape[-1])
        runs = row_runs(self.specs[path].shape, box)
        packed = self._rows(path, shape, runs)
        if self.checks:
            self._refuse_nonfinite(path, packed, runs)
        return packed.part((*((0, size) for size in shape[:-1]), columns))

    def _rows(self, path: str, wanted_shape: tuple[int, ...], runs: Sequence[Run]) -> PackedTensor:
        """Runs of a tensor's rows, as a tensor of this shape; each piece that they touch is verified."""
        kind, shape = self.types[path], self.specs[path].shape
        names, sizes = array_files(path, kind, shape), array_nbytes(kind, shape)
        rows = math.prod(shape[:-1])
        with ExitStack() as stack:
            opened = {array: self._folder.open(name, stack) for array, name in names.items()}
            for array, file in opened.items():
                if file.nbytes != sizes[array]:
                    raise damaged(file.name, f"has {file.nbytes} bytes, not {sizes[array]}")
            packed = empty_packed(kind, wanted_shape)
            work: list[tuple[_OpenFile, int, np.ndarray, list[tuple[int, int, int]]]] = []
            for array, file in opened.items():
                target = packed.arrays[array].reshape(-1).view(np.uint8)
                row = file.nbytes // rows
                wanted = _by_piece([(to * row, first * row, last * row) for to, first, last in runs])
                work += [(file, index, target, copies) for index, copies in wanted.items()]
            list(self._pool.map(self._read_piece, *zip(*work, strict=True)))
        return packed

    def _read_piece(
        self, file: "_OpenFile", index: int, target: np.ndarray, copies: Sequence[tuple[int, int, int]]
    ) -> None:
        """Reads and verifies a piece, and copies bytes of it; one that is wanted whole goes where it belongs.

        Args:
          file: where it is.
          index: its number.
          target: uint8 [bytes], the array.
          copies: (place in the array, first byte of the piece, the byte after the last).
        """
        begin = index * PIECE_BYTES
        nbytes = min(PIECE_BYTES, file.nbytes - begin)
        to, *span = copies[0]
        is_whole = span == [0, nbytes]
        piece = target[to : to + nbytes] if is_whole else np.empty(nbytes, np.uint8)
        file.read_into(piece, begin)
        self._verify(file.name, index, piece)
        if not is_whole:
            for to, first, last in copies:
                target[to : to + last - first] = piece[first:last]

    def _refuse_nonfinite(self, path: str, packed: PackedTensor, runs: Sequence[Run]) -> None:
        """Looks for NaN and infinity in runs of rows."""
        spec, arrays = self.specs[path], block_arrays(packed)
        block = BLOCK_FORMATS[packed.type]
        in_row = len(next(iter(arrays.values()))) // math.prod(packed.shape[:-1])
        stride = READ_PIECE_BYTES // block.nbytes

        def check(start: int, stop: int, before: int) -> None:
            refuse_nonfinite(spec.gguf_name, packed.type, spec.shape, arrays, start, stop, before)

        work = [
            (start, min(start + stride, (to + last - first) * in_row), (first - to) * in_row)
            for to, first, last in runs
            for start in range(to * in_row, (to + last - first) * in_row, stride)
        ]
        list(self._pool.map(check, *zip(*work, strict=True)))

    def sha256(self, progress: ProgressCallback | None = None) -> str:
        """SHA-256 of the manifest, after everything that it lists has been read and verified."""
        for _ in self.tensors(progress):
            pass
        return piece_digest(self._folder.read(MANIFEST_NAME, MAX_MANIFEST_BYTES))

    def close(self) -> None:
        self._pool.shutdown()
        self._folder.close()


def _by_piece(runs: Sequence[Run]) -> dict[int, list[tuple[int, int, int]]]:
    """By the pieces that runs of bytes touch: (place in the array, first byte of the piece, one after)."""
    found: dict[int, list[tuple[int, int, int]]] = {}
    for to, first, last in runs:
        for index in range(first // PIECE_BYTES, -(-last // PIECE_BYTES)):
            begin = index * PIECE_BYTES
            start, stop = max(first, begin), min(last, begin + PIECE_BYTES)
            found.setdefault(index, []).append((to + start - first, start - begin, stop - begin))
    return found


def _checked_metadata(data: bytes) -> dict[str, object]:
    metadata = parse_object(data, METADATA_NAME)
    for value in metadata.values():
        elements: list[Any] = value if isinstance(value, list) else [value]
        if not all(isinstance(element, str | int | float) for element in elements):
            raise damaged(METADATA_NAME, "has a value that is no text, number or list of these")
    return metadata


def _checked_config(manifest: Manifest, metadata: Mapping[str, object]) -> Qwen3MoeConfig:
    tied, vocab_size = (manifest.config.get(name) for name in ("tie_word_embeddings", "vocab_size"))
    if not isinstance(tied, bool) or not isinstance(vocab_size, int):
        raise damaged(MANIFEST_NAME, "has no vocab_size or tie_word_embeddings in its config")
    config = Qwen3MoeConfig.from_metadata(metadata, tie_word_embeddings=tied, vocab_size=vocab_size)
    if asdict(config) != manifest.config:
        raise damaged(MANIFEST_NAME, f"has a config that differs from {METADATA_NAME}")
    return config


def _checked_types(manifest: Manifest, specs: Mapping[str, TensorSpec]) -> dict[str, GGMLType]:
    if manifest.types.keys() != specs.keys():
        raise damaged(MANIFEST_NAME, "lists other tensors than a model of its config has")
    types: dict[str, GGMLType] = {}
    for path, spec in specs.items():
        name: Any = manifest.types[path]
        kind = GGMLType.__members__.get(name) if isinstance(name, str) else None
        if kind is None or kind not in spec.types or spec.shape[-1] % BLOCK_FORMATS[kind].weights:
            raise damaged(MANIFEST_NAME, f"has a type that {path} cannot have")
        types[path] = kind
    return types


# Files inside a folder that is not trusted


@dataclass(frozen=True)
class _OpenFile:
    """An open regular file."""

    name: str
    descriptor: int
    nbytes: int

    def read_into(self, buffer: np.ndarray | memoryview, offset: int) -> None:
        """Fills ``buffer`` (bytes) from byte ``offset``; the file ending before is ``E_SHORT_READ``."""
        view = memoryview(buffer)
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self.descriptor, [view[done:]], offset + done)
            except OSError as error:
                raise damaged(self.name, f"cannot be read: {error.strerror}") from error
            if not count:
                raise ModelFileError(
                    "E_SHORT_READ",
                    f"{self.name} ends before byte {offset + len(view)}; it was cut while it was read",
                    name=self.name,
                    offset=offset + done,
                )
            done += count


class _Folder:
    """A folder whose files are opened by relative names, never through a link."""

    def __init__(self, path: Path):
        self._path = path
        if os.open not in os.supports_dir_fd:
            raise ModelFileError(
                "E_CHECKPOINT",
                f"{printable(str(path), 300)}: packed checkpoints are read on Linux and macOS; "
                "name the .gguf file",
                name=str(path),
            )
        try:
            self._descriptor = Descriptor(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        except OSError as error:
            raise ModelFileError(
                "E_OPEN", f"{printable(str(path), 300)}: cannot be opened: {error.strerror}", name=str(path)
            ) from error

    def close(self) -> None:
        self._descriptor.close()

    def open(self, name: str, stack: ExitStack) -> _OpenFile:
        """Opens a regular file for as long as ``stack`` lives.

        Raises:
          ModelFileError: ``E_CHECKPOINT`` if it is missing, a link or no regular file.
        """
        *folders, last = name.split("/")
        descriptor = self._descriptor.number
        try:
            for part in folders:
                descriptor = _open_part(part, os.O_DIRECTORY, descriptor, stack)
            # Without O_NONBLOCK, opening a FIFO would wait for a writer.
            descriptor = _open_part(last, os.O_NONBLOCK, descriptor, stack)
        except OSError as error:
            if name == MANIFEST_NAME and isinstance(error, FileNotFoundError):
                raise self._no_checkpoint() from error
            raise damaged(name, f"cannot be opened (links are not followed): {error.strerror}") from error
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise damaged(name, "is not a regular file")
        return _OpenFile(name, descriptor, status.st_size)

    def read(self, name: str, limit: int) -> bytes:
        """A whole file of at most ``limit`` bytes."""
        with ExitStack() as stack:
            file = self.open(name, stack)
            if file.nbytes > limit:
                raise damaged(name, f"has {file.nbytes} bytes, more than {limit}")
            data = bytearray(file.nbytes)
            file.read_into(memoryview(data), 0)
        return bytes(data)

    def _no_checkpoint(self) -> ModelFileError:
        return ModelFileError(
            "E_CHECKPOINT",
            f"{printable(str(self._path), 300)}: is not a packed checkpoint (it has no {MANIFEST_NAME}); "
            "name a .gguf file or a folder that `qwen3-moe convert` made",
            name=str(self._path),
        )


def _open_part(part: str, flags: int, folder: int, stack: ExitStack) -> int:
    descriptor = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | flags, dir_fd=folder)
    stack.callback(os.close, descriptor)
    return descriptor
