"""The CPU's integer dots against NumPy in float64, in every form that this processor has; refusals."""

import ctypes
import errno
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest

import qwen3_moe_jax.kernels_pallas as ops
from qwen3_moe_jax.convert.ggml_types import BLOCK_FORMATS, GGMLType
from qwen3_moe_jax.convert.layouts.lanes16 import supports, to_layout
from qwen3_moe_jax.convert.packed import LANES16, PackedTensor
from qwen3_moe_jax.kernels_pallas.implementations import NATIVE, recording, using
from qwen3_moe_jax.kernels_pallas.native import compiler, forms, library
from qwen3_moe_jax.kernels_pallas.native.operands import ARRAYS, FLOATS
from qwen3_moe_jax.parity.noise import INT15_ZERO, ROUNDING, rounded
from tests import tolerances
from tests.conftest import NATIVE_FOLDER as FOLDER
from tests.kernels.op_inputs import dense64, heavy_tailed, poison, random_weights, rng
from tests.kernels.op_oracles import moe_oracle

__all__ = ["rng"]

TYPES = tuple(ARRAYS)
HERE = [f for f in forms.FORMS if f.machine == platform.machine() and f.needs <= forms.features()]


def names(values: object) -> str:
    return getattr(values, "name", str(values))


def columns_of(type: GGMLType, superblocks: int) -> int:
    """So many superblocks; and a part of one, where the type's blocks are smaller."""
    part = {1: 32, 32: 128 if type is GGMLType.MXFP4 else 32}.get(BLOCK_FORMATS[type].weights, 0)
    return 256 * superblocks + (0 if type in FLOATS else part)


def arranged(w: PackedTensor) -> PackedTensor:
    return to_layout(w, LANES16) if supports(LANES16, w.type, w.shape) else w


def bound(x: np.ndarray, w: np.ndarray, type: GGMLType) -> np.ndarray:
    """Largest error [T, N]: half a step of each activation times its weight, and float32's sums."""
    sums = tolerances.NATIVE_FLOAT32_SUMS * (np.abs(x) @ np.abs(w).T)
    if type in FLOATS:
        return sums
    padded = np.pad(x, ((0, 0), (0, -x.shape[1] % 256))).reshape(len(x), -1, 256)
    half_step = np.abs(padded).max(-1, keepdims=True) / (2 * tolerances.NATIVE_TOP)
    half_step = np.broadcast_to(half_step, padded.shape).reshape(len(x), -1)[:, : x.shape[1]]
    return half_step @ np.abs(w).T + sums


@pytest.mark.parametrize("type", TYPES, ids=names)
def test_products_are_within_half_a_step_of_each_activation(native, rng, type):
    columns = columns_of(type, 2)
    w = random_weights(rng, type, (48, columns))
    dense, packed = dense64(w), arranged(w)
    x = heavy_tailed(rng, (70, columns))
    together = np.asarray(ops.quantized_matmul(x, packed, implementation="native"))
    # the minimum of a subblock is a number of its own, which is as large as the weights that it is taken from
    assert (np.abs(together - x.astype(np.float64) @ dense.T) <= bound(x, dense_terms(w), type)).all()
    for count in (1, 2, 3, 5, 8, 13):
        alone = np.asarray(ops.quantized_matmul(x[:count], packed, implementation="native"))
        np.testing.assert_array_equal(alone, together[:count], f"{count} rows")


def dense_terms(w: PackedTensor) -> np.ndarray:
    """The sizes of what weights are made of, |a| + |b| of ``a - b``."""
    dense = np.abs(dense64(w))
    if not {"dmin", "m"} & w.arrays.keys():
        return dense
    without = {n: np.zeros_like(a) if n in ("q", "qh") else a for n, a in w.arrays.items()}
    return dense + 2 * np.abs(dense64(PackedTensor(without, w.type)))


EXPERT_TYPES = ("Q4_K", "Q6_K", "Q8_0", "F16", "Q2_K", "IQ4_XS", "MXFP4")


