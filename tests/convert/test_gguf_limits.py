"""The limits of the GGUF reader: memory, windows, sizes, and integers near their edges."""

import random
import struct
import sys
import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from qwen3_moe_jax.convert import gguf_cursor, gguf_header
from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.convert.gguf_file import GGUFFile
from qwen3_moe_jax.convert.tokenizer_metadata import BYTE_ALPHABET
from qwen3_moe_jax.testing.gguf_builder import (
    ARRAY,
    BOOL,
    F64,
    I32,
    STRING,
    U8,
    GGUFBuilder,
    Tensor,
    Typed,
    array,
    entry,
    text,
)
from tests.convert.gguf_files import refusal
from tests.convert.work import lines_of


def vocabulary(tokens: int) -> dict[str, object]:
    """Metadata of so many tokens, and nearly as many merges."""
    rng = random.Random(0)
    words = ["".join(rng.choices(BYTE_ALPHABET, k=rng.randrange(1, 14))) for _ in range(tokens)]
    merges = [f"{a} {b}" for a, b in pairwise(words[: tokens - 548])]
    metadata = {"tokenizer.ggml.tokens": words, "tokenizer.ggml.merges": merges}
    return metadata | {"tokenizer.ggml.token_type": Typed(I32, [1] * tokens)}


def test_a_string_of_a_header_takes_few_lines(write: Callable[..., Path]):
    """The header of 151,936 tokens takes 0.2 s so: at 30 lines per string it would take a second."""
    opened = {n: write(GGUFBuilder(vocabulary(n)), name=f"{n}.gguf") for n in (1000, 3000)}
    lines = {n: lines_of(lambda path=path: GGUFFile.open(path).close(), 10**6) for n, path in opened.items()}
    assert (lines[3000] - lines[1000]) / 4000 < 12


def test_header_of_the_real_size(write: Callable[..., Path]):
    """151,936 tokens and 151,387 merges, made here: in 64 MiB."""
    metadata = vocabulary(151_936)
    path = write(GGUFBuilder(metadata))
    with GGUFFile.open(path) as file:
        assert file.metadata["tokenizer.ggml.merges"] == metadata["tokenizer.ggml.merges"]
    del file
    tracemalloc.start()
    GGUFFile.open(path).close()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= 64 * 2**20


@pytest.mark.parametrize(
    "payload",
    [
        array(STRING, 60, text("é" * 20) * 60),
        array(I32, 200, bytes(800)),
        array(F64, 200, bytes(1600)),
        array(U8, 900, bytes(900)),
        array(BOOL, 900, bytes(900)),
    ],
)
def test_decoded_metadata_has_a_budget(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, payload: bytes
):
    path = write(GGUFBuilder(raw_metadata=[entry("k", ARRAY, payload)]))
    GGUFFile.open(path).close()
    monkeypatch.setattr(gguf_header, "MAX_METADATA_MEMORY", 4096)
    error = refusal(path)
    assert (error.code, error.name) == ("E_METADATA", "k")
    assert "for its metadata" in str(error)


