"""The reader on sound files: values and bytes; and everything that is no file."""

import os
import random
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from qwen3_moe_jax.convert.errors import ModelFileError
from qwen3_moe_jax.convert.ggml_types import BLOCK_FORMATS, KNOWN_TYPES, SUPPORTED_TYPES, GGMLType
from qwen3_moe_jax.convert.gguf_file import GGUFFile
from qwen3_moe_jax.testing.gguf_builder import (
    GGUFBuilder,
    Tensor,
)
from tests.convert.gguf_files import random_file, refusal, sound_shards, write_shards


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
