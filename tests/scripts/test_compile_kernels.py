"""What scripts.compile_kernels reads from ptxas, says without a compiler, remembers, and counts as grown."""

import json
import sys

import jax
import pytest

if jax.__version_info__ < (0, 11):
    pytest.skip("the GPU kernels need JAX 0.11", allow_module_level=True)

from qwen3_moe_jax.kernels_pallas.gpu import cards
from scripts import _absent_gpu, compile_kernels

KEY = {"target": "sm_89", "card": "c", "kernel": "decode_step portable", "preset": "p", "batch": 1}
ROW = KEY | {"blocks": 128, "registers": 255, "spilled": 0, "shared_memory": 80_000, "limit": 101_376}
PTXAS = """
ptxas info    : Compiling entry function 'k' for 'sm_89'
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 16 barriers, 1 bytes smem
"""


def test_registers_and_spills_are_read_from_ptxas():
    assert _absent_gpu.ptxas_report(PTXAS) == {"registers": 255, "spilled": 12}
    assert _absent_gpu.ptxas_report("") == {"registers": 0, "spilled": 0}


def test_what_has_grown_is_named():
    grown = lambda row: compile_kernels.grown([row], [ROW])
    assert grown(ROW | {"registers": 200}) == []
    name = "sm_89 decode_step portable batch 1 of p"
    assert grown(ROW | {"spilled": 8}) == [f"{name}: spilled 8, before 0"]
    assert grown(ROW | {"shared_memory": 80_001}) == [f"{name}: shared_memory 80001, before 80000"]
    assert grown(KEY | {"skipped": "takes kernels of 2"}) == [f"{name}: takes kernels of 2, before it fitted"]
    assert "no limit" in grown(ROW | {"batch": 2})[0]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, ""),
        ({"registers": 0}, "reported nothing"),
        ({"spilled": 400}, "spills 400"),
        ({"shared_memory": 110_000}, "takes 110000 of 101376"),
        ({"registers": 128, "shared_memory": 40_000}, "2 blocks fit"),
    ],
)
def test_faults_of_a_kernel(change, fault):
    found = compile_kernels.faults_of(ROW | change)
    assert (fault in found[0]) if fault else not found


def test_what_was_compiled_is_remembered_until_a_source_changes(monkeypatch, tmp_path):
    monkeypatch.setenv("QWEN3_MOE_CACHE", str(tmp_path))
    calls = []
    monkeypatch.setattr(compile_kernels, "compiled", lambda target, row: calls.append(row) or ROW)
    target = cards.capabilities()["8.9"]
    for version in ("a", "a", "b"):
        assert compile_kernels.remembered(target, KEY, version) == ROW
    assert len(calls) == 2


def test_every_kernel_of_a_set_is_compiled(monkeypatch):
    rows = list(compile_kernels.wanted(cards.capabilities()["9.0"], ["Qwen3-30B-A3B"], [1]))
    for kernels in ("hopper", "portable"):
        mine = [row["kernel"].split()[0] for row in rows if kernels in row["kernel"]]
        assert mine == ["decode_step"] * 2 + ["grouped_matmul"] * 9 + ["attention"] * 2
    monkeypatch.setattr(compile_kernels._prompt_kernels, "compiled", lambda target, row: row | {"blocks": 1})
    prompts = next(row for row in rows if row["kernel"].startswith("grouped_matmul"))
    assert compile_kernels.compiled(cards.capabilities()["8.9"], prompts)["blocks"] == 1


def test_an_int8_cache_is_compiled_for_one_sequence():
    rows = list(compile_kernels.wanted(cards.capabilities()["8.9"], ["Qwen3-30B-A3B"], [1, 4], prompts=False))
    found = [(row["kernel"], row["batch"]) for row in rows]
    plain = "decode_step portable"
    assert found == [(plain, 1), (f"{plain} int8", 1), (plain, 4)]


def test_without_a_compiler_it_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("QWEN3_MOE_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["compile_kernels"])
    compile_kernels.main()
    assert "SKIPPED: compiling for GPUs needs" in capsys.readouterr().out


def test_the_limits_have_every_target_and_hold_the_cards_own():
    kernels = json.loads(compile_kernels.LIMITS.read_text())["kernels"]
    keys = {compile_kernels.key_of(row) for row in kernels}
    for target in cards.capabilities().values():
        rows = compile_kernels.wanted(target, ["Qwen3-30B-A3B"], [1, 4])
        assert {compile_kernels.key_of(row) for row in rows} <= keys
    for row in kernels:
        assert not compile_kernels.faults_of(row), compile_kernels.name_of(row)
