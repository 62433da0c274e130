"""``scripts.decode_phases`` on a page of instructions with known samples."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from qwen3_moe_jax.machine.child_environment import child_environment

PHASES = 8  # of the kernel for one sequence
REASONS = ("stall_barrier", "stall_long_sb", "stall_wait")


def page(path: Path, phases: int) -> Path:
    """In each phase 10 samples of polling, 20 of the barrier behind it, 30 + i for memory, 5 to signal."""
    lines = []
    for i in range(phases):
        lines += [
            ("LDG.E.STRONG.GPU R1, [R2]", 0, 4, 0),
            ("ISETP.GE P0, R1, R3", 0, 6, 0),
            ("CCTL.IVALL", 0, 0, 0),
            ("BAR.SYNC R6, 0x80", 0, 0, 0),
            ("LDS R4, [R5]", 20, 0, 0),
            *[("IADD3 R1, R1, R2, RZ", 0, 0, 0)] * 60,
            ("IMMA R4, R5, R6, RZ", 3, 30 + i, 0),
            ("REDG.E.ADD.STRONG.GPU [R2], R3", 0, 0, 5),
        ]
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["Kernel Name", "k"])
        out.writerow(["Address", "Source", "# Samples", *REASONS, *(f"{r} (Not Issued)" for r in REASONS)])
        for address, (source, *counts) in enumerate(lines):
            out.writerow([hex(address), source, sum(counts), *counts, *counts])
    return path


def run(path: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "scripts.decode_phases", str(path), "--us", "592", "--layers", "2"]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=child_environment())


def test_samples_become_microseconds_of_phases(tmp_path):
    result = run(page(tmp_path / "page.csv", PHASES))
    assert result.returncode == 0, result.stderr
    out = json.loads(result.stdout.splitlines()[-1])
    assert out["samples"] == sum(68 + i for i in range(PHASES)) == 572
    each = 592 / 572
    for i, phase in enumerate(out["phases"]):
        times = 1 if phase["phase"] == "lm_head" else 2
        assert phase["per"] == ("token" if times == 1 else "layer")
        assert phase["us"] == pytest.approx((68 + i) * each / times, abs=0.01)
        assert phase["us_waiting"] == pytest.approx(30 * each / times, abs=0.01)
        assert phase["reasons_us"]["long_sb"] == pytest.approx((30 + i) * each / times, abs=0.01)
        assert phase["reasons_us"]["barrier"] == pytest.approx(3 * each / times, abs=0.01)
    assert out["us_per_layer"] == pytest.approx(sum((68 + i) * each / 2 for i in range(PHASES - 1)), abs=0.05)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path, "No such file"),
        (lambda path: path.write_text("a,b\n1,2\n") and path, "no instructions"),
        (lambda path: page(path, 3), "3 phases"),
    ],
)
def test_another_page_ends_in_one_line(tmp_path, make, words):
    result = run(make(tmp_path / "page.csv"))
    assert result.returncode == 1
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1