@pytest.mark.parametrize("type", [GGMLType[name] for name in EXPERT_TYPES], ids=names)
def test_experts_are_grouped_and_no_other_is_read(native, rng, type):
    shape, used = (6, 256, 512), np.array([1, 4, 5])
    gate, up = (poison(random_weights(rng, type, shape), used) for _ in range(2))
    down = poison(random_weights(rng, type, (6, 512, 256)), used)
    for tokens in (1, 3, 90):
        ids = np.stack([rng.permutation(used)[:2] for _ in range(tokens)]).astype(np.int32)
        weights = rng.random((tokens, 2)).astype(np.float32)
        x = rng.standard_normal((tokens, 512)).astype(np.float32)
        out = ops.moe_mlp(x, *map(arranged, (gate, up, down)), ids, weights, implementation="native")
        expected = moe_oracle(x, gate, up, down, ids, weights)
        error = np.linalg.norm(out - expected) / np.linalg.norm(expected)
        assert error < tolerances.NATIVE_MOE, (tokens, error)


def test_more_threads_give_the_same_bits(native, rng):
    w = arranged(random_weights(rng, GGMLType.Q4_K, (4096, 256)))
    x = rng.standard_normal((20, 256)).astype(np.float32)
    multiply = lambda: np.asarray(ops.quantized_matmul(x, w, implementation="native"))
    before = multiply()
    assert native.handle.pool_start(native.threads + 3) == native.threads + 3
    for _ in range(20):
        np.testing.assert_array_equal(multiply(), before)


def test_what_is_not_finite_stays_in_its_row(native, rng):
    w = arranged(random_weights(rng, GGMLType.Q4_K, (32, 512)))
    x = rng.standard_normal((3, 512)).astype(np.float32)
    x[1, 300] = np.inf
    finite = np.isfinite(np.asarray(ops.quantized_matmul(x, w, implementation="native")))
    assert finite.all(axis=1).tolist() == [True, False, True]
    assert not finite[1].any()


def test_zeros_give_zeros(native, rng):
    w = arranged(random_weights(rng, GGMLType.Q6_K, (16, 256)))
    assert not np.asarray(
        ops.quantized_matmul(np.zeros((2, 256), np.float32), w, implementation="native")
    ).any()


def test_activations_that_are_all_tiny_are_zero_below_what_the_judge_of_stages_allows(native, rng):
    w = arranged(random_weights(rng, GGMLType.Q8_0, (48, 256)))
    ones = np.ones((2, 256), np.float32)
    x = ones * np.array([[0.9], [1.1]], np.float32) * np.float32(INT15_ZERO)
    below, above = np.asarray(ops.quantized_matmul(x, w, implementation="native"))
    assert not below.any()
    assert above.all()
    assert [row.any() for row in rounded(x.astype(np.float64), ROUNDING["int15"])] == [False, True]


def test_it_runs_where_it_is_asked_for_alone(native, rng):
    w, x = arranged(random_weights(rng, GGMLType.Q4_K, (16, 256))), jnp.ones((1, 256))
    with recording() as record:
        ops.quantized_matmul(x, w)
    assert record.of_type(GGMLType.Q4_K) == "xla"
    with recording() as record, using(NATIVE):
        ops.quantized_matmul(x, w)
    assert record.of_type(GGMLType.Q4_K) == "native"


def test_a_type_without_products_runs_in_xla_and_the_record_says_why(native, rng):
    w = random_weights(rng, GGMLType.IQ3_S, (16, 256))
    with recording() as record, using(NATIVE):
        ops.quantized_matmul(jnp.ones((1, 256)), w)
    assert "native: it has no products of IQ3_S" in record.refusals()[0]


def test_without_headers_of_the_system_zig_brings_its_own(monkeypatch, tmp_path):
    """The first try takes the system's, and a third of the time."""
    tried = []

    def compiled(command: list[str], path: Path) -> None:
        tried.append("-nostdlib" in command)
        if tried[-1]:
            raise NotImplementedError("'pthread.h' file not found")
        path.touch()

    monkeypatch.setattr(compiler, "_compile", compiled)
    assert compiler.build(HERE[0], tmp_path).exists()
    assert tried == [True, False]


@pytest.fixture
def nothing_loaded() -> Iterator[None]:
    with mock.patch.object(library, "_found", None):
        yield


def test_an_unknown_version_of_xla_is_refused(nothing_loaded):
    with mock.patch.object(library, "_api_version", return_value=(0, 99)):
        assert "version 0.99" in str(library.start(FOLDER))


def test_a_form_can_be_named(monkeypatch):
    for form in HERE:
        monkeypatch.setenv(forms.VARIABLE, form.name)
        assert forms.choose_form() == form
    monkeypatch.setenv(forms.VARIABLE, "mmx")
    with pytest.raises(NotImplementedError, match="QWEN3_MOE_NATIVE=mmx: there is avx512"):
        forms.choose_form()


