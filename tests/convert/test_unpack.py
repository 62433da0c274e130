"""Packing loses nothing: dequantized weights are bit for bit those of the ``gguf`` package.

Random bytes stand for blocks, so every field takes every value; scales at the
edges of float16 (subnormal, largest, zero of both signs, NaN, infinity) are
planted on top.
"""

import gguf
import numpy as np
import pytest

from qwen3_moe_jax.convert.errors import ModelFileError
from qwen3_moe_jax.convert.formats import SCALE_NAMES
from qwen3_moe_jax.convert.ggml_types import BLOCK_FORMATS, SUPPORTED_TYPES, GGMLType
from qwen3_moe_jax.convert.packed import ARRAY_FORMATS, PackedTensor, array_shapes, packed_nbytes
from qwen3_moe_jax.convert.source import refuse_nonfinite
from qwen3_moe_jax.convert.unpack import (
    ALIGNMENT,
    aligned_empty,
    block_arrays,
    dequantize,
    empty_packed,
    find_nonfinite,
    pack,
    unpack_blocks,
)
from qwen3_moe_jax.parity.second_reading import read_blocks
from qwen3_moe_jax.testing.low_bits import scale_names, set_scale

QUANTIZED = [t for t in SUPPORTED_TYPES if BLOCK_FORMATS[t].weights > 1]
EDGE_SCALES = np.array(
    [0.0, -0.0, 2**-24, -(2**-24), 1023 * 2**-24, 2**-14, 65504.0, -65504.0, np.inf, -np.inf, np.nan],
    np.float16,
)
SCALE_ARRAYS = SCALE_NAMES


def random_raw(kind: GGMLType, blocks: int, seed: int = 0) -> np.ndarray:
    """uint8 [blocks, bytes of a block] of random bytes, with all pairs of edge scales planted in front."""
    rng = np.random.default_rng(seed)
    fmt = BLOCK_FORMATS[kind]
    raw = rng.integers(0, 256, (blocks, fmt.nbytes), dtype=np.uint8)
    pairs = [(d, dmin) for d in EDGE_SCALES for dmin in EDGE_SCALES][:blocks]
    for name, column in (("d", 0), ("dmin", 1), ("m", 1)):
        if name in scale_names(kind):
            set_scale(raw[: len(pairs)], kind, name, np.array([pair[column] for pair in pairs], np.float16))
    return raw


def finite_raw(kind: GGMLType, blocks: int, seed: int = 0) -> np.ndarray:
    """As ``random_raw``, with scales (or weights) of ordinary size everywhere."""
    raw = random_raw(kind, blocks, seed)
    for name in scale_names(kind):
        set_scale(raw, kind, name, np.ones(len(raw)))
    field = BLOCK_FORMATS[kind].fields.get("w")
    if field is not None:
        one = np.array([{"<u2": 0x3F80}.get(field.dtype, 1)]).astype(field.dtype)
        raw[:, field.offset : field.offset + field.nbytes] = np.tile(one.view(np.uint8), field.count)
    return raw


def oracle(raw: np.ndarray, kind: GGMLType) -> np.ndarray:
    """float32 [blocks, weights], by the ``gguf`` package."""
    if kind == GGMLType.F32:
        return raw.view("<f4")
    with np.errstate(all="ignore"):
        return gguf.dequantize(raw, gguf.GGMLQuantizationType(int(kind))).astype(np.float32)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    bits = f"u{a.dtype.itemsize}"
    return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a.view(bits), b.view(bits))


def packed_of(kind: GGMLType, shape: tuple[int, ...], raw: np.ndarray | None = None) -> PackedTensor:
    blocks = int(np.prod(shape)) // BLOCK_FORMATS[kind].weights
    return pack((finite_raw(kind, blocks) if raw is None else raw).reshape(-1), kind, shape)


