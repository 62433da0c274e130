"""Weights out of a file into buffers: the bytes that packed tensors would give, piece by piece."""

import numpy as np
import pytest

from qwen3_moe_jax.convert.errors import ModelFileError
from qwen3_moe_jax.convert.formats import FORMATS
from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.convert.unpack import find_nonfinite, pack
from qwen3_moe_jax.testing.random_models import SMALL, write_random_gguf
from qwen3_moe_jax.wgpu_backend import feed, layout
from qwen3_moe_jax.wgpu_backend.layout import device_nbytes, device_words
from qwen3_moe_jax.wgpu_backend.reorder import can_reorder
from tests.wgpu import gpu_work


class Device:
    """Buffers are arrays."""

    def write(self, buffer, data, offset):
        buffer[offset : offset + len(data)] = data

    def flush(self):
        pass


def matrices(source):
    return [path for path, spec in source.specs.items() if len(spec.shape) > 1]


@pytest.mark.parametrize("mix", ["all", "q4_k_m"])
def test_every_buffer_holds_the_words_of_its_tensor(tmp_path, monkeypatch, mix):
    monkeypatch.setattr(feed, "UPLOAD_PIECE", 40_000)
    write_random_gguf(tmp_path / "small.gguf", SMALL, mix=mix)
    with open_model(tmp_path / "small.gguf") as source:
        wanted = []
        for path in matrices(source):
            *leading, columns = source.specs[path].shape
            rows = int(np.prod(leading))
            buffer = np.full(64 + device_nbytes(source.types[path], rows * columns), 0xAA, np.uint8)
            wanted.append(feed.Rows(path, 0, rows, buffer, 64))
        read = list(feed.write_all(Device(), source, wanted))
        assert sum(read) == sum(source.tensor_nbytes(path) for path in matrices(source))
        assert len(read) > len(wanted)
        for rows in wanted:
            words = device_words(source.tensor(rows.path))
            assert rows.buffer[64:].tobytes() == words.tobytes(), rows.path
            assert set(rows.buffer[:64]) == {0xAA}


def test_rows_of_a_window_are_those_of_the_tensor(tmp_path):
    write_random_gguf(tmp_path / "small.gguf", SMALL, mix="q6_k")
    with open_model(tmp_path / "small.gguf") as source:
        path = "layers.0.mlp.experts.up_proj"
        tensor = source.tensor(path)
        one = np.zeros(device_nbytes(tensor.type, 256 * 256), np.uint8)
        list(feed.write_all(Device(), source, [feed.Rows(path, 256, 256, one, 0)]))
        assert one.tobytes() == device_words(tensor[1:2]).tobytes()


@pytest.mark.parametrize("mix", ["q4_k", "q8_0"])
def test_a_nan_is_named_as_the_host_names_it(tmp_path, mix):
    name, path = tmp_path / "small.gguf", "layers.1.mlp.experts.down_proj"
    write_random_gguf(name, SMALL, mix=mix)
    with open_model(name) as source:
        info = source._infos[path]
    block = FORMATS[info.type].block
    with open(name, "r+b") as file:
        file.seek(info.offset + (info.nbytes // block.nbytes - 3) * block.nbytes + block.fields["d"].offset)
        file.write(b"\x00\x7c")
    with open_model(name) as source:
        with pytest.raises(ModelFileError) as expected:
            source.tensor(path)
        rows = feed.Rows(path, 0, 3 * 256, np.zeros(1 << 20, np.uint8), 0)
        with pytest.raises(ModelFileError) as actual:
            list(feed.write_all(Device(), source, [rows]))
    assert str(actual.value) == str(expected.value)


@pytest.mark.parametrize("mix", ["all", "q6_k"])
def test_a_device_puts_bytes_in_the_order_of_the_host(gpu, tmp_path, mix):
    write_random_gguf(tmp_path / "small.gguf", SMALL, mix=mix)
    assert gpu(gpu_work.differences_of_reordered, tmp_path / "small.gguf", 40_000) == []


def test_a_device_changes_the_order_of_most_types():
    host = {kind.name for kind in layout.WORD_FORMATS if not can_reorder(kind)}
    assert host == {"F32", "F16", "BF16", "Q3_K", "IQ4_XS", "IQ1_M"}


@pytest.mark.parametrize("kind", [k for k in layout.WORD_FORMATS if can_reorder(k)], ids=lambda k: k.name)
def test_scales_of_blocks_are_looked_at_as_those_of_arrays(kind):
    """Any bytes: with eight blocks or more some scale is not finite in most types, and it is the same one."""
    block, found = FORMATS[kind].block, []
    raw = np.random.default_rng(kind).integers(0, 256, (40, 16 * block.nbytes), np.uint8)
    for blocks in raw:
        blocks = blocks.copy()
        packed = pack(blocks, kind, (1, 16 * block.weights))
        found.append(feed._nonfinite_in_blocks(kind, blocks))
        assert found[-1] == find_nonfinite(packed)
    assert any(found)
