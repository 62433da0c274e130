"""Files that commands write: their names, their places, and what a full disk leaves."""

import errno
import json

import numpy as np
import pytest

from qwen3_moe_jax import loader
from qwen3_moe_jax.cli import main
from qwen3_moe_jax.core.errors import OutputFileError
from qwen3_moe_jax.core.exit_codes import ExitCode
from qwen3_moe_jax.core.output_file import open_output, save_arrays
from qwen3_moe_jax.inspection.experts import ExpertUsage

QUICK = ("--backend", "reference", "--no-gate", "-q")


def test_a_payload_has_the_name_that_was_given(tmp_path, capsys):
    path = tmp_path / "foo"
    assert main(["trace", "x = 1", "--stage", "l_out", "--payload", str(path), *QUICK]) == 0
    assert capsys.readouterr().out.endswith(f"arrays: {path}\n")
    assert [p.name for p in tmp_path.iterdir()] == ["foo"]
    with np.load(path) as arrays:
        assert "l_out-0" in arrays


@pytest.mark.parametrize("content", ["file in it", "a file"])
def test_convert_to_what_is_there_has_its_own_exit_code(tmp_path, capsys, content):
    """And not the code that means memory elsewhere; what is there stays."""
    target = tmp_path / "out"
    kept = target / "kept" if content == "file in it" else target
    kept.parent.mkdir(exist_ok=True)
    kept.write_bytes(b"mine")
    assert main(["convert", str(loader.embedded_model()), str(target), "-q"]) == ExitCode.NOT_EMPTY == 5
    line = capsys.readouterr().err
    assert line.startswith("qwen3-moe: convert: E_EXISTS: ")
    assert line.count("\n") == 1
    assert kept.read_bytes() == b"mine"


def test_a_deleted_working_folder_is_refused_before_the_load(tmp_path, monkeypatch):
    from qwen3_moe_jax.core.output_file import check_output

    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(OSError, match="^x.npz cannot be written: No such file or directory"):
        check_output("x.npz")
    assert check_output(tmp_path / "x.npz")


def test_a_full_disk_is_reported_for_each_file(capsys):
    assert main(["trace", "x = 1", "--stage", "l_out", "--payload", "/dev/full", *QUICK]) == ExitCode.OUTPUT
    expected = "qwen3-moe: /dev/full cannot be written: No space left on device\n"
    assert capsys.readouterr().err == expected
    assert main(["experts", "x = 1", "--json", "--npz", "/dev/full", *QUICK]) == ExitCode.OUTPUT
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".pdf", b"%PDF"), (".PNG", b"\x89PNG")])
def test_a_picture_is_what_its_name_says(suffix, start, tmp_path):
    usage = ExpertUsage(np.ones((2, 8), np.int64), 4, 4, "a\nb\x1b", "\udcff")
    usage.save_picture(tmp_path / f"x{suffix}")
    assert (tmp_path / f"x{suffix}").read_bytes().startswith(start)
    with pytest.raises(OutputFileError, match="must end with"):
        usage.save_picture(tmp_path / "x.bmp")


def test_json_writes_no_picture_unasked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["experts", "x = 1", "--json", *QUICK]) == 0
    assert json.loads(capsys.readouterr().out)["picture"] is None
    assert list(tmp_path.iterdir()) == []


def test_what_was_there_survives_a_failed_write(tmp_path):
    path = tmp_path / "kept"
    path.write_text("old")

    def broken(path):
        with open_output(path) as file:
            file.write(b"new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        broken(path)
    assert path.read_text() == "old"
    link = tmp_path / "link"
    link.symlink_to(path)
    save_arrays(link, a=np.zeros(1))
    assert link.is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kept", "link"]


def test_a_name_as_long_as_the_system_allows_is_written(tmp_path):
    path = tmp_path / ("n" * 255)
    with open_output(path) as file:
        file.write(b"all")
    assert path.read_bytes() == b"all"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_file_that_is_mounted_is_written_over(tmp_path, monkeypatch):
    """As a container's file is: nothing can be renamed to its name."""
    path = tmp_path / "mounted"
    path.write_bytes(b"before, and longer")

    def busy(*_):
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr("qwen3_moe_jax.core.output_file.os.replace", busy)
    with open_output(path) as file:
        file.write(b"after")
    assert path.read_bytes() == b"after"
    assert [p.name for p in tmp_path.iterdir()] == ["mounted"]
