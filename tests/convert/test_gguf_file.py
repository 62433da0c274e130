"""The reader on sound files: values, bytes, shards; and everything that can be wrong around a file."""

import os
import random
import struct
import sys
import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
import pytest

from qwen3_moe_jax.convert import gguf_header
from qwen3_moe_jax.convert.errors import ModelFileError
from qwen3_moe_jax.convert.ggml_types import BLOCK_FORMATS, KNOWN_TYPES, SUPPORTED_TYPES, GGMLType
from qwen3_moe_jax.convert.gguf_file import GGUFFile
from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.convert.tokenizer_metadata import BYTE_ALPHABET
from qwen3_moe_jax.testing.gguf_builder import (
    ARRAY,
    BOOL,
    F32,
    F64,
    I8,
    I16,
    I32,
    I64,
    STRING,
    U8,
    U16,
    U32,
    U64,
    GGUFBuilder,
    Tensor,
    Typed,
    array,
    entry,
    model_builder,
    text,
)
from tests.convert.work import lines_of

INTEGERS = {U8: (0, 2**8), I8: (-(2**7), 2**7), U16: (0, 2**16), I16: (-(2**15), 2**15), U32: (0, 2**32)}
INTEGERS |= {I32: (-(2**31), 2**31), U64: (0, 2**64), I64: (-(2**63), 2**63)}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(content: bytes | GGUFBuilder, name: str = "model.gguf") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.build())
        return path

    return write


def refusal(path: object, **options: bool) -> ModelFileError:
    with pytest.raises(ModelFileError) as caught:
        GGUFFile.open(path, **options)
    assert str(caught.value).isprintable()
    return caught.value


# Values and bytes


def random_value(rng: random.Random, kind: int) -> object:
    if kind == STRING:
        return "".join(rng.choices(["a", "é", "漢", "😀", " ", "\n"], k=rng.randrange(20)))
    if kind == BOOL:
        return rng.random() < 0.5
    if kind in (F32, F64):
        return rng.choice([0.0, -1.5, 2.0**-20, float("inf")])
    low, high = INTEGERS[kind]
    return rng.choice([low, high - 1, rng.randrange(low, high)])


def random_file(rng: random.Random, entries: int, tensors: int) -> tuple[GGUFBuilder, dict[str, object]]:
    builder, expected = GGUFBuilder(alignment=rng.choice([1, 8, 32, 4096])), {}
    for i in range(entries):
        kind = rng.randrange(13)
        key = f"key.{i}.{'é' * rng.randrange(3)}"
        if kind == ARRAY:
            kind = rng.choice([k for k in range(13) if k != ARRAY])
            values = [random_value(rng, kind) for _ in range(rng.randrange(40))]
            expected[key], builder.metadata[key] = values, Typed(kind, values)
        else:
            expected[key] = random_value(rng, kind)
            builder.metadata[key] = Typed(kind, expected[key])
    expected["general.alignment"] = builder.metadata["general.alignment"] = builder.alignment
    for i in range(tensors):
        type_id = rng.choice(sorted(KNOWN_TYPES))
        shape = tuple(rng.randrange(4) for _ in range(rng.randrange(4)))
        tensor = Tensor(f"tensor.{i}", (*shape, KNOWN_TYPES[type_id].weights * rng.randrange(3)), type_id)
        tensor.data = rng.randbytes(tensor.nbytes())
        builder.tensors.append(tensor)
    return builder, expected


@pytest.mark.parametrize("seed", range(4))
def test_random_file_comes_back(write: Callable[..., Path], seed: int):
    builder, expected = random_file(random.Random(seed), 256, 256)
    path = write(builder)
    with GGUFFile.open(path) as file:
        assert file.metadata == expected
        assert [type(v) for v in file.metadata.values()] == [type(v) for v in expected.values()]
        assert list(file.tensors) == [t.name for t in builder.tensors]
        for tensor in builder.tensors:
            info = file.tensors[tensor.name]
            assert (info.shape, info.type_id, info.nbytes) == (tensor.shape, tensor.type, tensor.nbytes())
            assert file.read(info).tobytes() == tensor.data
        assert file.nbytes == path.stat().st_size
        assert (file.version, file.paths) == (3, [path])


