"""What every source of a model's tensors is: one abstract class, and what sources share.

A GGUF file (``gguf_source``) and a packed checkpoint (``checkpoint_source``) give
the same packed arrays, bit for bit, one tensor at a time: no more of the model is
in memory than the caller keeps.
"""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import numpy as np

from qwen3_moe_jax.convert.config import Qwen3MoeConfig
from qwen3_moe_jax.convert.errors import ModelFileError, quote
from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.convert.packed import Box, PackedTensor
from qwen3_moe_jax.convert.progress import ProgressCallback
from qwen3_moe_jax.convert.regular_file import RegularFile
from qwen3_moe_jax.convert.tensor_names import TensorSpec
from qwen3_moe_jax.convert.unpack import Nonfinite, find_nonfinite_blocks

READ_PIECE_BYTES = 4 << 20
"""Read and unpacked at a time: the bytes are still in the processor's cache when they are unpacked."""

READ_THREADS = min(8, os.cpu_count() or 1)


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
      warnings: lines on what is wrong with a file and changes nothing.
      checks: whether NaN and infinity are looked for.
    """

    checks: bool = True

    path: Path
    config: Qwen3MoeConfig
    metadata: Mapping[str, object]
    specs: Mapping[str, TensorSpec]
    types: Mapping[str, GGMLType]
    nbytes: int
    identity: str
    warnings: tuple[str, ...] = ()

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

    def unchecked(self, path: str) -> PackedTensor:
        """As ``tensor`` for a caller that looks for NaN and infinity itself; a source may still do so."""
        return self.tensor(path)

    def part(self, path: str, box: Box) -> PackedTensor:
        """As ``tensor``, of what lies inside ``box``.

        Raises:
          ValueError: the columns cut a block.
        """
        return self.tensor(path).part(box)

    @property
    def content(self) -> str:
        """As ``identity``, and the same for a copy of the model elsewhere."""
        return self.identity

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


class BlockSource(ModelSource):
    """A source that can give a tensor's bytes as ggml's blocks."""

    @abstractmethod
    def read_blocks(self, path: str, start: int, buffer: np.ndarray) -> None:
        """Fills ``buffer`` (uint8) from byte ``start`` of a tensor on; several threads may call it at once.

        Raises:
          ModelFileError: ``E_SHORT_READ`` or ``E_CHANGED``.
        """


def nonfinite_error(name: str, type: GGMLType, shape: tuple[int, ...], bad: Nonfinite) -> ModelFileError:
    """``E_NONFINITE`` for a tensor, naming the expert, row and superblock."""
    return ModelFileError(
        "E_NONFINITE",
        f"{quote(name)} ({type.name}): {bad.describe(type, shape)}; "
        "the model is damaged: download or quantize it again",
        name=name,
    )


def refuse_nonfinite(
    name: str,
    type: GGMLType,
    shape: tuple[int, ...],
    arrays: Mapping[str, np.ndarray],
    start: int,
    stop: int,
    offset: int = 0,
) -> None:
    """Refuses a NaN or infinite scale or weight in the blocks ``[start, stop)`` of a tensor's arrays.

    Args:
      offset: blocks of the tensor before the arrays' first.

    Raises:
      ModelFileError: ``E_NONFINITE``, naming the tensor, expert, row and superblock.
    """
    bad = find_nonfinite_blocks(type, arrays, start, stop)
    if bad is not None:
        raise nonfinite_error(name, type, shape, replace(bad, block=bad.block + offset))


Run = tuple[int, int, int]
"""Rows that lie side by side: where they go, the first in the whole tensor, and the one after the last."""


def row_runs(shape: tuple[int, ...], box: Box) -> list[Run]:
    """The rows of a matrix [N, K], or of each expert's [E, N, K], that a box has.

    Args:
      shape: of the whole tensor.
      box: its part; its columns do not matter.
    """
    *experts, (first, last), _ = box
    height, count = shape[-2], last - first
    begin, end = experts[0] if experts else (0, 1)
    if count == height:
        return [(0, begin * height, end * height)]
    return [(i * count, m * height + first, m * height + last) for i, m in enumerate(range(begin, end))]


def sha256_of_files(paths: list[Path], progress: ProgressCallback | None = None) -> str:
    """SHA-256 of the bytes of all files, one after the other.

    Raises:
      ModelFileError: ``E_OPEN`` or ``E_SHORT_READ`` if one cannot be read.
    """
    digest = hashlib.sha256()
    done = 0
    buffer = memoryview(bytearray(READ_PIECE_BYTES))
    with ExitStack() as stack:
        files = [stack.enter_context(closing(RegularFile(path))) for path in paths]
        total = sum(file.size for file in files)
        for file in files:
            for offset in range(0, file.size, READ_PIECE_BYTES):
                piece = buffer[: min(READ_PIECE_BYTES, file.size - offset)]
                file.read_into(piece, offset)
                digest.update(piece)
                done += len(piece)
                if progress:
                    progress(done, total)
    return digest.hexdigest()
