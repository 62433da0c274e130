"""Checks that passed: remembered where it can be done, and nobody is stopped where it cannot."""

import json
import os
import subprocess
import sys
import time

import pytest

from qwen3_moe_jax.machine import remembered as module
from qwen3_moe_jax.machine.remembered import MAX_REMEMBERED, remember, remembered


def test_keys_come_back_and_the_oldest_go(tmp_path):
    path = tmp_path / "new" / "keys.json"
    for number in range(3):
        remember(path, f"{number}")
    assert remembered(path) == ["0", "1", "2"]
    path.write_text(json.dumps([f"{n}" for n in range(MAX_REMEMBERED)]))
    remember(path, "last")
    assert len(remembered(path)) == MAX_REMEMBERED
    assert remembered(path)[-1] == "last"


def a_pipe(path):
    os.mkfifo(path)


def a_folder(path):
    path.mkdir()


def a_huge_file(path):
    with open(path, "wb") as file:
        file.truncate(1 << 40)


def nested(path):
    path.write_text("[" * 100_000)


def no_utf_8(path):
    path.write_bytes(b"\xff\xfe")


def other_json(path):
    path.write_text('{"a": [1, 2]}')


@pytest.mark.parametrize("plant", [a_pipe, a_folder, a_huge_file, nested, no_utf_8, other_json])
def test_what_is_no_list_of_keys_is_empty(tmp_path, plant):
    plant(tmp_path / "keys.json")
    assert remembered(tmp_path / "keys.json") == []
    remember(tmp_path / "keys.json", "a")  # a folder stays; the others are replaced
    assert remembered(tmp_path / "keys.json") in (["a"], [])


def test_a_place_that_cannot_be_written_is_no_fault(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    remember(tmp_path / "file" / "keys.json", "a")
    assert remembered(tmp_path / "file" / "keys.json") == []


WRITER = """
import sys
from pathlib import Path
from qwen3_moe_jax.machine.remembered import remember
print("ready", flush=True)
sys.stdin.readline()
for number in range(150):
    remember(Path(sys.argv[1]), f"{sys.argv[2]}{number}")
"""


def test_processes_that_write_at_once_lose_no_key(tmp_path):
    path, names = tmp_path / "keys.json", ("a", "b", "c")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), name], **pipes) for name in names]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("\n")
        writer.stdin.close()
    assert [writer.wait() for writer in writers] == [0] * len(names)
    for writer in writers:
        writer.stdout.close()
    assert sorted(remembered(path)) == sorted(f"{name}{number}" for name in names for number in range(150))


def test_a_process_that_is_stopped_in_its_turn_keeps_nobody(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    path = tmp_path / "keys.json"
    monkeypatch.setattr(module, "SECONDS_FOR_A_TURN", 0.05)
    with open(tmp_path / "keys.json.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        remember(path, "a")
    assert remembered(path) == ["a"]


def test_a_system_without_locks_remembers(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", None)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waits for a lock that there is not"))
    remember(tmp_path / "keys.json", "a")
    remember(tmp_path / "keys.json", "b")
    assert remembered(tmp_path / "keys.json") == ["a", "b"]


def test_a_place_whose_files_cannot_be_locked_remembers_at_once(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def flock(file, how):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waits for a lock that there is not"))
    remember(tmp_path / "keys.json", "a")
    assert remembered(tmp_path / "keys.json") == ["a"]
