"""What scripts.compile_kernels reads from ptxas, says without a compiler, and counts as grown."""

import json

import jax
import pytest

if jax.__version_info__ < (0, 11):
    pytest.skip("the GPU kernels need JAX 0.11", allow_module_level=True)

from scripts import compile_kernels

ROW = {"target": "sm_89", "preset": "p", "kernels": "portable", "batch": 1}
PTXAS = """
ptxas info    : Compiling entry function 'k' for 'sm_89'
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 16 barriers, 1 bytes smem
"""


def test_registers_and_spills_are_read_from_ptxas():
    assert compile_kernels.ptxas_report(PTXAS) == {"registers": 255, "spilled": 12}
    assert compile_kernels.ptxas_report("") == {"registers": 0, "spilled": 0}


def test_what_has_grown_is_named(tmp_path):
    old = tmp_path / "old.json"
    old.write_text(json.dumps({"kernels": [ROW | {"registers": 200, "spilled": 0, "shared_memory": 1024}]}))
    same = ROW | {"registers": 200, "spilled": 0, "shared_memory": 1000}
    assert compile_kernels.grown([same], old) == []
    assert compile_kernels.grown([same | {"spilled": 8}], old) == ["sm_89 batch 1: spilled 8, before 0"]


def test_without_a_compiler_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(compile_kernels.shutil, "which", lambda name: None)
    monkeypatch.setattr(compile_kernels.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr("sys.argv", ["compile_kernels"])
    compile_kernels.main()
    assert "SKIPPED: compiling for GPUs needs ptxas" in capsys.readouterr().out