def test_the_list_itself_counts_against_the_budget(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    count = 1000
    path = write(GGUFBuilder(raw_metadata=[entry("k", ARRAY, array(STRING, count, bytes(8 * count)))]))
    monkeypatch.setattr(gguf_header, "MAX_METADATA_MEMORY", count * sys.getsizeof("") + 1000)
    assert refusal(path).name == "k"


def test_keys_count_against_the_budget(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):
    path = write(GGUFBuilder({"k" * 1000 + str(i): True for i in range(8)}))
    monkeypatch.setattr(gguf_header, "MAX_METADATA_MEMORY", 4096)
    assert refusal(path).code == "E_METADATA"


def test_strings_longer_than_the_window(write: Callable[..., Path]):
    texts = ["a" * (gguf_cursor.WINDOW - 9), "é" * gguf_cursor.WINDOW, "", "b" * 3_000_000, "c"]
    with GGUFFile.open(write(GGUFBuilder({"texts": texts, "one": texts[3]}))) as file:
        assert file.metadata == {"texts": texts, "one": texts[3]}


def test_arrays_longer_than_the_window(write: Callable[..., Path]):
    values = list(range(100_000))
    with GGUFFile.open(write(GGUFBuilder({"a": values, "b": [i % 3 == 0 for i in values]}))) as file:
        assert file.metadata["a"] == values
        assert file.metadata["b"][:4] == [True, False, False, True]


def test_tail_padding_may_be_missing_on_request(write: Callable[..., Path]):
    builder = GGUFBuilder(tensors=[Tensor("a"), Tensor("b")], tail_padding=False)
    path = write(builder)
    assert refusal(path).code == "E_SHORT_READ"
    with GGUFFile.open(path, allow_missing_tail_padding=True) as file:
        assert file.read(file.tensors["b"]).tobytes() == bytes(16)
    path = write(builder.build()[:-1])
    assert refusal(path, allow_missing_tail_padding=True).code == "E_SHORT_READ"


def test_short_read_says_both_sizes(write: Callable[..., Path]):
    content = GGUFBuilder(tensors=[Tensor("a", (64,))]).build()
    error = refusal(write(content[:-10]))
    assert f"has {len(content) - 10} bytes" in str(error)
    assert f"ends at {len(content)}" in str(error)


@pytest.mark.parametrize(
    ("builder", "message"),
    [
        (GGUFBuilder(n_kv=60_000), "the list of 60000 metadata entries needs 840000 bytes and 0 of"),
        (GGUFBuilder(n_tensors=60_000), "the list of 60000 tensors needs 1980000 bytes and 8 of"),
        (GGUFBuilder(raw_metadata=[entry("k", ARRAY, array(ARRAY, 1))]), "'k' is an array of arrays"),
        (GGUFBuilder({"k": [1, 2]}, version=0), "has GGUF version 0; supported: 2 and 3"),
        (GGUFBuilder(raw_metadata=[entry("k", ARRAY, array(U8, 2**24 + 1))]), "at most 16777216 are allowed"),
    ],
)
def test_refusals_say_what_is_wrong(write: Callable[..., Path], builder: GGUFBuilder, message: str):
    assert message in str(refusal(write(builder)))


# Property: integers near the edges of 32 and 64 bits never wrap

EDGES = [
    e + d for e in (2**31, 2**32, 2**40, 2**62, 2**63, 2**64) for d in (-64, -1, 0, 1, 63) if e + d < 2**64
]


@pytest.mark.parametrize("type_id", [GGMLType.F32, GGMLType.Q4_K, 24, 27])
def test_edges_in_dims_and_offsets(write: Callable[..., Path], type_id: int):
    rng = random.Random(type_id)
    for _ in range(60):
        dims = tuple(rng.choice([*EDGES, 1, 2, 4]) for _ in range(rng.randrange(1, 4)))
        dims = (rng.choice(EDGES) // 256 * 256, *dims)
        offset = rng.choice([0, *EDGES])
        tensors = [
            Tensor("a", dims=dims, type=type_id, data=bytes(64), offset=offset),
            Tensor("b", offset=64),
        ]
        error = refusal(write(GGUFBuilder(tensors=tensors)))
        assert error.code in ("E_TENSOR", "E_SHORT_READ"), (dims, offset)


@pytest.mark.parametrize("value", EDGES)
@pytest.mark.parametrize("position", [8, 16, 24, 49])
def test_edges_in_counts_and_lengths(write: Callable[..., Path], value: int, position: int):
    """Tensor count, entry count, key length, array length."""
    content = bytearray(GGUFBuilder({"k": ["text"]}).build())
    struct.pack_into("<Q", content, position, value)
    assert refusal(write(bytes(content))).code in ("E_METADATA", "E_TENSOR", "E_SHORT_READ")
