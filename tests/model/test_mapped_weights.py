"""Weights that stay in a file: the same answers, one file per model, and what can go wrong with it."""

import errno
import gc
import hashlib
import json
import os
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from qwen3_moe_jax import api, cli, loader
from qwen3_moe_jax.convert.errors import ModelFileError
from qwen3_moe_jax.convert.ggml_types import SUPPORTED_TYPES
from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.convert.output_folder import output_folder
from qwen3_moe_jax.core.errors import MemoryPlanError
from qwen3_moe_jax.jax_backend import params as loading
from qwen3_moe_jax.jax_backend.runner import JaxRunner
from qwen3_moe_jax.jax_backend.session_programs import cache_length
from qwen3_moe_jax.machine import estimate, headroom, kept_weights
from qwen3_moe_jax.machine.headroom import Headroom
from qwen3_moe_jax.machine.memory import MemoryPlan, cache_nbytes
from qwen3_moe_jax.testing.random_models import SMALL, write_random_gguf

CPU = jax.devices("cpu")[0]

TEXT = Path(__file__).read_text()[:400]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """The cache folder, on a disk as it were: the suite may lie in memory."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("QWEN3_MOE_CACHE", str(folder))
    monkeypatch.setattr(kept_weights, "IN_MEMORY", ())
    return folder


def room(source, share: float = 0.5, context: int = 512) -> Headroom:
    """Memory for a cache, for working, and for a share of the weights."""
    plan = MemoryPlan.of(source, 0, 4)
    cache = cache_nbytes(source.config, cache_length(context), 4)
    return Headroom(int(plan.weights * share) + cache + plan.working)


@pytest.fixture
def small_memory(source, monkeypatch) -> None:
    """A machine whose memory holds half of the embedded model's weights."""
    monkeypatch.setattr(headroom, "main_memory", lambda **_: room(source))
    monkeypatch.setattr(estimate, "main_memory", lambda **_: room(source))


def mapped(source, progress=None):
    """Parameters out of a file."""
    plan = replace(MemoryPlan.of(source, 64, 4), room=1)
    return loading.load_on_host(source, {}, CPU, progress, plan)


def file_of(source) -> Path:
    folder = kept_weights.folder_of(source)
    assert folder is not None
    return folder / kept_weights.ARRAYS


