"""Every bad-file class ends in its error code, with bounded work and memory, also under ``python -O``.

The slow and the big ones are why the limits are here: readers of the field hang
or take gigabytes on files of 64 bytes. Work is counted in lines of Python, of
which the same file has the same number on every machine under every load.
"""

import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from qwen3_moe_jax.convert.errors import ModelFileError
from qwen3_moe_jax.convert.gguf_file import GGUFFile
from tests.convert.bad_files import ALL, ALL_VALUES, EXTRA, UPSTREAM, Case
from tests.convert.work import lines_of

ROOT = Path(__file__).resolve().parents[2]


def verdict(path: Path) -> str | None:
    """The code that opening ``path`` ends in; None if it opens."""
    try:
        with GGUFFile.open(path) as file:
            for info in file.tensors.values():
                file.read(info)
    except ModelFileError as error:
        return error.code
    return None


def allowed_lines(path: Path) -> int:
    """A few hundred for the header and the error, and what the bytes that are there are worth: at most six
    per byte, at the bytes of one key and value, were counted."""
    return 800 + 8 * path.stat().st_size


def peak_mebibytes(path: Path) -> float:
    """Peak of what Python allocates while opening."""
    tracemalloc.start()
    try:
        verdict(path)
        return tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()


def peak_resident_mebibytes(path: Path) -> float:
    """Growth of the process's peak memory; coarse, but free where tracing takes 17 s."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_mebibytes("VmRSS")
    verdict(path)
    return _status_mebibytes("VmHWM") - before


def _status_mebibytes(field: str) -> float:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) / 1024


def test_all_classes_are_here():
    assert (len(UPSTREAM), len(EXTRA)) == (34, 32)
    assert sum(case.code is not None for case in UPSTREAM.values()) == 27


@pytest.mark.parametrize(("name", "case"), ALL.items(), ids=ALL.keys())
def test_verdict_within_limits(name: str, case: Case, tmp_path: Path):
    path = tmp_path / "model.gguf"
    path.write_bytes(case.make())
    assert verdict(path) == case.code
    is_big = path.stat().st_size > 10**7  # lines per string: ``test_a_string_of_a_header_takes_few_lines``
    if not is_big:
        allowed = allowed_lines(path)
        assert lines_of(lambda: verdict(path), 2 * allowed) <= allowed
    peak = peak_resident_mebibytes if is_big else peak_mebibytes
    assert peak(path) <= case.mebibytes


def test_all_classes_under_optimization_and_a_memory_limit(tmp_path: Path):
    """``-O`` removes asserts, and a big allocation that NumPy or the system makes shows under RLIMIT_AS."""
    script = (
        "import resource, sys, pathlib\n"
        "from tests.convert.bad_files import ALL\n"
        "from tests.convert.test_gguf_bad_files import verdict\n"
        "if __debug__: sys.exit('asserts are on')\n"
        "resource.setrlimit(resource.RLIMIT_AS, (512 * 2**20,) * 2)\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "wrong = []\n"
        "for name, case in ALL.items():\n"
        "    path.write_bytes(case.make())\n"
        "    found = verdict(path)\n"
        "    if found != case.code: wrong.append((name, found))\n"
        "sys.exit(f'wrong verdicts: {wrong}' if wrong else 0)\n"
    )
    child = subprocess.run(
        [sys.executable, "-O", "-c", script, str(tmp_path / "model.gguf")],
        cwd=ROOT,
        env={"PATH": "", "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert child.returncode == 0, child.stderr


def test_values_arrive_as_written(tmp_path: Path):
    path = tmp_path / "model.gguf"
    path.write_bytes(UPSTREAM["DATA_SUCCESS"].make())
    with GGUFFile.open(path) as file:
        assert file.metadata == {
            **ALL_VALUES,
            "i32s": [-1, 2],
            "none": [],
        }
        assert [(t.name, t.shape, t.nbytes) for t in file.tensors.values()] == [
            ("a", (3, 2), 24),
            ("b", (5,), 20),
        ]
        assert file.read(file.tensors["a"]).tolist() == list(range(24))


@pytest.mark.parametrize("name", [n for n, c in ALL.items() if c.code])
def test_one_printable_line(name: str, tmp_path: Path):
    path = tmp_path / "model.gguf"
    path.write_bytes(ALL[name].make())
    with pytest.raises(ModelFileError) as caught:
        GGUFFile.open(path)
    line = str(caught.value)
    assert line.isprintable()
    assert str(path) in line
    assert len(line) < 600
