"""Where a model's tensors come from: a GGUF file or a packed checkpoint, behind one class.

``open_model(path)`` looks at what ``path`` is. Either source gives the same
packed arrays, bit for bit, one tensor at a time: no more of the model is in
memory than the caller keeps.
"""

import hashlib
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np

from qwen3_moe_jax.convert.config import Qwen3MoeConfig, check_architecture
from qwen3_moe_jax.convert.errors import ModelFileError, quote
from qwen3_moe_jax.convert.ggml_types import BLOCK_FORMATS, GGMLType
from qwen3_moe_jax.convert.gguf_file import GGUFFile, TensorInfo
from qwen3_moe_jax.convert.packed import PackedTensor
from qwen3_moe_jax.convert.progress import ProgressCallback
from qwen3_moe_jax.convert.regular_file import RegularFile
from qwen3_moe_jax.convert.tensor_names import TensorSpec, check_tensors, tensor_specs
from qwen3_moe_jax.convert.unpack import (
    aligned_empty,
    block_arrays,
    empty_packed,
    find_nonfinite_blocks,
    unpack_blocks,
)

READ_CHUNK_BYTES = 4 << 20
"""Read and unpacked at a time: the bytes are still in the processor's cache when they are unpacked."""

READ_THREADS = min(8, os.cpu_count() or 1)

_SAMPLE_BYTES = 4096
_SAMPLES = 64


class ModelSource(ABC):
    """The config, the metadata and the packed tensors of one model. A context manager.

    Attributes:
      path: what was opened.
      config: the checked hyper-parameters.
      metadata: the GGUF metadata, with the tokenizer's keys and the chat template.
      specs: the table of tensors, by parameter path, in the order of the forward pass.
      types: quantization type of each tensor, by parameter path.
      nbytes: bytes of tensor data in the source.
      identity: short text that changes when the content does; cheap to get.
    """

    path: Path
    config: Qwen3MoeConfig
    metadata: Mapping[str, object]
    specs: Mapping[str, TensorSpec]
    types: Mapping[str, GGMLType]
    nbytes: int
    identity: str

    def paths(self) -> list[str]:
        """Every parameter path, in the order of the forward pass."""
        return list(self.specs)

    @abstractmethod
    def tensor(self, path: str) -> PackedTensor:
        """Reads, checks and packs one tensor into new 64-byte aligned NumPy arrays.

        Raises:
          KeyError: no such parameter path.
          ModelFileError: the file is damaged; ``E_NONFINITE`` for a NaN or
            infinite scale or weight.
        """

    @abstractmethod
    def tensor_nbytes(self, path: str) -> int:
        """Bytes that one tensor takes in the source."""

    @abstractmethod
    def sha256(self, progress: ProgressCallback | None = None) -> str:
        """SHA-256 over the whole content, as hexadecimal digits. Reads everything."""

    @abstractmethod
    def close(self) -> None:
        """Closes files and threads; tensors already read stay valid."""

    def tensors(self, progress: ProgressCallback | None = None) -> Iterator[tuple[str, PackedTensor]]:
        """Every tensor with its path, in order; tells ``progress`` after each."""
        done = 0
        for path in self.paths():
            yield path, self.tensor(path)
            done += self.tensor_nbytes(path)
            if progress:
                progress(done, self.nbytes)

    def __enter__(self) -> "ModelSource":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def open_model(path: str | os.PathLike, *, check: bool = True, threads: int = READ_THREADS) -> ModelSource:
    """Opens a ``.gguf`` file (any shard of a split one) or a packed checkpoint folder.

    Args:
      path: file or folder.
      check: refuse NaN and infinite scales and weights; for a checkpoint also
        verify the SHA-256 of everything that is read.
      threads: read and unpack on this many.

    Raises:
      ModelFileError: the file or folder cannot be used; the message says why.
    """
    path = Path(path)
    if not path.is_dir():
        return GGUFSource(path, check=check, threads=threads)
    from qwen3_moe_jax.convert.checkpoint import CheckpointSource

    return CheckpointSource(path, check=check, threads=threads)


