"""Weights that are unpacked on the device: bit for bit, fault for fault, what the host makes of a file."""

import gc
from contextlib import ExitStack

import jax
import numpy as np
import pytest

from qwen3_moe_jax.convert.errors import ModelFileError
from qwen3_moe_jax.convert.formats import FORMATS
from qwen3_moe_jax.convert.ggml_types import SUPPORTED_TYPES, GGMLType
from qwen3_moe_jax.convert.layouts.gpu_tiles import to_gpu_tiles
from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.convert.packed import PackedTensor
from qwen3_moe_jax.convert.unpack import find_nonfinite, pack
from qwen3_moe_jax.jax_backend import device_load, staging
from qwen3_moe_jax.jax_backend.params import GPU_ROLES, device_plan, load_on_device
from qwen3_moe_jax.kernels_pallas.packed.unpack import first_nonfinite, unpack_blocks, unpacks
from qwen3_moe_jax.testing.faults import LyingSource
from qwen3_moe_jax.testing.random_models import SMALL, write_random_gguf

CPU = jax.devices("cpu")[0]
SHAPE = (3, 8, 512)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Most tensors of the small model come in several pieces."""
    monkeypatch.setattr(device_load, "PIECE_BYTES", 50_000)


@pytest.fixture(params=["q4_k_m", "all"])
def file(request, tmp_path):
    write_random_gguf(tmp_path / "small.gguf", SMALL, mix=request.param, seed=5)
    return tmp_path / "small.gguf"


@pytest.fixture
def q8_0_file(tmp_path):
    write_random_gguf(tmp_path / "small.gguf", SMALL, mix="q8_0")
    return tmp_path / "small.gguf"


def raw_blocks(kind: GGMLType) -> np.ndarray:
    form = FORMATS[kind]
    count = np.prod(SHAPE) // form.block.weights * form.block.nbytes
    return np.random.default_rng(kind).integers(0, 256, count, np.uint8)


@pytest.mark.parametrize("kind", SUPPORTED_TYPES, ids=lambda kind: kind.name)
def test_any_bytes_unpack_as_on_the_host(kind):
    """Bytes of a damaged file too: NaN keeps its bits."""
    raw = raw_blocks(kind)
    expected = pack(raw, kind, SHAPE)
    assert unpacks(kind)
    found, bad = jax.jit(lambda raw: with_check(unpack_blocks(raw, kind, SHAPE)))(raw)
    for name, array in expected.arrays.items():
        assert np.asarray(found.arrays[name]).dtype == array.dtype
        assert np.asarray(found.arrays[name]).tobytes() == array.tobytes(), name
    first = find_nonfinite(expected)
    hits = [int(block) for block in bad if block >= 0]
    assert (min(hits) if hits else None) == (first and first.block)


def with_check(packed: PackedTensor):
    return packed, first_nonfinite(packed)


def same(actual: PackedTensor, expected: PackedTensor, first: int, where: str) -> None:
    """Whether the rows from ``first`` of a stack hold the tensor's bytes."""
    for name, array in expected.arrays.items():
        unit = expected.shape[0] // len(array)
        part = np.asarray(actual.arrays[name])[first // unit : first // unit + len(array)]
        assert part.tobytes() == np.ascontiguousarray(array).tobytes(), f"{where} {name}"


def check_everything(source, params) -> None:
    _, targets = device_plan(source, GPU_ROLES)
    everything = {**params["layers"].stacks, **params}
    assert {t.path for t in targets} == {p for p, s in source.specs.items() if len(s.shape) > 1}
    for target in targets:
        rows = device_load.as_rows(source.tensor(target.path))
        same(
            everything[target.stack], to_gpu_tiles(rows) if target.tiled else rows, target.first, target.path
        )


def test_every_tensor_is_in_its_place_with_its_bits(file):
    told = []
    with open_model(file) as source:
        params = load_on_device(source, GPU_ROLES, CPU, lambda done, total: told.append((done, total)))
        check_everything(source, params)
        assert told[-1] == (source.nbytes, source.nbytes)
        assert len(told) > len(source.paths()), "pieces"


def test_a_source_without_blocks_goes_up_as_packed_arrays(tmp_path):
    write_random_gguf(tmp_path / "small.gguf", SMALL, mix="all")
    with open_model(tmp_path / "small.gguf") as source:
        params = load_on_device(LyingSource(source, {}), GPU_ROLES, CPU)
        check_everything(source, params)


def test_a_checkpoint_goes_up_with_its_checksums(tmp_path):
    from qwen3_moe_jax.convert.checkpoint_writer import write_checkpoint

    write_random_gguf(tmp_path / "small.gguf", SMALL, mix="q8_0")
    with open_model(tmp_path / "small.gguf") as source:
        write_checkpoint(source, tmp_path / "out")
        with open_model(tmp_path / "out") as checkpoint:
            check_everything(source, load_on_device(checkpoint, GPU_ROLES, CPU))
    damaged = max((tmp_path / "out" / "tensors").rglob("0.0"), key=lambda path: path.stat().st_size)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    with (
        open_model(tmp_path / "out") as checkpoint,
        pytest.raises(ModelFileError, match="differs from its SHA"),
    ):
        load_on_device(checkpoint, GPU_ROLES, CPU)


NAN = {"<f2": b"\x00\x7e", "<f4": b"\x00\x00\xc0\x7f", "<u2": b"\xc0\x7f"}


@pytest.mark.parametrize(
    ("path", "kind", "field", "blocks"),
    [
        ("layers.1.mlp.experts.up_proj", "q8_0", "d", True),
        ("lm_head", "q4_k", "dmin", True),
        ("lm_head", "q8_0", "d", False),
        ("embed_tokens", "bf16", "w", True),
        ("layers.1.mlp.router", "f16", "w", True),
        ("layers.1.input_layernorm", "q8_0", "w", False),
    ],
)
def test_a_nan_is_found_and_named_as_on_the_host(tmp_path, path, kind, field, blocks):
    name = tmp_path / "small.gguf"
    write_random_gguf(name, SMALL, mix=kind)
    with open_model(name) as source:
        info = source._infos[path]
        block = FORMATS[info.type].block
        for number in (info.nbytes // block.nbytes // 3 * 2, info.nbytes // block.nbytes - 1):
            with open(name, "r+b") as file:
                file.seek(info.offset + number * block.nbytes + block.fields[field].offset)
                file.write(NAN[block.fields[field].dtype])
    with open_model(name) as source:
        with pytest.raises(ModelFileError) as expected:
            source.tensor(path)
        with pytest.raises(ModelFileError) as actual:
            load_on_device(source if blocks else without_check(source), GPU_ROLES, CPU)
    assert str(actual.value) == str(expected.value)
    assert actual.value.code == "E_NONFINITE"
    with open_model(name, check=False) as source:
        load_on_device(source, GPU_ROLES, CPU)


class without_check(LyingSource):
    """A source whose NaN the device alone looks for."""

    def __init__(self, truth):
        super().__init__(truth, {})

    def unchecked(self, path):
        with open_model(self._truth.path, check=False) as blind:  # vectors are read beside, with their check
            return blind.tensor(path)


def test_a_fault_of_reading_ends_the_load_after_what_lies_before_it(q8_0_file, monkeypatch):
    with open_model(q8_0_file) as source:
        read = source.read_blocks
        paths = [t.path for t in device_plan(source, GPU_ROLES)[1]]

        def fails(path, start, buffer):
            if path == paths[-1]:
                raise ModelFileError("E_SHORT_READ", "ends early")
            read(path, start, buffer)

        monkeypatch.setattr(source, "read_blocks", fails)
        with pytest.raises(ModelFileError, match="ends early"):
            load_on_device(source, GPU_ROLES, CPU)

        def damaged(path, start, buffer):
            fails(path, start, buffer)
            if path == paths[3]:
                buffer[:] = 0xFF

        monkeypatch.setattr(source, "read_blocks", damaged)
        with pytest.raises(ModelFileError, match="NaN"):
            load_on_device(source, GPU_ROLES, CPU)


def test_the_host_holds_few_buffers(q8_0_file, monkeypatch):
    made = []
    empty = staging.aligned_empty

    def noted(shape, dtype):
        made.append(shape[0])
        return empty(shape, dtype)

    monkeypatch.setattr(staging, "aligned_empty", noted)
    with ExitStack() as stack:
        source = stack.enter_context(open_model(q8_0_file))
        load_on_device(source, GPU_ROLES, CPU)
    assert 0 < len(made) <= device_load.READERS
    assert sum(made) <= device_load.READERS * device_load.PIECE_BYTES


def held_nbytes(monkeypatch, load) -> int:
    """The most that a load has on its device at a time beyond what is left of it, in bytes, by counting."""
    gc.collect()
    before, peak = {id(a) for a in jax.live_arrays()}, [0]
    count = lambda: sum(a.nbytes for a in jax.live_arrays() if id(a) not in before and not a.is_deleted())
    for name in ("place_blocks", "place_rows"):
        inner = getattr(device_load, name)

        def counted(*args, inner=inner, **options):
            found = inner(*args, **options)
            peak[0] = max(peak[0], count())
            return found

        monkeypatch.setattr(device_load, name, counted)
    params = load()
    return peak[0] - sum(a.nbytes for a in jax.tree.leaves(params))


def test_the_device_holds_few_pieces_beside_the_weights(q8_0_file, monkeypatch):
    with open_model(q8_0_file) as source:
        beside = held_nbytes(monkeypatch, lambda: load_on_device(source, GPU_ROLES, CPU))
    pieces = (device_load.READERS + 2 * device_load.AHEAD) * device_load.PIECE_BYTES
    assert beside <= pieces < q8_0_file.stat().st_size / 2


def test_tensors_are_read_ahead_up_to_a_number_of_bytes(q8_0_file, monkeypatch):
    """Of what is read whole, the host holds that which has been begun and not been sent."""
    begun, sent, peak = [0], [0], [0]

    class Counted(LyingSource):
        def unchecked(self, path):
            if path in matrices:  # vectors are read beside them, and told at the end
                begun[0] += self.tensor_nbytes(path)
                peak[0] = max(peak[0], begun[0] - sent[0])
            return super().unchecked(path)

    with open_model(q8_0_file) as source:
        matrices = {t.path for t in device_plan(source, GPU_ROLES)[1]}
        sizes = sorted(map(source.tensor_nbytes, matrices))
        monkeypatch.setattr(device_load, "TENSOR_BYTES", sizes[-1] * 3 // 2)
        told = lambda done, total: sent.__setitem__(0, done)
        load_on_device(Counted(source, {}), GPU_ROLES, CPU, told)
    assert sizes[-1] < peak[0] <= device_load.TENSOR_BYTES


def test_a_piece_is_whole_tiles_that_divide_the_tensor():
    target = device_load.Target("x", "x", 0, GGMLType.Q4_K, rows=8 * 30, columns=256, tiled=True)
    assert target.row_nbytes == 144
    assert target.piece_rows == 240
    assert 8 * 30 * 5 % device_load.Target("x", "x", 0, GGMLType.Q4_K, 8 * 30 * 5, 256, True).piece_rows == 0
    huge = device_load.Target("x", "x", 0, GGMLType.Q4_K, 24, 256 * 1000, True)
    assert huge.piece_rows == 8, "a tile at least"
