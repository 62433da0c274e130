"""The measured speed of main memory is that of a read of every byte, by every core that may be used."""

import threading

import numpy as np
import pytest

from qwen3_moe_jax.kernels_pallas.native import library
from qwen3_moe_jax.machine import limits
from qwen3_moe_jax.machine.kernels import NATIVE


@pytest.fixture
def three_cores(monkeypatch):
    monkeypatch.setattr(limits, "READ_NBYTES", 3 << 20)
    monkeypatch.setattr(limits, "REPEATS", 2)
    monkeypatch.setattr(limits, "cores", lambda: 3)


def test_numpy_reads_with_a_thread_for_each_core(three_cores, monkeypatch):
    together, parts = threading.Barrier(3, timeout=60), []

    def read(part):
        together.wait()  # passes only if three threads read at once
        parts.append((part.ctypes.data, part.nbytes))
        return int(part.view(np.uint8).max())

    monkeypatch.setattr(limits, "_largest", read)
    assert limits.read_bandwidth() > 0
    assert len(parts) == 6
    assert len(set(parts)) == 3
    assert sum(nbytes for _, nbytes in set(parts)) == 3 << 20


def test_the_native_kernels_read_every_word(native):
    words = np.random.default_rng(3).integers(0, 2**63, 1_234_567, dtype=np.uint64)
    for some in (words, words[1:], words[:5], words[:0]):
        assert library.reader()(some) == int(some.sum(dtype=np.uint64))


def test_a_cpus_limit_says_who_read(three_cores, native, monkeypatch):
    read = []
    whole = library.reader()
    monkeypatch.setattr(library, "reader", lambda: lambda part: read.append(part.nbytes) or whole(part))
    facts = {"device": "cpu (cpu)", "kernels": NATIVE}
    found = limits.Limits.of(facts).memory
    assert "a read of main memory by 3 cores, measured with its own kernels" in found.origin
    assert read == [1 << 20] * 6
    assert "measured with NumPy" in limits.Limits.of(facts | {"kernels": "xla"}).memory.origin


def test_a_read_that_misses_words_is_no_measurement(three_cores, native, monkeypatch):
    monkeypatch.setattr(library, "reader", lambda: lambda part: len(part) - 1)
    with pytest.raises(RuntimeError, match="what was read is not what was written"):
        limits.read_bandwidth(NATIVE)