def test_agrees_with_the_gguf_package(tmp_path: Path):
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_block_count(3)
    writer.add_rope_freq_base(1e6)
    writer.add_token_list(["a", "é", "漢"])
    weights = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    writer.add_tensor("w", weights)
    writer.add_tensor(
        "q", np.arange(288, dtype=np.uint8).reshape(2, 144), raw_dtype=gguf.GGMLQuantizationType.Q4_K
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GGUFFile.open(path) as file:
        assert file.metadata["general.architecture"] == "qwen3moe"
        assert file.metadata["qwen3moe.block_count"] == 3
        assert file.metadata["tokenizer.ggml.tokens"] == ["a", "é", "漢"]
        assert file.tensors["w"].shape == (2, 3, 4)
        assert np.array_equal(file.read(file.tensors["w"]).view(np.float32).reshape(2, 3, 4), weights)
        assert (file.tensors["q"].shape, file.tensors["q"].type) == ((2, 256), GGMLType.Q4_K)


def test_sizes_of_all_types_agree_with_the_gguf_package():
    ours = {i: (t.weights, t.nbytes) for i, t in KNOWN_TYPES.items()}
    assert ours.pop(9) == (32, 36)  # Q8_1: the package still has the 40 bytes of an older struct
    theirs = {int(t): size for t, size in gguf.GGML_QUANT_SIZES.items() if t != 9}
    assert theirs.items() <= ours.items()
    assert {int(t): (f.weights, f.nbytes) for t, f in BLOCK_FORMATS.items()}.items() <= ours.items()


def test_read_into_parts(write: Callable[..., Path]):
    data = bytes(range(64))
    with GGUFFile.open(write(GGUFBuilder(tensors=[Tensor("a"), Tensor("b", (16,), data=data)]))) as file:
        info = file.tensors["b"]
        for start, count in [(0, 64), (0, 0), (64, 0), (1, 5), (60, 4)]:
            buffer = bytearray(count)
            file.read_into(info, start, buffer)
            assert bytes(buffer) == data[start : start + count]
        words = np.zeros(4, np.uint32)
        file.read_into(info, 8, words)
        assert words.tobytes() == data[8:24]
        for start, count in [(-1, 4), (61, 4), (65, 0)]:
            with pytest.raises(ValueError, match="not within"):
                file.read_into(info, start, bytearray(count))


def test_tensor_without_weights(write: Callable[..., Path]):
    with GGUFFile.open(write(GGUFBuilder(tensors=[Tensor("a", (0, 4)), Tensor("b", (4, 0))]))) as file:
        assert [file.read(t).shape for t in file.tensors.values()] == [(0,), (0,)]


@pytest.mark.parametrize("type_id", [*range(46), -1, 100, 2**31 - 1])
def test_every_type_id(write: Callable[..., Path], type_id: int):
    known = KNOWN_TYPES.get(type_id)
    row = known.weights if known else 256
    path = write(GGUFBuilder(tensors=[Tensor("some.weight", (2, row), type_id, data=bytes(1024))]))
    if known is None:
        error = refusal(path)
        assert (error.code, error.name) == ("E_QTYPE", "some.weight")
        assert f"unknown type {type_id}" in str(error)
        return
    with GGUFFile.open(path) as file:
        info = file.tensors["some.weight"]
    assert info.type_name == known.name
    if type_id in SUPPORTED_TYPES:
        assert info.type == type_id
        return
    with pytest.raises(ModelFileError) as caught:
        _ = info.type
    assert (caught.value.code, caught.value.name) == ("E_QTYPE", "some.weight")
    message = str(caught.value)
    assert "some.weight" in message
    assert f" {known.name}, " in message
    assert message.endswith(", ".join(t.name for t in SUPPORTED_TYPES))


def test_another_architecture_opens(write: Callable[..., Path]):
    path = write(GGUFBuilder({"general.architecture": "llama", "llama.block_count": 2}))
    with GGUFFile.open(path) as file:
        assert file.metadata["general.architecture"] == "llama"


# Limits


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
    texts = ["a" * (gguf_header._WINDOW - 9), "é" * gguf_header._WINDOW, "", "b" * 3_000_000, "c"]
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


# What is no file


@pytest.mark.parametrize("name", ["missing.gguf", ".", "a\0b", "x" * 300])
def test_not_a_file(tmp_path: Path, name: str):
    error = refusal(f"{tmp_path}/{name}")
    assert error.code == "E_OPEN"
    assert error.name == f"{tmp_path}/{name}" or name == "."


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null", "/dev/tty"])
def test_device(device: str):
    assert refusal(device).code == "E_OPEN"


def test_fifo_does_not_hang(tmp_path: Path):
    os.mkfifo(tmp_path / "fifo.gguf")
    assert "not a regular file" in str(refusal(tmp_path / "fifo.gguf"))


def test_link_loop(tmp_path: Path):
    (tmp_path / "a.gguf").symlink_to(tmp_path / "a.gguf")
    assert refusal(tmp_path / "a.gguf").code == "E_OPEN"


def test_unreadable(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):
    def deny(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    path = write(GGUFBuilder())
    monkeypatch.setattr(os, "open", deny)  # root may read a file without permissions
    assert "Permission denied" in str(refusal(path))


def test_failing_disk(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    path = write(GGUFBuilder())
    monkeypatch.setattr(os, "preadv", fail)
    error = refusal(path)
    assert (error.code, "Input/output error" in str(error)) == ("E_OPEN", True)


def test_reads_that_return_little_at_a_time(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):
    whole = os.preadv
    builder, expected = random_file(random.Random(9), 20, 20)
    path = write(builder)
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: whole(fd, [buffers[0][:7]], at))
    with GGUFFile.open(path) as file:
        assert file.metadata == expected
        for tensor in builder.tensors:
            assert file.read(file.tensors[tensor.name]).tobytes() == tensor.data


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_refused_and_closed_files_leave_no_descriptor(write: Callable[..., Path], tmp_path: Path):
    good, bad = write(GGUFBuilder({"a": 1}), "good.gguf"), write(b"FUGG" + bytes(30), "bad.gguf")
    shards = write_shards(tmp_path, sound_shards(3))
    before = open_descriptors()
    for _ in range(5):
        refusal(bad)
        refusal(tmp_path)
        GGUFFile.open(good).close()
        GGUFFile.open(shards[1]).close()
    shards[2].unlink()
    refusal(shards[0])
    assert open_descriptors() == before


# Split models


def sound_shards(count: int = 3, tensors_each: int = 2) -> list[GGUFBuilder]:
    shards = []
    for i in range(count):
        metadata = {"general.architecture": "qwen3moe", "only.in.first": 1} if i == 0 else {}
        metadata["split.no"] = Typed(U16, i)
        metadata["split.count"] = Typed(U16, count)
        metadata["split.tensors.count"] = Typed(I32, count * tensors_each)
        names = [f"t{i}.{j}" for j in range(tensors_each)]
        shards.append(GGUFBuilder(metadata, [Tensor(n, data=n.ljust(16).encode()) for n in names]))
    return shards


def write_shards(folder: Path, shards: list[GGUFBuilder], name: str = "m") -> list[Path]:
    paths = [folder / f"{name}-{i + 1:05}-of-{len(shards):05}.gguf" for i in range(len(shards))]
    for path, shard in zip(paths, shards, strict=True):
        path.write_bytes(shard.build())
    return paths


@pytest.mark.parametrize("opened", [0, 1, 2])
@pytest.mark.parametrize("name", ["m", "", "a b-00001-of-00002.gguf", "ü\n"])
def test_split_model_opens_from_any_shard(tmp_path: Path, opened: int, name: str):
    paths = write_shards(tmp_path, sound_shards(), name)
    with GGUFFile.open(paths[opened]) as file:
        assert list(file.tensors) == ["t0.0", "t0.1", "t1.0", "t1.1", "t2.0", "t2.1"]
        assert [t.shard for t in file.tensors.values()] == [0, 0, 1, 1, 2, 2]
        assert all(file.read(t).tobytes().decode().strip() == t.name for t in file.tensors.values())
        assert file.metadata["only.in.first"] == 1
        assert file.paths == paths
        assert file.nbytes == sum(p.stat().st_size for p in paths)


def test_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    paths = write_shards(tmp_path, sound_shards())
    monkeypatch.chdir(tmp_path)
    with GGUFFile.open(paths[0].name) as file:
        assert len(file.tensors) == 6


def keyless_shards(folder: Path) -> list[Path]:
    """A whole model in two files, as a tool that knows no split keys would cut it."""
    whole = model_builder()
    half = len(whole.tensors) // 2
    shards = [GGUFBuilder(whole.metadata, whole.tensors[:half]), GGUFBuilder({}, whole.tensors[half:])]
    return write_shards(folder, shards)


@pytest.mark.parametrize("opened", [0, 1])
def test_a_shard_without_split_keys_is_named(tmp_path: Path, opened: int):
    path = keyless_shards(tmp_path)[opened]
    with pytest.raises(ModelFileError, match=f"shard {opened + 1} of 2, and has no split keys") as caught:
        open_model(path)
    assert caught.value.code == "E_SPLIT"
    assert caught.value.advice == "put all shards of one model into one folder"


def test_a_whole_model_may_have_the_name_of_a_shard(tmp_path: Path):
    path = tmp_path / "m-00001-of-00002.gguf"
    path.write_bytes(model_builder().build())
    open_model(path).close()


@pytest.mark.parametrize("name", ["m.gguf.part1of2", "m.gguf-split-a", "m.gguf.part-aa", "m.gguf.part2"])
@pytest.mark.parametrize("half", [slice(0, 900), slice(900, None)], ids=["first", "second"])
def test_a_piece_of_a_cut_file_is_named(tmp_path: Path, name: str, half: slice):
    (tmp_path / name).write_bytes(model_builder().build()[half])
    with pytest.raises(ModelFileError, match="one piece of a file that was cut: join all pieces"):
        open_model(tmp_path / name)


@pytest.mark.parametrize("count", [0, 1])
def test_split_count_of_one_is_a_whole_file(write: Callable[..., Path], count: int):
    with GGUFFile.open(write(GGUFBuilder({"split.count": Typed(U16, count)}))) as file:
        assert len(file.paths) == 1


def missing(shards: list[GGUFBuilder], paths: list[Path]) -> None:
    paths[1].unlink()


def reordered(shards: list[GGUFBuilder], paths: list[Path]) -> None:
    paths[1].write_bytes(shards[2].build())
    paths[2].write_bytes(shards[1].build())


def duplicate(shards: list[GGUFBuilder], paths: list[Path]) -> None:
    paths[2].write_bytes(shards[1].build())


def duplicate_by_link(shards: list[GGUFBuilder], paths: list[Path]) -> None:
    paths[2].unlink()
    paths[2].symlink_to(paths[1])


def is_a_folder(shards: list[GGUFBuilder], paths: list[Path]) -> None:
    paths[1].unlink()
    paths[1].mkdir()


def rewritten(index: int, **metadata: object) -> Callable[[list[GGUFBuilder], list[Path]], None]:
    """One shard with other ``split.*`` values; None takes the key away."""

    def change(shards: list[GGUFBuilder], paths: list[Path]) -> None:
        for name, value in metadata.items():
            shards[index].metadata["split." + name.replace("_", ".")] = value
        shards[index].metadata = {k: v for k, v in shards[index].metadata.items() if v is not None}
        paths[index].write_bytes(shards[index].build())

    return change


def same_tensor_twice(shards: list[GGUFBuilder], paths: list[Path]) -> None:
    shards[2].tensors[0].name = "t0.0"
    paths[2].write_bytes(shards[2].build())


def tensor_lost(shards: list[GGUFBuilder], paths: list[Path]) -> None:
    shards[2].tensors.pop()
    paths[2].write_bytes(shards[2].build())


SPLIT_FAULTS = {
    "missing": (missing, "m-00002-of-00003.gguf: cannot be opened"),
    "reordered": (reordered, "holds shard 3 of 3, not shard 2 of 3"),
    "duplicate": (duplicate, "holds shard 2 of 3, not shard 3 of 3"),
    "duplicate by link": (duplicate_by_link, "holds shard 2 of 3, not shard 3 of 3"),
    "is a folder": (is_a_folder, "is a folder"),
    "same tensor twice": (same_tensor_twice, "has tensor 't0.0', as another shard does"),
    "tensor lost": (tensor_lost, "they hold 5"),
    "number of another": (rewritten(1, no=0), "holds shard 1 of 3"),
    "another count": (rewritten(1, count=4), "holds shard 2 of 4"),
    "not a shard": (rewritten(1, count=None), "split.count is missing"),
    "number is a text": (rewritten(0, no="0"), "split.no is missing or not a number"),
    "number is missing": (rewritten(0, no=None), "split.no is missing or not a number"),
    "number is negative": (rewritten(0, no=Typed(I32, -1)), "split.no is missing or not a number"),
    "count is a text": (rewritten(0, count="../../x"), "split.count is missing or not a number"),
    "count is a list": (rewritten(0, count=[3]), "split.count is missing or not a number"),
    "count is true": (rewritten(0, count=Typed(BOOL, True)), "split.count is missing or not a number"),
    "count is huge": (rewritten(0, count=Typed(U64, 2**64 - 1)), "at most 512"),
    "count in the name differs": (rewritten(0, count=2), "must end in -00001-of-00002.gguf"),
    "number in the name differs": (rewritten(0, no=1), "must end in -00002-of-00003.gguf"),
    "tensor count is missing": (rewritten(2, tensors_count=None), "split.tensors.count is missing"),
    "tensor count is wrong": (rewritten(0, tensors_count=Typed(I32, 7)), "hold 7 tensors; they hold 6"),
}


@pytest.mark.parametrize("fault", SPLIT_FAULTS)
def test_split_fault(tmp_path: Path, fault: str):
    change, message = SPLIT_FAULTS[fault]
    shards = sound_shards()
    paths = write_shards(tmp_path, shards)
    change(shards, paths)
    error = refusal(paths[0])
    assert error.code == "E_SPLIT"
    assert message in str(error)


def test_renamed_shard(tmp_path: Path):
    paths = write_shards(tmp_path, sound_shards())
    renamed = paths[0].rename(tmp_path / "model.gguf")
    assert "its name must end in -00001-of-00003.gguf" in str(refusal(renamed))


def test_fault_inside_a_shard_keeps_its_code(tmp_path: Path):
    paths = write_shards(tmp_path, sound_shards())
    os.truncate(paths[2], paths[2].stat().st_size - 40)
    error = refusal(paths[0])
    assert error.code == "E_SHORT_READ"
    assert "m-00003-of-00003.gguf" in str(error)


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