@pytest.mark.parametrize("kind", SUPPORTED_TYPES)
@pytest.mark.parametrize("seed", [0, 1])
def test_float32_is_bit_for_bit_ggml(kind, seed):
    weights = BLOCK_FORMATS[kind].weights
    blocks = 2048 * 256 // weights
    raw = random_raw(kind, blocks, seed)
    packed = pack(raw.reshape(-1), kind, (blocks // 8, 8 * weights))
    got = dequantize(packed)
    want = oracle(raw, kind).reshape(got.shape)
    # The payload of a NaN is not part of the promise; that it is NaN is.
    assert np.array_equal(np.isnan(got), np.isnan(want)), f"seed {seed}"
    assert same_bits(np.nan_to_num(got, nan=0.0), np.nan_to_num(want, nan=0.0)), f"seed {seed}"


@pytest.mark.parametrize("kind", SUPPORTED_TYPES)
def test_float64_is_the_exact_value(kind):
    """float64 differs from float32 by the one rounding of float32's subtraction, at most."""
    weights = BLOCK_FORMATS[kind].weights
    packed = packed_of(kind, (64, weights))
    wide, narrow = dequantize(packed, np.float64), dequantize(packed)
    assert wide.dtype == np.float64
    assert same_bits(wide.astype(np.float32), narrow)
    if kind in (GGMLType.Q4_K, GGMLType.Q5_K):
        arrays = {name: array.astype(object) for name, array in block_arrays(packed).items()}
        high = (arrays["qh"][:, 0] & 1) * 16 if kind == GGMLType.Q5_K else 0
        first = arrays["d"][:, 0] * arrays["scales"][:, 0] * ((arrays["q"][:, 0] & 15) + high)
        first = first - arrays["dmin"][:, 0] * arrays["mins"][:, 0]
        assert np.array_equal(wide[:, 0], first.astype(np.float64))


@pytest.mark.parametrize("kind", SUPPORTED_TYPES)
def test_a_second_reading_of_the_bytes_agrees(kind):
    raw = random_raw(kind, 2048)
    got = dequantize(pack(raw.reshape(-1), kind, (2048, BLOCK_FORMATS[kind].weights)))
    want = read_blocks(raw.reshape(-1), kind)
    assert np.array_equal(np.isnan(got), np.isnan(want))
    assert same_bits(np.nan_to_num(got, nan=0.0), np.nan_to_num(want, nan=0.0))


@pytest.mark.parametrize("kind", SUPPORTED_TYPES)
def test_shapes_dtypes_and_alignment(kind):
    shape = (3, 5, 512)
    packed = packed_of(kind, shape)
    assert packed.shape == shape
    assert {n: a.shape for n, a in packed.arrays.items()} == array_shapes(kind, shape)
    assert {n: a.dtype.name for n, a in packed.arrays.items()} == {
        n: f.dtype for n, f in ARRAY_FORMATS[kind].items()
    }
    assert packed.nbytes == packed_nbytes(kind, shape)
    for array in packed.arrays.values():
        assert array.ctypes.data % ALIGNMENT == 0
        assert array.flags.c_contiguous


@pytest.mark.parametrize("kind", SUPPORTED_TYPES)
def test_packed_size_stays_near_the_file_size(kind):
    in_file = 4096 * BLOCK_FORMATS[kind].row_nbytes(4096)
    assert in_file <= packed_nbytes(kind, (4096, 4096)) <= 1.04 * in_file


@pytest.mark.parametrize("kind", SUPPORTED_TYPES)
def test_slices_are_slices_of_the_whole(kind):
    packed = packed_of(kind, (4, 6, 512), random_raw(kind, 4 * 6 * 512 // BLOCK_FORMATS[kind].weights))
    whole = dequantize(packed)
    ids = np.array([[3, 0], [1, 3]])
    for index in (2, slice(1, 3), (slice(None), slice(2, 5)), ids, (1, 4)):
        got = dequantize(packed[index])
        assert np.array_equal(got, whole[index], equal_nan=True), index


@pytest.mark.parametrize("kind", SUPPORTED_TYPES)
def test_filling_in_pieces_equals_packing_at_once(kind):
    blocks = 4 * 512 // BLOCK_FORMATS[kind].weights
    raw = random_raw(kind, blocks)
    packed = empty_packed(kind, (4, 512))
    arrays = block_arrays(packed)
    for start in range(0, blocks, 3):
        unpack_blocks(raw[start : start + 3].reshape(-1), kind, arrays, start)
    whole = pack(raw.reshape(-1), kind, (4, 512))
    for name, array in whole.arrays.items():
        assert same_bits(packed.arrays[name], array), name


def test_many_pieces_and_threads_fill_everything(monkeypatch):
    monkeypatch.setattr("qwen3_moe_jax.convert.unpack.PACK_PIECE_BYTES", 1000)
    raw = random_raw(GGMLType.Q6_K, 1001)
    packed = pack(raw.reshape(-1), GGMLType.Q6_K, (1001, 256))
    got, want = dequantize(packed), oracle(raw, GGMLType.Q6_K)
    assert np.array_equal(got, want, equal_nan=True)


@pytest.mark.parametrize("kind", SUPPORTED_TYPES)
def test_wrong_number_of_bytes_is_refused(kind):
    raw = finite_raw(kind, 512 // BLOCK_FORMATS[kind].weights).reshape(-1)
    for wrong in (raw[:-1], np.append(raw, raw[:1])):
        with pytest.raises(ValueError, match="takes"):
            pack(wrong, kind, (1, 512))


@pytest.mark.parametrize("kind", QUANTIZED)
def test_rows_that_are_no_whole_blocks_are_refused(kind):
    with pytest.raises(ValueError, match="multiple"):
        empty_packed(kind, (4, BLOCK_FORMATS[kind].weights + 8))


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match="float16"):
        dequantize(packed_of(GGMLType.Q8_0, (1, 32)), np.float16)


def test_another_layout_is_refused_and_not_misread():
    packed = packed_of(GGMLType.Q8_0, (16, 32))
    other = PackedTensor(packed.arrays, packed.type, layout="unknown")
    for function in (block_arrays, find_nonfinite):
        with pytest.raises(ValueError, match="layout"):
            function(other)


def test_empty_tensor_has_no_nonfinite_number():
    assert find_nonfinite(empty_packed(GGMLType.F32, (0, 4))) is None


NONFINITE = {
    "<f2": np.array([0x7C00, 0xFC00, 0x7E00, 0xFC01], "<u2"),
    "<u2": np.array([0x7F80, 0xFF80, 0x7FC0, 0xFF81], "<u2"),
    "<f4": np.array([0x7F800000, 0xFF800000, 0x7FC00000, 0xFF800001], "<u4"),
    "u1": np.array([253, 254, 255], "u1"),
}


def put(blocks: np.ndarray, kind: GGMLType, name: str, bits: np.ndarray) -> None:
    """Writes a scale, or the first weight of a type without scales, by its bits."""
    if name in BLOCK_FORMATS[kind].fields:
        offset = BLOCK_FORMATS[kind].fields[name].offset
        blocks[:, offset : offset + bits.itemsize] = bits.reshape(1).view(np.uint8)
    else:
        set_scale(blocks, kind, name, bits.reshape(1).view("<f2"))


def dtype_in_file(kind: GGMLType, name: str) -> str:
    field = BLOCK_FORMATS[kind].fields.get(name)
    return field.dtype if field else "<f2"  # IQ1_M, which spreads it


@pytest.mark.parametrize("kind", SUPPORTED_TYPES)
def test_every_poisoned_block_is_found_and_named(kind):
    """1,000 of 1,000 poisoned blocks of an expert stack, first and last of every expert among them."""
    experts, rows, row_length = 4, 6, 512
    fmt = BLOCK_FORMATS[kind]
    columns = row_length // fmt.weights
    blocks = experts * rows * columns
    clean = finite_raw(kind, blocks)
    rng = np.random.default_rng(7)
    edges = [e * rows * columns + i for e in range(experts) for i in (0, rows * columns - 1)]
    places = (edges + rng.integers(0, blocks, 1000).tolist())[:1000]
    names = [name for name in ARRAY_FORMATS[kind] if name in SCALE_ARRAYS]
    packed = pack(clean.reshape(-1), kind, (experts, rows, row_length))
    assert find_nonfinite(packed) is None
    for i, block in enumerate(places):
        name = names[i % len(names)]
        raw = clean[block].copy()
        put(raw[None], kind, name, np.array(rng.choice(NONFINITE[dtype_in_file(kind, name)])))
        arrays = block_arrays(packed)
        unpack_blocks(raw, kind, arrays, block)
        with pytest.raises(ModelFileError) as caught:
            refuse_nonfinite("blk.3.ffn_down_exps.weight", kind, packed.shape, arrays, 0, blocks)
        unpack_blocks(clean[block], kind, arrays, block)
        expert, row, column = np.unravel_index(block, (experts, rows, columns))
        error = caught.value
        assert error.code == "E_NONFINITE"
        assert error.name == "blk.3.ffn_down_exps.weight"
        assert f"expert {expert}, row {row}," in str(error)
        where = f"superblock {column}" if fmt.weights == 256 else f"column{'s'[: fmt.weights > 1]} "
        assert where in str(error)
        assert f" {column * fmt.weights}" in str(error)


@pytest.mark.parametrize("kind", SUPPORTED_TYPES)
def test_largest_finite_numbers_are_accepted(kind):
    raw = finite_raw(kind, 512 // BLOCK_FORMATS[kind].weights)
    largest = {"<f2": 0x7BFF, "<u2": 0x7F7F, "<f4": 0x7F7FFFFF, "u1": 252}
    for name in ARRAY_FORMATS[kind]:
        if name in SCALE_ARRAYS:
            dtype = dtype_in_file(kind, name)
            put(raw, kind, name, np.array(largest[dtype], dtype.replace("f", "u")))
    assert find_nonfinite(packed_of(kind, (1, 512), raw)) is None


@pytest.mark.parametrize("shape", [(512,), (4, 512)])
def test_vectors_and_matrices_are_described_too(shape):
    raw = finite_raw(GGMLType.F32, int(np.prod(shape))).reshape(-1).view("<f4")
    raw[-1] = np.nan
    packed = pack(raw.view(np.uint8), GGMLType.F32, shape)
    bad = find_nonfinite(packed)
    assert bad is not None
    text = bad.describe(GGMLType.F32, shape)
    assert text.endswith("in column 511" if len(shape) == 1 else "in row 3, column 511")


def test_jax_uses_the_memory_without_a_copy():
    jax = pytest.importorskip("jax")
    cpu = jax.devices("cpu")[0]
    array = aligned_empty((64, 1 << 14), np.uint8)
    array[...] = 3
    on_device = jax.device_put(array, cpu, may_alias=True)
    assert on_device.unsafe_buffer_pointer() == array.ctypes.data