def same(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


# The same model


@pytest.mark.parametrize("type", SUPPORTED_TYPES, ids=lambda type: type.name)
def test_a_file_has_the_arrays_that_memory_would_have(tmp_path, type):
    config = replace(SMALL, num_hidden_layers=1)
    write_random_gguf(tmp_path / "one.gguf", config, mix=f"only_{type.name}")
    with open_model(tmp_path / "one.gguf") as source:
        expected = loading.load_on_host(source, {}, CPU)
        for _ in range(2):  # written, and found
            found = mapped(source)
            assert jax.tree.structure(found) == jax.tree.structure(expected)
            assert same(found, expected)


def test_every_type_gives_the_same_logits(tmp_path, monkeypatch):
    write_random_gguf(tmp_path / "small.gguf", SMALL, mix="all")
    found = []
    with open_model(tmp_path / "small.gguf") as source:
        for free in (Headroom(None), room(source, context=128)):
            monkeypatch.setattr(headroom, "main_memory", lambda free=free, **_: free)
            runner = JaxRunner(source, max_context=128)
            assert runner.plan.is_mapped == (free.nbytes is not None)
            found.append(runner.forward(np.arange(16) % SMALL.vocab_size).logits)
            runner.close()
    np.testing.assert_array_equal(*found)


def test_the_embedded_model_writes_the_same_text_with_its_gate(source, monkeypatch):
    with api.load(backend="jax", max_context=512, gate=False) as model:
        expected = model.generate(TEXT, max_tokens=24, temperature=0)
        assert "weights" not in model.runner.describe()
    monkeypatch.setattr(headroom, "main_memory", lambda **_: room(source))
    for _ in range(2):
        with api.load(backend="jax", max_context=512) as model:
            assert model.generate(TEXT, max_tokens=24, temperature=0) == expected
            assert str(file_of(source).parent) in str(model.runner.describe()["weights"])


def test_nothing_is_copied_and_nothing_stays_mapped(source):
    found = mapped(source)
    places = [
        tuple(int(end, 16) for end in line.split()[0].split("-"))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if str(file_of(source)) in line
    ]
    for array in jax.tree.leaves(found):
        at = array.unsafe_buffer_pointer()
        assert any(start <= at and at + array.nbytes <= end for start, end in places)
    for array in jax.tree.leaves(found):
        array.delete()
    del found, array
    gc.collect()
    assert str(file_of(source)) not in Path("/proc/self/maps").read_text()


def test_the_form_of_files_is_this_one(source):
    """Other bytes under the same FORMAT would be taken for weights: raise it, then change the digest."""
    mapped(source)
    assert kept_weights.FORMAT == 1
    digest = hashlib.sha256(file_of(source).read_bytes()).hexdigest()
    assert digest == "85ee859c5cc54ff952dc957e6001f51b2e0663f8daf6ff3cb4fbb4f35166c231"


# When


GB = 10**9
PLAN = MemoryPlan(int(16.6 * GB), int(0.91 * GB), 4608)


def test_weights_stay_in_a_file_where_memory_does_not_hold_them():
    assert not PLAN.settled(Headroom(18 * GB)).is_mapped
    assert not PLAN.settled(Headroom(None)).is_mapped
    assert not PLAN.settled(Headroom(16 * GB, "a card")).is_mapped
    found = PLAN.settled(Headroom(int(16.97 * GB)))
    assert found.share == pytest.approx(0.94, abs=0.005)
    assert found.total == PLAN.total
    found.check(Headroom(int(16.97 * GB)))
    assert str(found).startswith("weights 16.60 GB in a file (94% of them fit memory) + KV cache")


def test_address_space_counts_a_file_as_memory():
    assert not PLAN.settled(Headroom(16 * GB, addresses=17 * GB)).is_mapped
    assert PLAN.settled(Headroom(16 * GB, addresses=18 * GB)).is_mapped
    free = headroom.main_memory(limits={"RLIMIT_AS": 1 << 50, "RLIMIT_DATA": 1 << 50})
    assert free.addresses is not None
    assert 0 < free.addresses < 1 << 50
    assert headroom.main_memory(limits={"RLIMIT_DATA": 1 << 50}).addresses is None


def test_memory_that_a_token_would_not_fit_is_refused_with_what_would_fit():
    small, long = Headroom(3 * GB), replace(PLAN, cache=10 * GB, context=50_000)
    with pytest.raises(MemoryPlanError, match="do not fit main memory, 3.00 GB free: max_context=2"):
        PLAN.settled(small).check(small)
    with pytest.raises(MemoryPlanError, match=r"in a file .* 8.00 GB free: max_context=27"):
        long.settled(Headroom(8 * GB)).check(Headroom(8 * GB))
    with pytest.raises(MemoryPlanError, match="use a machine with more memory"):
        PLAN.settled(Headroom(2 * GB)).check(Headroom(2 * GB))


def test_what_is_free_beside_the_file_pushes_no_weights_out():
    plan = replace(PLAN, room=16 * GB)
    assert PLAN.beside(5 * GB) == 5 * GB
    assert plan.beside(None) is None
    assert plan.beside(16 * GB) == plan.cache + plan.working
    assert plan.beside(30 * GB) == 30 * GB - plan.weights


def test_a_context_that_fits_is_no_longer_than_usual(source, monkeypatch):
    monkeypatch.setattr(loader, "DEFAULT_CONTEXT", 256)
    monkeypatch.setattr(loader, "available_memory", lambda _: room(source))
    assert loader.fitting_context(source, "jax") == 256


# The file


def _never(*_, **__) -> None:
    raise AssertionError("this was not to be called")


def test_the_second_start_reads_no_model(source, monkeypatch):
    seen = []
    mapped(source, lambda done, total: seen.append(done / total))
    before = os.stat(file_of(source))
    monkeypatch.setattr(loading, "fill_on_host", _never)
    mapped(source, lambda done, total: seen.append(done / total))
    after = os.stat(file_of(source))
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert seen[-1] == 1
    assert after.st_mode & 0o777 == 0o400


def _flip(path: Path) -> None:
    os.chmod(path, 0o600)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def _other_form(path: Path) -> None:
    manifest = path.with_name(kept_weights.MANIFEST)
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "arrays": [["<f4", [1], 0]]}))


def _no_form(path: Path) -> None:
    path.with_name(kept_weights.MANIFEST).write_text("[" * 100_000)


@pytest.mark.parametrize("damage", [_flip, _cut, _other_form, _no_form])
def test_a_damaged_file_is_written_again(source, damage):
    expected = loading.load_on_host(source, {}, CPU)
    mapped(source)
    damage(file_of(source))
    assert same(mapped(source), expected)
    assert kept_weights.Manifest.read(file_of(source).parent) is not None


def test_another_model_under_the_same_name_takes_the_place(tmp_path):
    path = tmp_path / "model.gguf"
    for seed in (1, 2):
        write_random_gguf(path, SMALL, mix="f16", seed=seed)
        with open_model(path) as source:
            found = mapped(source)
            assert same(found, loading.load_on_host(source, {}, CPU))
            assert [kept for kept, _ in kept_weights.all_kept()] == [file_of(source).parent]


