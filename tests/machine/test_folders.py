"""Machines without a home, without room, with folders of somebody else: everything runs, one line is said."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qwen3_moe_jax.machine import folders
from qwen3_moe_jax.machine.remembered import remember, remembered


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    folders._said.clear()
    for name in (folders.CACHE_VARIABLE, "XDG_CACHE_HOME", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert folders.cache_folder() == tmp_path / ".cache/qwen3_moe_jax"
    assert folders.state_folder() == tmp_path / ".local/state/qwen3_moe_jax"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert folders.cache_folder() == tmp_path / "x/qwen3_moe_jax"
    monkeypatch.setenv(folders.CACHE_VARIABLE, "~/mine")
    assert folders.cache_folder() == tmp_path / "mine"
    assert folders.writable_cache("xla") == tmp_path / "mine/xla"
    assert (tmp_path / "mine/xla").is_dir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(folders.CACHE_VARIABLE, "here")
    assert folders.cache_folder() == tmp_path / "here"


def test_off_keeps_nothing_and_says_nothing(monkeypatch, caplog):
    monkeypatch.setenv(folders.CACHE_VARIABLE, "off")
    assert folders.writable_cache("xla") is None
    assert not caplog.records


def test_no_home(monkeypatch, caplog, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a number without an entry
    assert folders.cache_folder() is None
    assert folders.state_folder() is None
    assert folders.writable_cache("xla") is folders.writable_cache("gates") is None
    assert len(caplog.records) == 1
    assert "there is no home folder" in caplog.text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["file", "read-only", "full"])
def test_a_folder_that_cannot_be_used_is_one_line(monkeypatch, caplog, tmp_path, kind):
    place = tmp_path / "cache"
    monkeypatch.setenv(folders.CACHE_VARIABLE, str(place))
    if kind == "file":
        place.write_text("")
    if kind == "read-only":
        monkeypatch.setattr(Path, "mkdir", _refuse)
    if kind == "full":
        usage = shutil.disk_usage(tmp_path)._replace(free=1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    assert folders.writable_cache("xla") is None
    assert folders.writable_cache() is None
    assert len(caplog.records) == 1
    assert folders.CACHE_VARIABLE in caplog.text
    assert "\n" not in caplog.records[0].getMessage()


def _refuse(*args, **kwargs):
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize("kind", ["read-only", "full"])
def test_what_is_there_is_read_though_nothing_can_be_written(monkeypatch, caplog, tmp_path, kind):
    (tmp_path / "xla").mkdir()
    (tmp_path / "xla/program").write_text("")
    monkeypatch.setenv(folders.CACHE_VARIABLE, str(tmp_path))
    if kind == "read-only":
        monkeypatch.setattr(folders.tempfile, "TemporaryFile", _refuse)
    if kind == "full":
        usage = shutil.disk_usage(tmp_path)._replace(free=1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    assert folders.writable_cache("xla") is None
    assert folders.readable_cache("xla") == tmp_path / "xla"
    assert folders.readable_cache("empty") is None
    (record,) = caplog.records
    assert "can only be read (" in record.getMessage()


def test_a_list_that_a_full_disk_cut_leaves_no_file(monkeypatch, tmp_path):
    remember(tmp_path / "gates.json", "first")
    monkeypatch.setattr(os, "replace", _refuse)
    remember(tmp_path / "gates.json", "second")
    assert {path.name for path in tmp_path.iterdir()} <= {"gates.json", "gates.json.lock"}
    assert remembered(tmp_path / "gates.json") == ["first"]


STRANGER = """
import os, posixpath, sys
os.environ.pop("HOME", None)
posixpath.expanduser = lambda path: path  # a number that no entry names has no home
from qwen3_moe_jax import cli
sys.exit(cli.main(sys.argv[1:]))
"""


def generate(cwd: Path, *options: str, **environment: str):
    """Text of a user without a home; lines of progress are left out."""
    root = Path(folders.__file__).parents[2]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMP")}
    command = ["generate", "def f", "-n", "3", "-q", "--temperature", "0", "--context", "64", *options]
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, *command],
        env={**inherited, "PYTHONPATH": str(root), **environment},
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    return [line for line in done.stderr.splitlines() if not line.startswith("loading")]


@pytest.mark.parametrize("cache", ["no home", "below a file", "foreign"])
def test_a_user_without_a_home_or_a_folder_gets_text_and_one_line(cache, tmp_path):
    (tmp_path / "file").write_text("")
    places = {"no home": {}, "below a file": {"XDG_CACHE_HOME": f"{tmp_path}/file"}}
    (line,) = generate(tmp_path, "--backend", "reference", **places.get(cache, {"XDG_CACHE_HOME": "/proc"}))
    assert line.startswith("no cache (")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_jax_too_says_one_line(tmp_path):
    (line,) = generate(tmp_path, "--backend", "jax", "--no-gate")
    assert line.startswith("no cache (there is no home folder)")


def test_jaxs_own_cache_that_cannot_be_written_is_one_line_of_ours(tmp_path):
    settings = {"JAX_COMPILATION_CACHE_DIR": "/proc/no", "QWEN3_MOE_CACHE": "off"}
    (line,) = generate(tmp_path, "--backend", "jax", "--no-gate", **settings)
    assert line.startswith("the cache folder /proc/no cannot be used (")
