"""A model's tensors out of a GGUF file."""

import hashlib
import os
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np

from qwen3_moe_jax.convert.config import Qwen3MoeConfig, check_architecture
from qwen3_moe_jax.convert.errors import ModelFileError
from qwen3_moe_jax.convert.fused import with_parts
from qwen3_moe_jax.convert.ggml_types import BLOCK_FORMATS
from qwen3_moe_jax.convert.gguf_file import GGUFFile, TensorInfo, explain_piece
from qwen3_moe_jax.convert.metadata_keys import check_expert_width
from qwen3_moe_jax.convert.packed import Box, PackedTensor
from qwen3_moe_jax.convert.progress import ProgressCallback
from qwen3_moe_jax.convert.regular_file import RegularFile
from qwen3_moe_jax.convert.source import (
    READ_PIECE_BYTES,
    READ_THREADS,
    BlockSource,
    refuse_nonfinite,
    row_runs,
    sha256_of_files,
)
from qwen3_moe_jax.convert.tensor_names import check_tensors, tensor_specs
from qwen3_moe_jax.convert.unpack import aligned_empty, block_arrays, empty_packed, unpack_blocks

_SAMPLE_BYTES = 4096
_SAMPLES = 64


class GGUFSource(BlockSource):
    """A model in a GGUF file."""

    def __init__(self, path: str | os.PathLike[str], *, check: bool = True, threads: int = READ_THREADS):
        self.path = Path(path)
        self.checks = check
        try:
            self._file = GGUFFile.open(self.path)
            self._read_header_of_open_file()
        except ModelFileError as error:
            explained = explain_piece(self.path, error)
            if explained is error:
                raise
            raise explained from error
        self._local = threading.local()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="read")

    def _read_header_of_open_file(self) -> None:
        try:
            self._read_header()
        except BaseException:
            self._file.close()
            raise

    def _read_header(self) -> None:
        found = self._file.tensors
        self.metadata = self._file.metadata
        self.warnings = self._file.warnings
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
        self._check_expert_width()
        check_tensors(self._file, self.config)
        self.specs = {spec.path: spec for spec in tensor_specs(self.config)}
        parts = with_parts(found, self.config)
        self._infos = {path: parts[spec.gguf_name] for path, spec in self.specs.items()}
        self.types = {path: info.type for path, info in self._infos.items()}
        self.nbytes = sum(info.nbytes for info in self._infos.values())
        self.identity, self._content = _identities(self._file.paths)

    def _check_expert_width(self) -> None:
        """``down`` of the first layer shows the width of experts in its columns, whether others are fused."""
        down = self._file.tensors.get("blk.0.ffn_down_exps.weight")
        if down is not None and len(down.shape) == 3:
            check_expert_width(self.metadata, self.config.moe_intermediate_size, down.shape[-1], down.name)

    @property
    def content(self) -> str:
        return self._content

    def tensor_nbytes(self, path: str) -> int:
        return self._infos[path].nbytes

    def read_blocks(self, path: str, start: int, buffer: np.ndarray) -> None:
        self._file.read_into(self._infos[path], start, buffer)

    def tensor(self, path: str) -> PackedTensor:
        info = self._infos[path]
        packed = empty_packed(info.type, info.shape)
        blocks = info.nbytes // BLOCK_FORMATS[info.type].nbytes
        self._fill_all(info, packed, [(0, 0, blocks)])
        return packed

    def part(self, path: str, box: Box) -> PackedTensor:
        """As ``ModelSource.part``; reads the rows of the box alone, each with all of its columns."""
        info = self._infos[path]
        *leading, _ = box
        if not leading:
            return self.tensor(path).part(box)
        shape = (*(stop - start for start, stop in leading), info.shape[-1])
        packed = empty_packed(info.type, shape)
        in_row = info.shape[-1] // BLOCK_FORMATS[info.type].weights
        runs = [(to * in_row, first * in_row, last * in_row) for to, first, last in row_runs(info.shape, box)]
        self._fill_all(info, packed, runs)
        whole = tuple((0, size) for size in shape[:-1])
        return packed.part((*whole, box[-1]))

    def _fill_all(self, info: TensorInfo, packed: PackedTensor, runs: list[tuple[int, int, int]]) -> None:
        """Reads runs of blocks side by side: (where they go, the first in the file, the one after it)."""
        arrays = block_arrays(packed)
        stride = max(1, READ_PIECE_BYTES // BLOCK_FORMATS[info.type].nbytes)
        pieces = [
            (target + start - first, start, min(start + stride, stop))
            for target, first, stop in runs
            for start in range(first, stop, stride)
        ]
        if len(pieces) == 1:
            self._fill(info, arrays, *pieces[0])
        else:
            list(self._pool.map(partial(self._fill, info, arrays), *zip(*pieces, strict=True)))

    def _fill(
        self, info: TensorInfo, arrays: Mapping[str, np.ndarray], target: int, start: int, stop: int
    ) -> None:
        """Reads the blocks ``[start, stop)`` of a tensor to ``target`` on, unpacks and checks them."""
        nbytes, count = BLOCK_FORMATS[info.type].nbytes, stop - start
        raw = self._buffer(count * nbytes)
        self._file.read_into(info, start * nbytes, raw)
        unpack_blocks(raw, info.type, arrays, target)
        if self.checks:
            end = target + count
            refuse_nonfinite(info.name, info.type, info.shape, arrays, target, end, start - target)

    def _buffer(self, nbytes: int) -> np.ndarray:
        """Memory that this thread reads into, kept from piece to piece."""
        buffer = getattr(self._local, "buffer", None)
        if buffer is None or len(buffer) < nbytes:
            buffer = self._local.buffer = aligned_empty((max(nbytes, READ_PIECE_BYTES),), np.uint8)
        return buffer[:nbytes]

    def sha256(self, progress: ProgressCallback | None = None) -> str:
        return sha256_of_files(self._file.paths, progress)

    def close(self) -> None:
        self._pool.shutdown()
        self._file.close()


def _identities(paths: list[Path]) -> tuple[str, str]:
    """Sizes, times of change and samples spread over the files: no two models share them in practice.

    The second is without the times: what copies of the same files share.
    """
    digest, content = hashlib.sha256(), hashlib.sha256()
    for path in paths:
        with closing(RegularFile(path)) as file:
            digest.update(f"{file.size} {os.stat(path).st_mtime_ns}\n".encode())
            content.update(f"{file.size}\n".encode())
            count = min(_SAMPLE_BYTES, file.size)
            for i in range(_SAMPLES):
                sample = file.read(count, (file.size - count) * i // (_SAMPLES - 1))
                digest.update(sample)
                content.update(sample)
    return digest.hexdigest()[:32], content.hexdigest()[:32]
