"""A writer that dies leaves nothing, or a whole checkpoint; the next one cleans up.

``scripts/check_checkpoints.py`` runs the same with many more kills, full disks
and pairs of writers.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen3_moe_jax.convert.checkpoint_writer import write_checkpoint
from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.convert.output_folder import OutputError, output_folder
from scripts.check_checkpoints import (
    begin,
    convert,
    fill_disk,
    fingerprint,
    full_disk_after,
    kill_writer,
    leftovers,
    load_everything,
    ready_writer,
    state_of,
    two_writers,
    writing_calls,
)

NUM_KILLS = 6
NUM_FULL_DISKS = 20
SECONDS_TO_WRITE = 0.25
MEMORY = Path("/dev/shm")


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """In memory where the system has such a place: these tests sync thousands of files."""
    if not MEMORY.is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)


def test_kill_at_random_moments_loses_nothing(small_gguf, small_checkpoint, tmp_path):
    seed = random.SystemRandom().randrange(2**32)
    rng = random.Random(seed)
    older = shutil.copytree(small_checkpoint, tmp_path / "older")
    before = fingerprint(older)
    for i in range(NUM_KILLS):
        out = tmp_path / "out"
        delay = rng.uniform(0, SECONDS_TO_WRITE)
        state = kill_writer(small_gguf, out, delay)
        assert state != "damaged", f"seed {seed}, kill {i} after {delay} s"
        if state != "verified":
            convert(small_gguf, out)
        assert state_of(out) == "verified"
        assert leftovers(out) == [] or state == "verified"
        shutil.rmtree(out)
    assert fingerprint(older) == before


def test_interrupt_leaves_nothing(small_gguf, tmp_path):
    seed = random.SystemRandom().randrange(2**32)
    rng = random.Random(seed)
    for _ in range(2):
        delay = rng.uniform(0, SECONDS_TO_WRITE)
        state = kill_writer(small_gguf, tmp_path / "out", delay, signal.SIGINT)
        assert state in ("absent", "verified"), f"seed {seed}: {state} after {delay} s"
        assert leftovers(tmp_path / "out") == [], f"seed {seed}: after {delay} s"
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


def test_full_disk_at_any_moment_loses_nothing(small_gguf, small_checkpoint, tmp_path):
    older = shutil.copytree(small_checkpoint, tmp_path / "older")
    before = fingerprint(older)
    out = tmp_path / "out"
    calls = writing_calls(small_gguf, out)
    assert calls > 4 * NUM_FULL_DISKS
    for i in range(NUM_FULL_DISKS):
        at = calls * i // NUM_FULL_DISKS
        assert fill_disk(small_gguf, out, at) == "E_DISK_FULL", f"operation {at} of {calls}"
        assert state_of(out) == "absent", f"operation {at} of {calls}"
    assert fingerprint(older) == before
    convert(small_gguf, out)
    load_everything(out)


def test_full_disk_at_the_last_sync_leaves_a_whole_checkpoint(small_gguf, tmp_path):
    """Only the sync of the parent comes after the rename: what is there then is whole."""
    out = tmp_path / "out"
    calls = writing_calls(small_gguf, out)
    assert fill_disk(small_gguf, out, calls - 1) == "E_DISK_FULL"
    assert state_of(out) == "verified"
    assert leftovers(out) == []


def test_every_file_and_folder_is_synced_before_the_rename(small_gguf, tmp_path, monkeypatch):
    synced, renamed = [], []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(descriptor):
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real_fsync(descriptor)

    def rename(source, target, *args, **kwargs):
        if str(target) == str(tmp_path / "out"):
            renamed.append((str(source), len(synced)))
        real_rename(source, target, *args, **kwargs)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    convert(small_gguf, tmp_path / "out")
    ((temporary, before_rename),) = renamed
    wanted = {temporary + str(f)[len(str(tmp_path / "out")) :] for f in (tmp_path / "out").rglob("*")}
    assert wanted | {temporary} <= set(synced[:before_rename])
    assert synced[before_rename:] == [str(tmp_path)]


def test_write_that_fails_for_another_reason_is_one_clear_error(small_gguf, tmp_path):
    """A limit on file size stands for a failing disk: the process ends with one line, and nothing is left."""
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
        "from qwen3_moe_jax.cli import main; sys.exit(main(['convert', *sys.argv[1:]]))"
    )
    command = [sys.executable, "-c", program, small_gguf, tmp_path / "out"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 6, result.stderr
    assert result.stderr.startswith("qwen3-moe: convert: E_OUTPUT: cannot write")
    assert result.stderr.count("\n") == 1, result.stderr
    assert list(tmp_path.iterdir()) == []


def test_second_writer_says_that_it_is_busy(small_gguf, tmp_path):
    out = tmp_path / "out"
    codes, state = two_writers(small_gguf, out)
    assert codes == [0, 4] or codes == [0, 5]
    assert state == "verified"
    assert leftovers(out) == []


def test_writer_is_busy_while_another_process_writes(small_gguf, tmp_path):
    out = tmp_path / "out"
    other = ready_writer(small_gguf, out)
    with output_folder(out, 1) as folder:
        (folder / "file").write_text("x")
        begin(other)
        assert other.wait() == 4
    assert [p.name for p in out.iterdir()] == ["file"]


def test_leftovers_of_killed_writers_are_removed_and_nothing_else(small_gguf, tmp_path):
    digits = "0123456789abcdef"
    stale = tmp_path / f".out.tmp-{digits}"
    (stale / "tensors").mkdir(parents=True)
    (tmp_path / ".out.lock").touch()
    kept = [f".out.tmp-{digits}x", f".out2.tmp-{digits}", f"out.tmp-{digits}", f"..out.tmp-{digits}"]
    for name in kept:
        (tmp_path / name).mkdir()
    convert(small_gguf, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*kept, "out"])


def test_stale_folder_that_is_a_link_is_removed_without_its_target(small_gguf, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("keep")
    (tmp_path / ".out.tmp-0123456789abcdef").symlink_to(tmp_path / "precious")
    convert(small_gguf, tmp_path / "out")
    assert (tmp_path / "precious" / "file").read_text() == "keep"
    assert not os.path.lexists(tmp_path / ".out.tmp-0123456789abcdef")


def test_existing_checkpoint_is_never_touched(small_gguf, small_checkpoint, tmp_path):
    out = shutil.copytree(small_checkpoint, tmp_path / "out")
    before = fingerprint(out)
    with open_model(small_gguf) as source, pytest.raises(OutputError, match="E_EXISTS"):
        write_checkpoint(source, out)
    assert fingerprint(out) == before


def test_folder_that_is_filled_meanwhile_is_kept(small_gguf, tmp_path):
    out = tmp_path / "out"

    def write() -> None:
        with output_folder(out, 1) as folder:
            (folder / "file").write_text("x")
            out.mkdir()
            (out / "mine").write_text("keep")

    with pytest.raises(OutputError, match="E_EXISTS"):
        write()
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "mine"]


def test_injection_reaches_orbax(small_gguf, tmp_path):
    """The injected full disk is one that orbax sees too, not only this project's own calls."""
    with full_disk_after(tmp_path, 4), pytest.raises(OutputError) as caught:
        convert(small_gguf, tmp_path / "out")
    frames, error = [], caught.value.__cause__
    while error is not None:
        traceback = error.__traceback__
        while traceback is not None:
            frames.append(traceback.tb_frame.f_code.co_filename)
            traceback = traceback.tb_next
        error = error.__cause__
    assert any("orbax" in name for name in frames)
