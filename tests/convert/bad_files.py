"""Every class of bad (and odd but sound) GGUF file that the reader has a verdict on.

The upstream classes carry the names of llama.cpp's ``tests/test-gguf.cpp``; the
extra ones (``X_``) come from the parser bugs of the GGUF readers of the field.
Each case says the error code that it must end in, or None where it must open.
Upstream tells "with data" (``DATA_``) from "header alone" (``TENSORS_``) runs
of the same file; this reader always holds a file against its size, so here the
sound ``TENSORS_`` files carry their data too.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass

from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.testing.gguf_builder import (
    ARRAY,
    BOOL,
    F32,
    I32,
    STRING,
    U8,
    U32,
    GGUFBuilder,
    Tensor,
    Typed,
    array,
    entry,
    text,
)

I8_TENSOR, I64_TENSOR = 24, 27
U64_MAX = 2**64 - 1


@dataclass(frozen=True)
class Case:
    """One class: how to make it, the code it ends in (None: it opens), and its limit of memory."""

    make: Callable[[], bytes]
    code: str | None
    mebibytes: float = 64.0


def _header(**fields: object) -> Callable[[], bytes]:
    return lambda: GGUFBuilder(metadata={"a": 1}, **fields).build()


def _raw(*entries: bytes, n_kv: int | None = None) -> Callable[[], bytes]:
    return lambda: GGUFBuilder(raw_metadata=list(entries), n_kv=n_kv).build()


def _kv(key: str, value: object) -> Callable[[], bytes]:
    return lambda: GGUFBuilder(metadata={key: value}).build()


def _tensors(*tensors: Tensor, **fields: object) -> Callable[[], bytes]:
    return lambda: GGUFBuilder(tensors=list(tensors), **fields).build()


def _aligned(value: object, layout: int) -> Callable[[], bytes]:
    tensors = [Tensor("a", (3,)), Tensor("b", (5,))]
    return lambda: GGUFBuilder({"general.alignment": value}, tensors, alignment=layout).build()


def _two_tensors() -> list[Tensor]:
    return [Tensor("a", (3, 2), data=bytes(range(24))), Tensor("b", (5,))]


def _cut(builder: GGUFBuilder, count: int) -> bytes:
    return builder.build()[:-count]


def _one(payload_type: int, payload: bytes) -> Callable[[], bytes]:
    return _raw(entry("k", payload_type, payload))


_READ = "tokenizer.ggml.model"
"""A key whose text matters; where nothing reads a key, text in another encoding is a warning."""


def _ones(dims: tuple[int, ...], type: int, **fields: object) -> Tensor:
    """A tensor whose declared dims are not those of the 32 bytes that it brings."""
    return Tensor("a", dims=dims, type=type, data=bytes(32), **fields)


ALL_VALUES = {
    "bool": True,
    "u32": 7,
    "f32": 0.5,
    "text": "värde",
    "i32s": Typed(I32, [-1, 2]),
    "texts": ["a", "", "ü"],
    "none": Typed(STRING, []),
}

UPSTREAM: dict[str, Case] = {
    "HEADER_BAD_MAGIC": Case(_header(magic=b"FUGG"), "E_MAGIC"),
    "HEADER_BAD_VERSION_0": Case(_header(version=0), "E_VERSION"),
    "HEADER_BAD_VERSION_1": Case(_header(version=1), "E_VERSION"),
    "HEADER_BAD_VERSION_FUTURE": Case(_header(version=4), "E_VERSION"),
    "HEADER_BAD_N_KV": Case(_header(n_kv=U64_MAX), "E_METADATA"),
    "HEADER_BAD_N_TENSORS": Case(_header(n_tensors=U64_MAX), "E_TENSOR"),
    "HEADER_EMPTY": Case(lambda: GGUFBuilder().build(), None),
    "KV_BAD_KEY_SIZE": Case(_raw(entry("k", U8, b"\0", key_length=U64_MAX)), "E_METADATA"),
    "KV_EMPTY_KEY": Case(_raw(entry("", U32, bytes(4))), "E_METADATA"),
    "KV_BAD_TYPE": Case(_one(13, bytes(8)), "E_METADATA"),
    "KV_DUPLICATE_KEY": Case(_raw(entry("k", U8, b"\0"), entry("k", U8, b"\1")), "E_METADATA"),
    "KV_BAD_ALIGN": Case(_kv("general.alignment", 13), "E_METADATA"),
    "KV_WRONG_TYPE_ALIGN": Case(_kv("general.alignment", Typed(I32, 32)), "E_METADATA"),
    "KV_SUCCESS": Case(lambda: GGUFBuilder(ALL_VALUES).build(), None),
    "TENSORS_BAD_NAME_SIZE": Case(_tensors(Tensor("n" * 64)), "E_TENSOR"),
    "TENSORS_BAD_N_DIMS": Case(_tensors(Tensor("a", (1, 1, 1, 1, 1))), "E_TENSOR"),
    "TENSORS_BAD_SHAPE": Case(_tensors(_ones((-1,), GGMLType.F32)), "E_TENSOR"),
    "TENSORS_ZERO_DIM": Case(_tensors(Tensor("a", (0, 3)), Tensor("b", (4,))), None),
    "TENSORS_NE_TOO_BIG": Case(
        _tensors(_ones((2 * (2**31 - 1),) * 2 + (2, 2), GGMLType.F32)), "E_SHORT_READ"
    ),
    "TENSORS_NBYTES_TOO_BIG": Case(_tensors(_ones((2**30, 2**30 + 1, 2), I64_TENSOR)), "E_SHORT_READ"),
    "TENSORS_NBYTES_PAD_WRAP": Case(
        _tensors(_ones((4, 2**30 - 1, 2**30 + 1), GGMLType.F32), Tensor("b")), "E_SHORT_READ"
    ),
    "TENSORS_BAD_TYPE": Case(_tensors(_ones((8,), 77)), "E_QTYPE"),
    "TENSORS_BAD_OFFSET": Case(_tensors(Tensor("a", offset=U64_MAX)), "E_TENSOR"),
    "TENSORS_DUPLICATE_NAME": Case(_tensors(Tensor("a"), Tensor("a")), "E_TENSOR"),
    "TENSORS_BAD_ALIGN": Case(_aligned(13, 13), "E_METADATA"),
    "TENSORS_INCONSISTENT_ALIGN": Case(_aligned(32, 1), "E_TENSOR"),
    "TENSORS_SUCCESS": Case(lambda: GGUFBuilder(ALL_VALUES, _two_tensors()).build(), None),
    "TENSORS_CUSTOM_ALIGN": Case(_aligned(1, 1), None),
    "DATA_NOT_ENOUGH_DATA": Case(lambda: _cut(GGUFBuilder(tensors=_two_tensors()), 1), "E_SHORT_READ"),
    "DATA_BAD_ALIGN": Case(_aligned(13, 13), "E_METADATA"),
    "DATA_INCONSISTENT_ALIGN": Case(_aligned(32, 1), "E_TENSOR"),
    "DATA_MEM_SIZE_OVERFLOW": Case(
        _tensors(
            Tensor("a", dims=(2**40 - 64, 2**23), type=I8_TENSOR, data=bytes(32)),
            Tensor("b", dims=(2**40 - 64, 2**23), type=I8_TENSOR, data=b"", offset=2**63 - 2**29),
        ),
        "E_SHORT_READ",
    ),
    "DATA_SUCCESS": Case(lambda: GGUFBuilder(ALL_VALUES, _two_tensors()).build(), None),
    "DATA_CUSTOM_ALIGN": Case(_aligned(1, 1), None),
}


def _nested(depth: int) -> bytes:
    return array(ARRAY, 1) * depth + array(U8, 1, b"\0")


def _big_endian() -> bytes:
    return b"GGUF" + struct.pack(">IQQ", 3, 0, 1) + bytes(64)


EXTRA: dict[str, Case] = {
    "X_EMPTY_FILE": Case(lambda: b"", "E_SHORT_READ"),
    "X_THREE_BYTES": Case(lambda: b"GGU", "E_SHORT_READ"),
    "X_HEADER_CUT": Case(lambda: GGUFBuilder({"key": "a text"}).build()[:-3], "E_SHORT_READ"),
    "X_BIG_ENDIAN": Case(_big_endian, "E_MAGIC"),
    "X_N_KV_5E8": Case(_header(n_kv=500_000_000), "E_METADATA"),
    "X_N_TENSORS_5E8": Case(_header(n_tensors=500_000_000), "E_TENSOR"),
    "X_ARR_LEN_U8_2_63": Case(_one(ARRAY, array(U8, 2**63)), "E_METADATA"),
    "X_ARR_LEN_U8_2_30": Case(_one(ARRAY, array(U8, 2**30)), "E_METADATA"),
    "X_ARR_LEN_STR_2_30": Case(_one(ARRAY, array(STRING, 2**30)), "E_METADATA"),
    "X_STR_LEN_2_30": Case(_one(STRING, text("a", length=2**30)), "E_METADATA"),
    "X_STR_LEN_2_63": Case(_one(STRING, text("a", length=2**63)), "E_METADATA"),
    "X_NESTED_ARRAY": Case(_one(ARRAY, _nested(1)), "E_METADATA"),
    "X_NESTED_ARRAY_20000": Case(_one(ARRAY, _nested(20_000)), "E_METADATA"),
    "X_ALIGN_0": Case(_kv("general.alignment", 0), "E_METADATA"),
    "X_ALIGN_2_31": Case(_kv("general.alignment", 2**31), "E_METADATA"),
    "X_N_DIMS_1E6": Case(_tensors(Tensor("a", n_dims=1_000_000)), "E_TENSOR"),
    "X_N_DIMS_0": Case(_tensors(Tensor("a", n_dims=0)), "E_TENSOR"),
    "X_DIMS_PRODUCT_WRAPS_TO_4": Case(
        _tensors(_ones((2**33 + 2**1, 2**33 + 2**1, 1), I8_TENSOR)), "E_SHORT_READ"
    ),
    "X_DIM_2_42_PLUS_1": Case(_tensors(_ones((2**42 + 1,), I8_TENSOR)), "E_TENSOR"),
    "X_TYPE_MINUS_1": Case(_tensors(_ones((8,), -1)), "E_QTYPE"),
    "X_TYPE_REMOVED_4": Case(_tensors(_ones((32,), 4)), "E_QTYPE"),
    "X_Q4_K_ROW_255": Case(
        _tensors(Tensor("a", dims=(255, 4), type=GGMLType.Q4_K, data=bytes(576))), "E_TENSOR"
    ),
    "X_OFFSET_OVERLAP": Case(_tensors(Tensor("a", (16,)), Tensor("b", (16,), offset=32)), "E_TENSOR"),
    "X_OFFSET_PAST_EOF": Case(_tensors(Tensor("a", (16,)), Tensor("b", (16,), offset=2**20)), "E_TENSOR"),
    "X_DATA_MISSING": Case(_tensors(Tensor("a", (16,)), with_data=False), "E_SHORT_READ"),
    "X_DATA_CUT_IN_LAST_TENSOR": Case(
        lambda: _cut(GGUFBuilder(tensors=[Tensor("a", (16,)), Tensor("b", (16,))]), 20), "E_SHORT_READ"
    ),
    "X_EMPTY_TENSOR_NAME": Case(_tensors(Tensor("")), "E_TENSOR"),
    "X_KEY_NOT_UTF8": Case(_raw(entry(b"\xff\xfe", U8, b"\0")), "E_METADATA"),
    "X_NAME_PATH_AND_NUL": Case(_tensors(Tensor("../../etc/passwd\0")), "E_TENSOR"),
    "X_BOOL_2": Case(_one(BOOL, b"\2"), "E_METADATA"),
    "X_2M_EMPTY_STRINGS": Case(_one(ARRAY, array(STRING, 2_000_000, bytes(16_000_000))), None, 256.0),
    "X_2M_U8": Case(_one(ARRAY, array(U8, 2_000_000, bytes(2_000_000))), None, 16.0),
}

# What the two lists above leave out of the reader's own rules.
OWN: dict[str, Case] = {
    "O_ALIGN_ARRAY": Case(_kv("general.alignment", [32]), "E_METADATA"),
    "O_ALIGN_STRING": Case(_kv("general.alignment", "32"), "E_METADATA"),
    "O_ALIGN_65536": Case(_aligned(65_536, 65_536), None),
    "O_ALIGN_131072": Case(_kv("general.alignment", 131_072), "E_METADATA"),
    "O_VERSION_2": Case(_header(version=2), None),
    "O_NAME_63": Case(_tensors(Tensor("n" * 63)), None),
    "O_NAME_LENGTH_U64_MAX": Case(_tensors(Tensor("a", name_length=U64_MAX)), "E_TENSOR"),
    "O_NAME_NOT_UTF8": Case(_tensors(Tensor(b"\xc3(")), "E_TENSOR"),
    "O_NAME_NEWLINE": Case(_tensors(Tensor("a\nE_OK: fine")), "E_TENSOR"),
    "O_KEY_NUL": Case(_raw(entry("a\0b", U8, b"\0")), "E_METADATA"),
    "O_TEXT_NOT_UTF8": Case(_raw(entry(_READ, STRING, text(b"\xff"))), "E_METADATA"),
    "O_TEXTS_NOT_UTF8": Case(
        _raw(entry(_READ, ARRAY, array(STRING, 2, text("a") + text(b"\xf0\x90")))), "E_METADATA"
    ),
    "O_ARRAY_BAD_TYPE": Case(_one(ARRAY, array(13, 1, bytes(8))), "E_METADATA"),
    "O_BOOLS_3": Case(_one(ARRAY, array(BOOL, 3, b"\0\1\3")), "E_METADATA"),
    "O_N_KV_MORE_THAN_FIT": Case(_header(n_kv=60_000), "E_SHORT_READ"),
    "O_N_TENSORS_MORE_THAN_FIT": Case(_header(n_tensors=60_000), "E_SHORT_READ"),
    "O_ARRAY_MORE_THAN_FIT": Case(_one(ARRAY, array(F32, 2**24, bytes(64))), "E_SHORT_READ"),
    "O_STRINGS_MORE_THAN_FIT": Case(_one(ARRAY, array(STRING, 2**24, bytes(64))), "E_SHORT_READ"),
    "O_STRING_16_MIB_DECLARED": Case(_one(STRING, text("a", length=16 * 2**20)), "E_SHORT_READ"),
    "O_STRING_IN_ARRAY_TOO_LONG": Case(
        _one(ARRAY, array(STRING, 2, text("a") + text("b", length=2**40))), "E_METADATA"
    ),
    "O_TAIL_PADDING_MISSING": Case(_tensors(Tensor("a"), tail_padding=False), "E_SHORT_READ"),
    "O_TRAILING_BYTES": Case(lambda: GGUFBuilder(tensors=[Tensor("a")]).build() + b"more", None),
    "O_NO_TENSORS_NO_PADDING": Case(_kv("a", "b"), None),
}

ALL: dict[str, Case] = UPSTREAM | EXTRA | OWN
