"""A file that is cut, before or while it is read, ends in an error and never in a signal."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen3_moe_jax.convert.errors import ModelFileError
from qwen3_moe_jax.convert.gguf_file import GGUFFile
from qwen3_moe_jax.testing.gguf_builder import GGUFBuilder, Tensor, model_builder

ROOT = Path(__file__).resolve().parents[2]
RUNS = 100


def small_file() -> GGUFBuilder:
    tensors = [Tensor("a", (3, 5)), Tensor("b", (2, 256), 12), Tensor("c", (7,))]
    return GGUFBuilder({"key": ["text", "é"], "n": 3}, tensors)


def opens(path: Path, **options: bool) -> bool:
    try:
        GGUFFile.open(path, **options).close()
    except ModelFileError as error:
        if error.code != "E_SHORT_READ":
            raise
        return False
    return True


def test_cut_at_every_byte(tmp_path: Path):
    content = small_file().build()
    path = tmp_path / "model.gguf"
    for size in range(len(content) + 1):
        path.write_bytes(content[:size])
        assert opens(path) == (size == len(content)), size


def test_only_tail_padding_may_be_missing(tmp_path: Path):
    builder = small_file()
    content = builder.build()
    padding = len(content) - len(GGUFBuilder(builder.metadata, builder.tensors, tail_padding=False).build())
    assert padding == 4
    path = tmp_path / "model.gguf"
    for size in range(len(content) + 1):
        path.write_bytes(content[:size])
        assert opens(path, allow_missing_tail_padding=True) == (size >= len(content) - padding), size


def test_model_cut_around_every_tensor(tmp_path: Path):
    path = tmp_path / "model.gguf"
    path.write_bytes(model_builder().build())
    with GGUFFile.open(path) as file:
        edges = sorted(
            {t.offset for t in file.tensors.values()} | {t.offset + t.nbytes for t in file.tensors.values()}
        )
    size = path.stat().st_size
    for cut in sorted({e + d for e in edges for d in (-1, 0, 1) if e + d < size}, reverse=True):
        os.truncate(path, cut)
        assert not opens(path), cut


# Truncates the file just before a chosen read of a load, at a chosen size; every load must
# end in ModelFileError. Reads are counted on a sound load first, so the last one is hit too.
_CHILD = """
import os, pathlib, sys
from qwen3_moe_jax.convert.errors import ModelFileError
from qwen3_moe_jax.convert.gguf_file import GGUFFile
from qwen3_moe_jax.testing.gguf_builder import model_builder

path = pathlib.Path(sys.argv[1])
content = model_builder().build()
whole, calls, cut = os.preadv, 0, None

def counted(fd, buffers, offset):
    global calls
    if cut and calls == cut[0]:
        os.truncate(path, cut[1])
    calls += 1
    return whole(fd, buffers, offset)

def load():
    global calls
    calls = 0
    with GGUFFile.open(path) as file:
        for info in file.tensors.values():
            file.read(info)

os.preadv = counted
path.write_bytes(content)
load()
total, runs, codes = calls, int(sys.argv[2]), set()
for run in range(runs):
    path.write_bytes(content)
    cut = (run % total, len(content) * (run * 37 % runs) // runs)
    try:
        load()
    except ModelFileError as error:
        codes.add(error.code)
    else:
        sys.exit(f"loaded although cut to {cut[1]} bytes before read {cut[0]}")
print(total, *sorted(codes))
"""


def test_truncated_while_loading(tmp_path: Path):
    child = subprocess.run(
        [sys.executable, "-c", _CHILD, str(tmp_path / "model.gguf"), str(RUNS)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert child.returncode == 0, child.stderr  # negative: a signal
    reads, *codes = child.stdout.split()
    assert int(reads) < RUNS, "some reads were never hit"
    assert codes == ["E_CHANGED", "E_SHORT_READ"]


def loaded_after(path: Path, change: Callable[[], object]) -> ModelFileError:
    with GGUFFile.open(path) as file:
        change()
        with pytest.raises(ModelFileError) as caught:
            file.read(file.tensors["b"])
    return caught.value


def test_cut_while_loading_says_how_long_the_file_was(tmp_path: Path):
    path = tmp_path / "model.gguf"
    path.write_bytes(small_file().build())
    size = path.stat().st_size
    error = loaded_after(path, lambda: os.truncate(path, 200))
    assert error.code == "E_SHORT_READ"
    assert f"it had {size} bytes" in str(error)


def test_grown_while_loading(tmp_path: Path):
    path = tmp_path / "model.gguf"
    path.write_bytes(small_file().build())

    def grow() -> None:
        with path.open("ab") as file:
            file.write(b"more")

    assert loaded_after(path, grow).code == "E_CHANGED"


def test_rewritten_while_loading(tmp_path: Path):
    """Other bytes in a file of the same size show in its time stamp."""
    path = tmp_path / "model.gguf"
    path.write_bytes(small_file().build())
    error = loaded_after(path, lambda: os.utime(path, ns=(1, 1)))
    assert error.code == "E_CHANGED"
    assert str(path) in str(error)


def test_changed_while_the_header_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "model.gguf"
    path.write_bytes(small_file().build())
    whole = os.preadv

    def touch_and_read(fd: int, buffers: list[memoryview], offset: int) -> int:
        os.utime(path, ns=(1, 1))
        return whole(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", touch_and_read)
    with pytest.raises(ModelFileError, match="E_CHANGED"):
        GGUFFile.open(path)


def test_replaced_by_rename_is_no_change(tmp_path: Path):
    """An open file keeps its bytes when another one takes its name, as downloaders do."""
    path = tmp_path / "model.gguf"
    path.write_bytes(small_file().build())
    with GGUFFile.open(path) as file:
        (tmp_path / "new").write_bytes(b"other")
        (tmp_path / "new").rename(path)
        assert len(file.read(file.tensors["b"])) == 288
