"""Open a GGUF file, or all shards of a split one, and read tensor bytes from it.

The header is parsed and checked by :mod:`qwen3_moe_jax.convert.gguf_header`; this module
joins shards and hands out bytes. Nothing is mapped into memory and no weight
is read before it is asked for.

A split model is ``NAME-00001-of-0000N.gguf`` and its siblings; opening any one
of them opens all. The names of the siblings come from the path that the caller
gave, never from the contents of a file.
"""

import os
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from qwen3_moe_jax.convert.errors import ModelFileError, quote
from qwen3_moe_jax.convert.gguf_header import Header, TensorInfo, read_header
from qwen3_moe_jax.convert.regular_file import RegularFile

__all__ = ["GGUFFile", "TensorInfo"]

MAX_SHARDS = 512

_SHARD_NAME = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})\.gguf", re.DOTALL)
_CUT_NAME = re.compile(r".*[.-](?:part|split)[.-]?(?:[0-9]+(?:[.-]?of[.-]?[0-9]+)?|[a-z]{1,2})", re.DOTALL)
"""Names of what ``split -b`` and upload tools make of a file: ``m.gguf.part1of2``, ``m.gguf-split-a``."""


class GGUFFile:
    """An open GGUF file (all shards of it), checked as a whole. Use :meth:`open`.

    Attributes:
      metadata: key to value (bool, int, float, str, or a list of one of these);
        of a split file, those of its first shard.
      tensors: name to :class:`TensorInfo`, in file order.
      paths: the files, one a shard.
      version: GGUF version of the first file.
      nbytes: size of all files together.
      warnings: lines on what is wrong with a file and changes nothing.
    """

    def __init__(self, files: list[RegularFile], headers: list[Header]):
        self._files = files
        self.metadata = headers[0].metadata
        self.version = headers[0].version
        self.tensors: dict[str, TensorInfo] = {}
        for header in headers:
            self.tensors.update(header.tensors)
        self.paths = [file.path for file in files]
        self.nbytes = sum(file.size for file in files)
        self.warnings = tuple(dict.fromkeys(text for header in headers for text in header.warnings))

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, allow_missing_tail_padding: bool = False) -> "GGUFFile":
        """Open ``path`` and, if it is one shard of a split model, its siblings.

        Args:
          path: a ``.gguf`` file.
          allow_missing_tail_padding: accept files that lack only the padding
            after their last tensor. Refused by default: nothing tells such a
            file from a download that was cut.

        Raises:
          ModelFileError: for anything that is not a sound, complete GGUF file.
        """
        with ExitStack() as stack:

            def open_one(shard_path: Path, shard: int) -> tuple[RegularFile, Header]:
                file = RegularFile(shard_path)
                stack.callback(file.close)
                header = read_header(file, shard, allow_missing_tail_padding=allow_missing_tail_padding)
                file.check_unchanged()
                return file, header

            shards = [open_one(Path(path), 0)]
            siblings = _sibling_paths(*shards[0])
            if siblings:
                shards[0][0].close()
                shards = [_open_shard(open_one, siblings, i) for i in range(len(siblings))]
                _check_shards(shards)
            stack.pop_all()
        files, headers = zip(*shards, strict=True)
        return cls(list(files), list(headers))

    def __enter__(self) -> "GGUFFile":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        for file in self._files:
            file.close()

    def read_into(self, info: TensorInfo, start: int, buffer: Any) -> None:
        """Fill ``buffer`` with bytes ``[start, start + len)`` of a tensor's data.

        Args:
          info: one of ``self.tensors``.
          start: first byte, counted from the start of the tensor.
          buffer: a writable, contiguous buffer (NumPy array, bytearray).

        Raises:
          ModelFileError: ``E_SHORT_READ`` or ``E_CHANGED`` if the file was
            changed since it was opened.
          ValueError: the range is not within the tensor.
        """
        target = memoryview(buffer).cast("B")
        if start < 0 or start + len(target) > info.nbytes:
            raise ValueError(
                f"bytes {start} to {start + len(target)} are not within {info.name}, which has {info.nbytes}"
            )
        file = self._files[info.shard]
        run = info.run or max(info.nbytes, 1)
        done = 0
        while done < len(target):
            matrix, within = divmod(start + done, run)
            piece = target[done : done + run - within]
            file.read_into(piece, info.offset + matrix * (run + info.gap) + within)
            done += len(piece)
        file.check_unchanged()

    def read(self, info: TensorInfo) -> np.ndarray:
        """All bytes of a tensor: uint8 ``[nbytes]``. Errors as :meth:`read_into`."""
        data = np.empty(info.nbytes, np.uint8)
        if info.nbytes:
            self.read_into(info, 0, data)
        return data


