"""The header of a GGUF file: metadata and tensor infos, from untrusted bytes.

Three rules make every input end in a result or in one ``ModelFileError``, in
time and memory bounded by the real size of the file:

* integers of the file are Python integers: no product or sum can wrap;
* a declared count or length is compared with the bytes that are left in the
  file, and with a fixed limit, before anything is allocated for it;
* what the metadata takes *once decoded* is counted against one budget, since
  short strings and numbers grow several times when they become Python objects.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2
and 3, which differ in nothing that concerns a little-endian file).
"""

import math
import struct
import sys
from dataclasses import dataclass
from typing import Any

from qwen3_moe_jax.convert.errors import ModelFileError, quote
from qwen3_moe_jax.convert.ggml_types import KNOWN_TYPES, SUPPORTED_TYPES, GGMLType
from qwen3_moe_jax.convert.gguf_cursor import Cursor
from qwen3_moe_jax.convert.metadata_keys import is_read
from qwen3_moe_jax.convert.regular_file import RegularFile

MAX_ENTRIES = 65_536
"""Most metadata entries, and most tensors."""
MAX_STRING = 16 * 2**20
MAX_ARRAY = 2**24
MAX_METADATA_MEMORY = 256 * 2**20
MAX_NAME = 63
"""Longest tensor name in bytes (``GGML_MAX_NAME`` - 1)."""
MAX_DIMS = 4
MAX_DIM = 2**40
MAX_ALIGNMENT = 65_536
DEFAULT_ALIGNMENT = 32

_MIN_ENTRY = 8 + 1 + 4 + 1  # key length, key, type, value
_MIN_TENSOR_INFO = 8 + 1 + 4 + 8 + 4 + 8  # name length, name, n_dims, one dim, type, offset
_NUMBERS_AT_ONCE = 8192

_BOOL, _STRING, _ARRAY = 7, 8, 9
# Value type: struct code, and the bytes that one list element of it may take in Python.
_NUMBERS: dict[int, tuple[str, int]] = {
    0: ("B", 8),
    1: ("b", 40),
    2: ("H", 40),
    3: ("h", 40),
    4: ("I", 40),
    5: ("i", 40),
    6: ("f", 32),
    _BOOL: ("B", 8),
    10: ("Q", 40),
    11: ("q", 40),
    12: ("d", 32),
}
_UINT32 = 4


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file.

    Attributes:
      name: its GGUF name.
      shape: C order, the reverse of ggml's ``ne``.
      type_id: ggml's id of its type, always a key of ``KNOWN_TYPES``.
      nbytes: bytes of its data.
      offset: where the data starts in its file, in bytes.
      shard: which of ``GGUFFile.paths`` holds it.
      run, gap: of a part of a fused tensor, bytes that lie together, and bytes of other parts before
        the next run; ``run`` is 0 where all bytes lie together.
    """

    name: str
    shape: tuple[int, ...]
    type_id: int
    nbytes: int
    offset: int
    shard: int
    run: int = 0
    gap: int = 0

    @property
    def type_name(self) -> str:
        """ggml's name of the type, also of one that this project cannot compute with."""
        return KNOWN_TYPES[self.type_id].name

    @property
    def is_supported(self) -> bool:
        return self.type_id in SUPPORTED_TYPES

    @property
    def type(self) -> GGMLType:
        """The type of the weights.

        Raises:
          ModelFileError: ``E_QTYPE`` for a type that ggml knows and this project does not support.
        """
        if not self.is_supported:
            supported = ", ".join(t.name for t in SUPPORTED_TYPES)
            raise ModelFileError(
                "E_QTYPE",
                f"tensor {quote(self.name)} has type {self.type_name}, not one of the supported: {supported}",
                name=self.name,
            )
        return GGMLType(self.type_id)


@dataclass(frozen=True)
class Header:
    """What stands before the tensor data; ``data_offset`` is where that starts."""

    version: int
    alignment: int
    metadata: dict[str, object]
    tensors: dict[str, TensorInfo]
    data_offset: int
    warnings: tuple[str, ...] = ()