class GGUFSource(ModelSource):
    """A model in a GGUF file."""

    def __init__(self, path: str | os.PathLike, *, check: bool = True, threads: int = READ_THREADS):
        self.path = Path(path)
        self._check = check
        self._file = GGUFFile.open(self.path)
        try:
            self._read_header()
        except BaseException:
            self._file.close()
            raise
        self._local = threading.local()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="read")

    def _read_header(self) -> None:
        found = self._file.tensors
        self.metadata = self._file.metadata
        check_architecture(self.metadata)
        embedding = found.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise ModelFileError(
                "E_TENSOR", "token_embd.weight is missing or is no matrix", name="token_embd.weight"
            )
        self.config = Qwen3MoeConfig.from_metadata(
            self.metadata,
            tie_word_embeddings="output.weight" not in found,
            vocab_size=embedding.shape[0],
        )
        check_tensors(self._file, self.config)
        self.specs = {spec.path: spec for spec in tensor_specs(self.config)}
        self._infos = {path: found[spec.gguf_name] for path, spec in self.specs.items()}
        self.types = {path: info.type for path, info in self._infos.items()}
        self.nbytes = sum(info.nbytes for info in self._infos.values())
        self.identity = _identity(self._file.paths)

    def tensor_nbytes(self, path: str) -> int:
        return self._infos[path].nbytes

    def tensor(self, path: str) -> PackedTensor:
        info = self._infos[path]
        packed = empty_packed(info.type, info.shape)
        arrays = block_arrays(packed)
        block = BLOCK_FORMATS[info.type]
        blocks = info.nbytes // block.nbytes
        step = max(1, READ_CHUNK_BYTES // block.nbytes)

        def fill(start: int) -> None:
            self._fill(info, arrays, start, min(start + step, blocks))

        starts = range(0, blocks, step)
        if len(starts) == 1:
            fill(0)
        else:
            list(self._pool.map(fill, starts))
        return packed

    def _fill(self, info: TensorInfo, arrays: Mapping[str, np.ndarray], start: int, stop: int) -> None:
        """Reads the blocks ``[start, stop)`` of a tensor, unpacks and checks them."""
        nbytes = BLOCK_FORMATS[info.type].nbytes
        raw = self._buffer((stop - start) * nbytes)
        self._file.read_into(info, start * nbytes, raw)
        unpack_blocks(raw, info.type, arrays, start)
        if self._check:
            refuse_nonfinite(info.name, info.type, info.shape, arrays, start, stop)

    def _buffer(self, nbytes: int) -> np.ndarray:
        """Memory that this thread reads into, kept from chunk to chunk."""
        buffer = getattr(self._local, "buffer", None)
        if buffer is None or len(buffer) < nbytes:
            buffer = self._local.buffer = aligned_empty((max(nbytes, READ_CHUNK_BYTES),), np.uint8)
        return buffer[:nbytes]

    def sha256(self, progress: ProgressCallback | None = None) -> str:
        return sha256_of_files(self._file.paths, progress)

    def close(self) -> None:
        self._pool.shutdown()
        self._file.close()


def refuse_nonfinite(
    name: str,
    type: GGMLType,
    shape: tuple[int, ...],
    arrays: Mapping[str, np.ndarray],
    start: int,
    stop: int,
) -> None:
    """Refuses a NaN or infinite scale or weight in the blocks ``[start, stop)`` of a tensor.

    Raises:
      ModelFileError: ``E_NONFINITE``, naming the tensor, expert, row and superblock.
    """
    bad = find_nonfinite_blocks(type, arrays, start, stop)
    if bad is not None:
        raise ModelFileError(
            "E_NONFINITE",
            f"{quote(name)} ({type.name}): {bad.describe(type, shape)}; "
            "the model is damaged: download or quantize it again",
            name=name,
        )


def sha256_of_files(paths: list[Path], progress: ProgressCallback | None = None) -> str:
    """SHA-256 of the bytes of all files, one after the other.

    Raises:
      ModelFileError: ``E_OPEN`` or ``E_SHORT_READ`` if one cannot be read.
    """
    digest = hashlib.sha256()
    done = 0
    buffer = memoryview(bytearray(READ_CHUNK_BYTES))
    with ExitStack() as stack:
        files = [stack.enter_context(closing(RegularFile(path))) for path in paths]
        total = sum(file.size for file in files)
        for file in files:
            for offset in range(0, file.size, READ_CHUNK_BYTES):
                piece = buffer[: min(READ_CHUNK_BYTES, file.size - offset)]
                file.read_into(piece, offset)
                digest.update(piece)
                done += len(piece)
                if progress:
                    progress(done, total)
    return digest.hexdigest()


def _identity(paths: list[Path]) -> str:
    """Sizes, times of change and samples spread over the files: no two models share them in practice."""
    digest = hashlib.sha256()
    for path in paths:
        with closing(RegularFile(path)) as file:
            digest.update(f"{file.size} {os.stat(path).st_mtime_ns}\n".encode())
            count = min(_SAMPLE_BYTES, file.size)
            for i in range(_SAMPLES):
                digest.update(file.read(count, (file.size - count) * i // (_SAMPLES - 1)))
    return digest.hexdigest()[:32]
