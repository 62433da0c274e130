"""No file is too long to be read in one go: 450 lines at most, whatever language."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("convert", "kernels_pallas", "qwen3_moe_jax", "scripts", "tests", "docs/examples")
SOURCES = {".py", ".sh", ".c", ".h", ".wgsl", ".js", ".css"}
MAX_LINES = 450


def sources(folder: Path) -> list[Path]:
    """Files of source code; ``rglob`` does not follow the package's links to other folders."""
    return [path for path in folder.rglob("*") if path.suffix in SOURCES and path.is_file()]


def too_long(folders: list[Path]) -> list[str]:
    found = [path for folder in folders for path in sources(folder)]
    lengths = {path: path.read_bytes().count(b"\n") for path in found}
    return [f"{path}: {n} lines, not {MAX_LINES}" for path, n in lengths.items() if n > MAX_LINES]


@pytest.mark.smoke
def test_no_file_is_too_long():
    folders = [ROOT / folder for folder in FOLDERS]
    assert all(sources(folder) for folder in folders)
    assert not too_long(folders), "\n".join(too_long(folders))


@pytest.mark.parametrize(("lines", "count"), [(MAX_LINES, 0), (MAX_LINES + 1, 1)])
def test_a_file_that_is_too_long_is_named(tmp_path, lines, count):
    (tmp_path / "x.py").write_text("\n" * lines)
    assert len(too_long([tmp_path])) == count