def _sibling_paths(file: RegularFile, header: Header) -> list[Path]:
    """Paths of all shards of the split model that ``file`` belongs to; empty if it is not split."""
    if "split.count" not in header.metadata:
        return []
    count = _split_value(file, header, "split.count")
    if count < 2:
        return []
    if count > MAX_SHARDS:
        raise file.error("E_SPLIT", f"says it has {count} shards; at most {MAX_SHARDS} are allowed")
    number = _split_value(file, header, "split.no") + 1
    match = _SHARD_NAME.fullmatch(file.path.name)
    if not match or (int(match[2]), int(match[3])) != (number, count):
        raise file.error(
            "E_SPLIT", f"is shard {number} of {count}; its name must end in -{number:05}-of-{count:05}.gguf"
        )
    return [file.path.with_name(f"{match[1]}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]


def explain_piece(path: Path, error: ModelFileError) -> ModelFileError:
    """The error of a file that is no model by itself; what its name says of it comes first.

    A shard without ``split.*`` keys was made by another tool than llama-gguf-split, and lacks tensors.
    """
    shard, is_cut = _SHARD_NAME.fullmatch(path.name), _CUT_NAME.fullmatch(path.name)
    if error.code == "E_SPLIT" or not (is_cut or (shard and int(shard[3]) > 1)):
        return error
    if is_cut:
        what = "is by its name one piece of a file that was cut: join all pieces with `cat` first"
    elif shard and error.code in ("E_ARCH", "E_HPARAM", "E_TENSOR", "E_TOKENIZER"):
        what = f"is by its name shard {int(shard[2])} of {int(shard[3])}, and has no split keys"
    else:
        return error
    return ModelFileError("E_SPLIT", f"{path}: {what} ({error})", name=error.name, offset=error.offset)


def _split_value(file: RegularFile, header: Header, key: str) -> int:
    value = header.metadata.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise file.error("E_SPLIT", f"is a shard of a split model, but its {key} is missing or not a number")
    return value


def _open_shard(open_one: Any, paths: list[Path], index: int) -> tuple[RegularFile, Header]:
    try:
        return open_one(paths[index], index)
    except ModelFileError as error:
        if error.code != "E_OPEN":
            raise
        raise ModelFileError(
            "E_SPLIT", f"shard {index + 1} of {len(paths)} is needed: {error.message}", name=error.name
        ) from error


def _check_shards(shards: list[tuple[RegularFile, Header]]) -> None:
    """Numbers, counts and tensor names of all shards must fit together."""
    seen: set[str] = set()
    total = sum(len(header.tensors) for _, header in shards)
    for index, (file, header) in enumerate(shards):
        number = (_split_value(file, header, "split.no"), _split_value(file, header, "split.count"))
        if number != (index, len(shards)):
            raise file.error(
                "E_SPLIT",
                f"holds shard {number[0] + 1} of {number[1]}, not shard {index + 1} of {len(shards)}; "
                "files were renamed, mixed up or copied twice",
            )
        declared = _split_value(file, header, "split.tensors.count")
        if declared != total:
            raise file.error(
                "E_SPLIT",
                f"says that the shards hold {declared} tensors; they hold {total}; one was replaced",
            )
        twice = next((name for name in header.tensors if name in seen), None)
        if twice is not None:
            raise file.error("E_SPLIT", f"has tensor {quote(twice)}, as another shard does", name=twice)
        seen.update(header.tensors)
