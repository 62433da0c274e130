"""``qwen3-moe convert``: what it says, and what it leaves behind."""

import errno
import os
from collections import namedtuple

import pytest

from qwen3_moe_jax.cli import main
from qwen3_moe_jax.convert.output_folder import OutputError, output_folder
from qwen3_moe_jax.testing.random_models import write_random_gguf
from tests.convert.checkpoints import load_everything


def run(capsys: pytest.CaptureFixture, *argv: object) -> tuple[int, str]:
    code = main(["convert", *map(str, argv)])
    return code, capsys.readouterr().err


def test_command_converts(small_gguf, tmp_path, capsys):
    assert main(["convert", str(small_gguf), str(tmp_path / "out")]) == 0
    assert "MB in" in capsys.readouterr().out
    load_everything(tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_command_refuses_what_is_there(small_gguf, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    (tmp_path / "file").write_text("keep")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("full", "file", "link"):
        code, err = run(capsys, small_gguf, tmp_path / name)
        assert (code, "E_EXISTS" in err, err.count("\n")) == (5, True, 1)
    assert (tmp_path / "full" / "mine.txt").read_text() == (tmp_path / "file").read_text() == "keep"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "full", "link"]


def test_command_fills_an_empty_folder(small_gguf, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    assert run(capsys, small_gguf, f"{tmp_path}/out/")[0] == 0
    load_everything(tmp_path / "out")


def test_command_needs_the_model_and_the_parent_folder(small_gguf, tmp_path, capsys):
    code, err = run(capsys, tmp_path / "absent.gguf", tmp_path / "out")
    assert (code, "E_OPEN" in err, err.count("\n")) == (1, True, 1)
    code, err = run(capsys, small_gguf, tmp_path / "absent" / "out")
    assert (code, "there is no folder" in err, err.count("\n")) == (6, True, 1)
    assert list(tmp_path.iterdir()) == []


def test_command_refuses_a_type_that_is_not_supported(small_gguf, tmp_path, capsys):
    model = tmp_path / "model.gguf"
    data = small_gguf.read_bytes()
    name = b"output_norm.weight"
    at = data.index(name) + len(name) + 4 + 8
    model.write_bytes(data[:at] + (24).to_bytes(4, "little") + data[at + 4 :])
    code, err = run(capsys, model, tmp_path / "out")
    assert (code, err.count("\n")) == (1, 1)
    assert not (tmp_path / "out").exists()


def test_command_says_that_the_disk_is_too_small(small_gguf, tmp_path, capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(
        "qwen3_moe_jax.convert.output_folder.shutil.disk_usage", lambda _: usage(0, 0, 1_000_000)
    )
    code, err = run(capsys, small_gguf, tmp_path / "out")
    assert (code, "E_DISK_FULL" in err, "1000000 free" in err) == (6, True, True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_command_says_that_the_disk_is_read_only(small_gguf, tmp_path, capsys, monkeypatch, number):
    real = os.open

    def read_only(path, flags, *args, **kwargs):
        if flags & os.O_CREAT and str(tmp_path) in str(path):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", read_only)
    code, err = run(capsys, small_gguf, tmp_path / "out")
    assert (code, "E_READ_ONLY" in err) == (6, True)
    assert list(tmp_path.iterdir()) == []


def test_command_refuses_a_nan_and_leaves_nothing(tmp_path, small_config, capsys):
    model = tmp_path / "model.gguf"
    write_random_gguf(model, small_config, mix="f32")
    size = model.stat().st_size
    with open(model, "r+b") as file:
        file.seek(size - 4)
        file.write(b"\x00\x00\xc0\x7f")
    code, err = run(capsys, model, tmp_path / "out")
    assert (code, "E_NONFINITE" in err, "row 271, column 255" in err) == (1, True, True)
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]


def test_lock_is_held_until_the_end(tmp_path):
    with output_folder(tmp_path / "out", 1) as folder:
        (folder / "file").write_text("x")
        with pytest.raises(OutputError, match="E_BUSY"), output_folder(tmp_path / "out", 1):
            pytest.fail("two writers")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
