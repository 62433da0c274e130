"""Weights out of a file into buffers: the bytes that packed tensors would give, piece by piece."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

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
from qwen3_moe_jax.wgpu_backend.staging import Staging
from tests.wgpu import gpu_work
from tests.wgpu.cases import spoil_scale


class Shared:
    """Memory that says whether it was given back."""

    def __init__(self, nbytes):
        self.bytes = np.full(nbytes, 0x55, np.uint8)
        self.waits = 0

    def wait(self):
        self.waits += 1


class Device:
    """Buffers are arrays."""

    def __init__(self, *, software=False):
        self.pieces = []
        self.report = SimpleNamespace(software=software)

    def shared(self, nbytes):
        self.pieces.append(Shared(nbytes))
        return self.pieces[-1]

    def send(self, piece, copies, launches):
        assert not launches
        for start, buffer, offset, nbytes in copies:
            buffer[offset : offset + nbytes] = piece.bytes[start : start + nbytes]
        piece.bytes[:] = 0x55


def matrices(source):
    return [path for path, spec in source.specs.items() if len(spec.shape) > 1]


@pytest.mark.parametrize("software", [False, True])
@pytest.mark.parametrize("mix", ["all", "q4_k_m"])
def test_every_buffer_holds_the_words_of_its_tensor(tmp_path, monkeypatch, mix, software):
    monkeypatch.setattr(feed, "UPLOAD_PIECE", 40_000)
    write_random_gguf(tmp_path / "small.gguf", SMALL, mix=mix)
    with open_model(tmp_path / "small.gguf") as source:
        wanted = []
        for path in matrices(source):
            *leading, columns = source.specs[path].shape
            rows = int(np.prod(leading))
            buffer = np.full(64 + device_nbytes(source.types[path], rows * columns), 0xAA, np.uint8)
            wanted.append(feed.Rows(path, 0, rows, buffer, 64))
        read = list(feed.write_all(Device(software=software), source, wanted))
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


@pytest.mark.parametrize("in_cache", [feed.IN_CACHE, 3000])
@pytest.mark.parametrize("mix", ["q4_k", "q8_0"])
def test_a_nan_is_named_as_the_host_names_it(tmp_path, monkeypatch, mix, in_cache):
    monkeypatch.setattr(feed, "IN_CACHE", in_cache)
    name, path = tmp_path / "small.gguf", "layers.1.mlp.experts.down_proj"
    write_random_gguf(name, SMALL, mix=mix)
    spoil_scale(name, path, -3)
    device = Device()
    with open_model(name) as source:
        with pytest.raises(ModelFileError) as expected:
            source.tensor(path)
        rows = feed.Rows(path, 0, 3 * 256, np.zeros(1 << 20, np.uint8), 0)
        with pytest.raises(ModelFileError) as actual:
            list(feed.write_all(device, source, [rows]))
    assert str(actual.value) == str(expected.value)
    assert all(piece.waits for piece in device.pieces), "a buffer that wgpu is about to map must not go"


def test_the_first_fault_in_the_order_of_what_is_wanted_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(feed, "UPLOAD_PIECE", 20_000)
    name, path = tmp_path / "small.gguf", "layers.1.mlp.experts.down_proj"
    write_random_gguf(name, SMALL, mix="q8_0")
    for block in (-3, 700, 40):
        spoil_scale(name, path, block)
    with open_model(name) as source:
        rows = feed.Rows(path, 0, 3 * 256, np.zeros(1 << 20, np.uint8), 0)
        with pytest.raises(ModelFileError, match="expert 0, row 5, columns 0-31"):
            list(feed.write_all(Device(), source, [rows]))


def test_threads_share_pieces_and_send_them_whole():
    """More threads than pieces: none waits for ever, and none is given a piece that another holds."""
    device, target, held = Device(), np.zeros(64 * 16, np.uint8), []
    with Staging(device, 3, 16) as staging:

        def work(number):
            piece = staging.take()
            assert id(piece) not in held
            held.append(id(piece))
            piece.bytes[:] = number
            held.remove(id(piece))
            if number % 7 == 0:
                staging.give_back(piece)
            else:
                staging.send(piece, [(0, target, 16 * number, 16)])

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(64)))
    expected = [0 if number % 7 == 0 else number for number in range(64)]
    assert target.reshape(64, 16).tolist() == [[value] * 16 for value in expected]


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