def test_another_process_finds_the_library_that_this_one_made():
    """The key has nothing in it that differs from process to process, such as the order of a set."""
    program = "from tests.kernels.test_native import compiler, HERE; print(compiler._key(HERE[0], 'v'))"
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": os.getcwd()}
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert found.stdout.strip() == compiler._key(HERE[0], "v"), found.stderr


def test_a_processor_without_a_form_is_refused():
    little = mock.patch.object(forms, "features", return_value=frozenset({"sse2"}))
    with little, pytest.raises(NotImplementedError, match="has none of"):
        forms.choose_form()


def test_no_compiler_is_a_reason_and_what_to_do(nothing_loaded, tmp_path):
    with (
        mock.patch.object(compiler.importlib.util, "find_spec", return_value=None),
        mock.patch.object(compiler.shutil, "which", return_value=None),
    ):
        assert library.start(tmp_path) == "there is no compiler: pip install ziglang"


@pytest.mark.parametrize("kind", ["there", "read-only", "full", "of somebody else", "noexec"])
def test_a_folder_that_cannot_be_used_does_not_cost_the_kernels(monkeypatch, tmp_path, kind):
    """What is there is loaded; else a library is made for this process alone."""
    folder, scratch, made = tmp_path / "native", tmp_path / "scratch", []
    scratch.mkdir()
    if kind in ("there", "noexec"):
        monkeypatch.setattr(compiler, "_compile", lambda _, path: path.write_bytes(b"code"))
        compiler.build(HERE[0], folder)
    monkeypatch.setattr(compiler, "_compile", lambda _, path: made.append(path.parent))

    def opened(name: str) -> str:
        if kind == "noexec" and Path(name).parent == folder:
            raise OSError(f"{name}: failed to map segment from shared object")
        return name

    def refused(path: Path, **_) -> None:
        if path == folder:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(library.ctypes, "CDLL", opened)
    if kind == "read-only":
        monkeypatch.setattr(Path, "mkdir", refused)
    if kind == "full":
        full = lambda path: SimpleNamespace(free=1000 if path == folder else 1 << 40)
        monkeypatch.setattr(compiler.shutil, "disk_usage", full)
    if kind == "of somebody else":
        folder.symlink_to(scratch)
    name = library._open(HERE[0], folder, scratch)
    is_found = kind in ("there", "noexec")
    assert made == ([] if is_found else [scratch])
    assert Path(name).parent == (folder if kind == "there" else scratch)
    assert kind != "noexec" or Path(name).read_bytes() == b"code"


def test_a_folder_that_others_may_write_to_is_closed_and_emptied(tmp_path):
    planted = tmp_path / "native-avx2-0.so"
    planted.write_bytes(b"somebody's")
    tmp_path.chmod(0o777)
    compiler._check_private(tmp_path)
    assert (tmp_path.stat().st_mode & 0o777, planted.exists()) == (0o700, False)


@pytest.mark.parametrize("form", HERE[1:], ids=names)
def test_other_forms_give_the_same_products(native, rng, form):
    """Forms that this processor would not choose, called without XLA."""
    other = ctypes.CDLL(str(compiler.build(form, FOLDER)))
    for type in (t for t in TYPES if t is not GGMLType.F16):
        columns = columns_of(type, 1)
        packed = arranged(random_weights(rng, type, (32, columns)))
        x = heavy_tailed(rng, (11, columns))
        expected = np.asarray(ops.quantized_matmul(x, packed, implementation="native"))
        out = np.empty((11, 32), np.float32)
        arrays = [np.ascontiguousarray(packed.arrays[name]) for name in ARRAYS[type]]
        pointers = (ctypes.c_void_p * len(arrays))(*(a.ctypes.data for a in arrays))
        sizes = (
            ctypes.c_int(int(type)),
            ctypes.c_int(32),
            ctypes.c_int(columns),
            pointers,
            ctypes.c_int(len(arrays)),
        )
        other.qwen3_moe_products(
            *sizes, x.ctypes.data_as(ctypes.c_void_p), 11, out.ctypes.data_as(ctypes.c_void_p)
        )
        np.testing.assert_allclose(
            out, expected, rtol=0, atol=tolerances.NATIVE_FORMS * np.abs(expected).max()
        )