def read_header(file: RegularFile, shard: int, *, allow_missing_tail_padding: bool = False) -> Header:
    """Parse and check the header of one file, also against the size of the file.

    Args:
      file: the open file.
      shard: recorded in every :class:`TensorInfo`.
      allow_missing_tail_padding: accept a file that lacks only the padding after its last tensor.

    Raises:
      ModelFileError: for anything that is not a sound, complete GGUF file.
    """
    return _HeaderParser(file, shard, allow_missing_tail_padding).parse()


class _HeaderParser:
    def __init__(self, file: RegularFile, shard: int, allow_missing_tail_padding: bool):
        self._file = file
        self._cursor = Cursor(file)
        self._shard = shard
        self._allow_missing_tail_padding = allow_missing_tail_padding
        self._memory = 0
        self._warnings: list[str] = []

    def parse(self) -> Header:
        version = self._magic_and_version()
        num_tensors = self._count("tensors", _MIN_TENSOR_INFO, "E_TENSOR")
        num_entries = self._count("metadata entries", _MIN_ENTRY, "E_METADATA")
        metadata = self._entries(num_entries)
        alignment: Any = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        raw_tensors = [self._tensor_info() for _ in range(num_tensors)]
        data_offset = _round_up(self._cursor.offset, alignment)
        tensors = self._located(raw_tensors, data_offset, alignment)
        return Header(version, alignment, metadata, tensors, data_offset, tuple(self._warnings))

    def _fail(
        self, code: str, problem: str, *, name: str | None = None, offset: int | None = None
    ) -> ModelFileError:
        return self._file.error(
            code, problem, name=name, offset=self._cursor.offset if offset is None else offset
        )

    def _magic_and_version(self) -> int:
        if self._file.size < 24:
            raise self._fail("E_SHORT_READ", f"has {self._file.size} bytes; a GGUF file has at least 24")
        magic = self._cursor.take(4, "the magic number")
        if magic != b"GGUF":
            raise self._fail("E_MAGIC", f"is not a GGUF file; it starts with {magic!r}", offset=0)
        version = self._cursor.number("I", "the version")
        if version in (2, 3):
            return version
        if version and version & 0xFFFF == 0:
            raise self._fail("E_MAGIC", "is a big-endian GGUF file; convert the model again", offset=4)
        raise self._fail("E_VERSION", f"has GGUF version {version}; supported: 2 and 3", offset=4)

    def _count(self, what: str, record_size: int, code: str) -> int:
        """A declared number of records, none of which can be smaller than ``record_size``."""
        count = self._cursor.number("Q", f"the number of {what}")
        if count > MAX_ENTRIES:
            raise self._fail(code, f"declares {count} {what}; at most {MAX_ENTRIES} are allowed")
        self._cursor.require(count * record_size, f"the list of {count} {what}")
        return count

    # Metadata

    def _entries(self, count: int) -> dict[str, object]:
        metadata: dict[str, object] = {}
        for _ in range(count):
            start = self._cursor.offset
            key = self._name("metadata key", "E_METADATA", 65_535)
            if key in metadata:
                raise self._fail("E_METADATA", f"has the key {quote(key)} twice", name=key, offset=start)
            type_id = self._cursor.number("I", f"the type of {quote(key)}")
            value = self._value(type_id, key)
            if key == "general.alignment":
                self._check_alignment(type_id, value, start)
            metadata[key] = value
        return metadata

    def _check_alignment(self, type_id: int, value: Any, start: int) -> None:
        if type_id != _UINT32 or not 1 <= value <= MAX_ALIGNMENT or value & (value - 1):
            raise self._fail(
                "E_METADATA",
                f"general.alignment must be a 32-bit unsigned power of two from 1 to {MAX_ALIGNMENT}",
                name="general.alignment",
                offset=start,
            )

    def _name(self, what: str, code: str, limit: int) -> str:
        """A key or tensor name: UTF-8, not empty, without control characters."""
        start = self._cursor.offset
        raw = self._cursor.take_strings(1, limit, f"the {what}", code)[0]
        try:
            name = raw.decode()
        except UnicodeDecodeError as error:
            raise self._fail(code, f"has a {what} that is not UTF-8: {raw[:80]!r}", offset=start) from error
        if not name:
            raise self._fail(code, f"has an empty {what}", offset=start)
        if any(c < " " or c == "\x7f" for c in name):
            raise self._fail(
                code, f"has a {what} with control characters: {quote(name)}", name=name, offset=start
            )
        self._spend(sys.getsizeof(name), name)
        return name

    def _value(self, type_id: int, key: str) -> object:
        if type_id == _STRING:
            return self._strings(1, key)[0]
        if type_id == _ARRAY:
            return self._array(key)
        if type_id not in _NUMBERS:
            raise self._fail("E_METADATA", f"{quote(key)} has unknown type {type_id}", name=key)
        return self._numbers(type_id, 1, key)[0]

    def _array(self, key: str) -> list[object]:
        what = f"the array {quote(key)}"
        type_id = self._cursor.number("I", what)
        count = self._cursor.number("Q", what)
        if type_id == _ARRAY:
            raise self._fail("E_METADATA", f"{quote(key)} is an array of arrays", name=key)
        if type_id != _STRING and type_id not in _NUMBERS:
            raise self._fail("E_METADATA", f"{quote(key)} is an array of unknown type {type_id}", name=key)
        if count > MAX_ARRAY:
            raise self._fail(
                "E_METADATA",
                f"{quote(key)} declares {count} values; at most {MAX_ARRAY} are allowed",
                name=key,
            )
        return self._strings(count, key) if type_id == _STRING else self._numbers(type_id, count, key)

    def _numbers(self, type_id: int, count: int, key: str) -> list[object]:
        code, python_size = _NUMBERS[type_id]
        width = struct.calcsize("<" + code)
        self._cursor.require(count * width, quote(key))
        self._spend(count * python_size, key)
        values: list[object] = [None] * count
        for start in range(0, count, _NUMBERS_AT_ONCE):
            some = min(_NUMBERS_AT_ONCE, count - start)
            raw = self._cursor.take(some * width, quote(key))
            values[start : start + some] = struct.unpack(f"<{some}{code}", raw)
        return self._booleans(values, key) if type_id == _BOOL else values

    def _booleans(self, values: list[object], key: str) -> list[object]:
        if any(v not in (0, 1) for v in values):
            raise self._fail("E_METADATA", f"{quote(key)} holds a boolean that is not 0 or 1", name=key)
        return [v == 1 for v in values]

    def _strings(self, count: int, key: str) -> list[object]:
        what = f"a text of {quote(key)}"
        self._cursor.require(8 * count, quote(key))
        self._spend(8 * count, key)
        values: list[object] = []
        while len(values) < count:
            raw = self._cursor.take_strings(count - len(values), MAX_STRING, what, "E_METADATA")
            texts = self._decoded(raw, key)
            self._spend(sum(map(sys.getsizeof, texts)), key)
            values += texts
        return values

    def _decoded(self, raw: list[bytes], key: str) -> list[str]:
        """Texts in UTF-8; where nothing reads the key others too, with a warning and U+FFFD in them."""
        try:
            return [one.decode() for one in raw]
        except UnicodeDecodeError as error:
            problem = f"{quote(key)} holds text that is not UTF-8: {error.object[:40]!r}"
            if is_read(key):
                raise self._fail("E_METADATA", problem, name=key) from error
            if not any(warning.startswith(quote(key)) for warning in self._warnings):
                self._warnings.append(f"{problem}; nothing reads it")
            return [one.decode(errors="replace") for one in raw]

    def _spend(self, nbytes: int, key: str) -> None:
        """Count ``nbytes`` of decoded metadata, before or right after they are allocated."""
        self._memory += nbytes
        if self._memory > MAX_METADATA_MEMORY:
            raise self._fail(
                "E_METADATA", f"needs over {MAX_METADATA_MEMORY >> 20} MiB for its metadata", name=key
            )

    # Tensors

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int, int]:
        """Name, dims in file order, type id, declared offset, where the info starts."""
        start = self._cursor.offset
        name = self._name("tensor name", "E_TENSOR", MAX_NAME)
        what = f"the info of tensor {quote(name)}"
        num_dims = self._cursor.number("I", what)
        if not 1 <= num_dims <= MAX_DIMS:
            raise self._fail(
                "E_TENSOR",
                f"tensor {quote(name)} has {num_dims} dimensions; 1 to {MAX_DIMS} are allowed",
                name=name,
                offset=start,
            )
        dims = struct.unpack(f"<{num_dims}Q", self._cursor.take(8 * num_dims, what))
        type_id = self._cursor.number("i", what)
        return name, dims, type_id, self._cursor.number("Q", what), start

    def _located(
        self, raw_tensors: list[tuple[str, tuple[int, ...], int, int, int]], data_offset: int, alignment: int
    ) -> dict[str, TensorInfo]:
        """Tensor infos with absolute offsets; data must lie end to end, in order, inside the file."""
        tensors: dict[str, TensorInfo] = {}
        expected = 0  # offset of the next tensor from the start of the data
        end = data_offset
        for name, dims, type_id, declared, start in raw_tensors:
            if name in tensors:
                raise self._fail("E_TENSOR", f"has tensor {quote(name)} twice", name=name, offset=start)
            nbytes = self._tensor_nbytes(name, dims, type_id, start)
            if declared != expected:
                raise self._fail(
                    "E_TENSOR",
                    f"tensor {quote(name)} is declared at data offset {declared}; it must be {expected}",
                    name=name,
                    offset=start,
                )
            end = data_offset + expected + nbytes
            if end > self._file.size:
                raise self._missing_data(name, end)
            tensors[name] = TensorInfo(name, dims[::-1], type_id, nbytes, data_offset + expected, self._shard)
            expected = _round_up(expected + nbytes, alignment)
        if tensors and not self._allow_missing_tail_padding and data_offset + expected > self._file.size:
            raise self._fail(
                "E_SHORT_READ",
                f"has {self._file.size} bytes and must have {data_offset + expected}: the padding after the "
                "last tensor is missing, so the file may be cut short; download it again",
                offset=end,
            )
        return tensors

    def _tensor_nbytes(self, name: str, dims: tuple[int, ...], type_id: int, start: int) -> int:
        if type_id not in KNOWN_TYPES:
            raise self._fail(
                "E_QTYPE", f"tensor {quote(name)} has unknown type {type_id}", name=name, offset=start
            )
        size = KNOWN_TYPES[type_id]
        if max(dims) > MAX_DIM:
            raise self._fail(
                "E_TENSOR",
                f"tensor {quote(name)} has a dimension of {max(dims)}; at most {MAX_DIM} is allowed",
                name=name,
                offset=start,
            )
        if dims[0] % size.weights:
            raise self._fail(
                "E_TENSOR",
                f"tensor {quote(name)} has rows of {dims[0]} weights; {size.name} needs a multiple "
                f"of {size.weights}",
                name=name,
                offset=start,
            )
        return math.prod(dims) // size.weights * size.nbytes

    def _missing_data(self, name: str, end: int) -> ModelFileError:
        return self._fail(
            "E_SHORT_READ",
            f"has {self._file.size} bytes, and tensor {quote(name)} ends at {end}: the file is cut short; "
            "download it again",
            name=name,
            offset=self._file.size,
        )


def _round_up(value: int, multiple: int) -> int:
    return (value + multiple - 1) // multiple * multiple