def _nothing_is_left(cache: Path) -> bool:
    return not list((cache / "weights").iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, ModelFileError("E_NONFINITE", "a scale is NaN")])
def test_an_end_in_the_middle_leaves_nothing(source, cache, error):
    def end(done: int, total: int) -> None:
        if done > total // 2:
            raise error

    with pytest.raises(type(error) if isinstance(error, Exception) else error):
        mapped(source, end)
    assert _nothing_is_left(cache)


def test_a_disk_that_fills_is_one_line_and_leaves_nothing(source, cache, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(MemoryPlanError, match=r"no file can be made .* E_DISK_FULL: .* QWEN3_MOE_CACHE"):
        mapped(source)
    assert _nothing_is_left(cache)


def test_a_disk_without_room_is_told_before_anything_is_written(source, cache, monkeypatch):
    real, usage = shutil.disk_usage, namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(*real(path)[:2], 65 << 20))
    plan = replace(MemoryPlan.of(source, 64, 4), room=1)
    is_full = pytest.raises(MemoryPlanError, match="E_DISK_FULL")
    with is_full, kept_weights.new_folder(source, plan, 1 << 30):
        _never()
    assert _nothing_is_left(cache)


def test_a_write_that_the_system_cuts_short_goes_on(source, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: real(file, data[: max(1, len(data) // 2)], at))
    found = mapped(source)
    monkeypatch.undo()
    assert same(found, loading.load_on_host(source, {}, CPU))


def test_no_cache_folder_or_one_in_memory_is_one_line(source, monkeypatch, tmp_path):
    monkeypatch.setenv("QWEN3_MOE_CACHE", "off")
    with pytest.raises(MemoryPlanError, match="there is no cache folder"):
        mapped(source)
    monkeypatch.setenv("QWEN3_MOE_CACHE", str(tmp_path))
    monkeypatch.setattr(kept_weights, "IN_MEMORY", (kept_weights._file_system(tmp_path),))
    with pytest.raises(MemoryPlanError, match=rf"{tmp_path}\S* is in memory itself"):
        mapped(source)


def test_two_that_write_at_once(source):
    folder = file_of(source).parent
    folder.parent.mkdir(parents=True)
    busy = pytest.raises(MemoryPlanError, match=r"another process is writing .*; wait")
    with output_folder(folder, 1), busy:
        mapped(source)


# What people are told


def test_commands_say_so(source, small_memory, monkeypatch, capsys, caplog):
    monkeypatch.setattr(estimate, "_measured", lambda: 1e10)
    prompt = ["generate", "--backend", "jax", "-c", "512", "-n", "2", "--no-gate", "hello"]
    assert cli.main(prompt) == 0
    folder = str(file_of(source).parent)
    assert caplog.text.count(f"they are written once, to {folder}, and mapped") == 1
    assert capsys.readouterr().err.count(f"weights mapped from {folder}: of 0.01 GB, 50% fit memory") == 1
    assert cli.main(prompt) == 0
    assert caplog.text.count("they are written once") == 1
    capsys.readouterr()
    monkeypatch.setattr(loader, "DEFAULT_CONTEXT", 1500)
    assert cli.main(["models", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [one["folder"] for one in report["mapped_weights"]] == [folder]
    assert report["models"][0]["why"].startswith("weights in a file")
    assert cli.main(["models"]) == 0
    shown = capsys.readouterr().out
    assert f"{folder}: mapped weights, 14.2 MB of {source.path}; delete the folder to remove them" in shown
    assert "runs, weights in a file, " in shown
    _cut(file_of(source))
    assert cli.main(["models"]) == 0
    assert f"{folder}: mapped weights, damaged, or being written; delete" in capsys.readouterr().out


def test_doctor_and_inspect_say_so(source, small_memory, monkeypatch, capsys):
    from qwen3_moe_jax.machine import probe

    monkeypatch.setattr(probe, "available_memory", lambda _: room(source))
    monkeypatch.setattr(estimate, "_measured", lambda: 1e10)
    cli.main(["doctor", "--context", "1024"])
    shown = capsys.readouterr().out
    assert "note     memory: weights 0.01 GB in a file (" in shown
    assert "a load writes the file once, 0.01 GB, to " in shown
    monkeypatch.setenv("QWEN3_MOE_CACHE", "off")
    cli.main(["doctor", "--context", "1024"])
    assert "-> QWEN3_MOE_CACHE names a folder for that file" in capsys.readouterr().out
    monkeypatch.setattr("qwen3_moe_jax.inspection.file_report.CONTEXTS", (1024,))
    assert cli.main(["inspect"]) == 0
    assert "from a file" in capsys.readouterr().out
