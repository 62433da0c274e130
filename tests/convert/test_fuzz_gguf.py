"""20,000 mutated files with a new seed each time: no crash, no hang, one exception type."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qwen3_moe_jax.machine.child_environment import child_environment


def fuzz(*options: str) -> tuple[int, str, dict]:
    command = [sys.executable, "-m", "scripts.fuzz_gguf", *options]
    child = subprocess.run(command, capture_output=True, text=True, timeout=800, env=child_environment())
    return child.returncode, child.stdout, json.loads(child.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "options", [("--count", "15000"), ("--count", "5000", "--optimize")], ids=["plain", "-O"]
)
def test_mutants(options: tuple[str, ...]):
    code, output, summary = fuzz(*options)
    print(f"seed {summary['seed']}")
    failures = [summary[kind] for kind in ("crashes", "hangs", "other_exceptions")]
    assert (code, failures) == (0, [0, 0, 0]), output


def test_mutants_reach_every_check():
    """A fuzzer whose mutants all die at the first check would prove nothing."""
    endings = fuzz("--count", "6000", "--seed", "1")[2]["endings"]
    wanted = {"sound", "E_MAGIC", "E_VERSION", "E_METADATA", "E_TENSOR", "E_QTYPE", "E_SHORT_READ", "E_SPLIT"}
    wanted |= {f"opened, then E_{part}" for part in ("ARCH", "QTYPE", "HPARAM", "TENSOR", "TOKENIZER")}
    assert wanted <= endings.keys()


def test_a_mutant_depends_on_seed_and_number_alone(tmp_path: Path):
    kept = tmp_path / "kept.gguf"
    fuzz("--seed", "3", "--count", "8", "--keep", str(kept))
    eighth = kept.read_bytes()
    fuzz("--seed", "3", "--first", "7", "--count", "1", "--keep", str(kept))
    assert kept.read_bytes() == eighth
