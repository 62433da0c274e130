"""Environment variables: one line that names a wrong value, before any wait; all of the docs'."""

import re
from pathlib import Path

import pytest

from qwen3_moe_jax import cli
from qwen3_moe_jax.core.errors import BackendUnavailableError, OptionError
from qwen3_moe_jax.core.exit_codes import ExitCode
from qwen3_moe_jax.machine import environment, jax_devices
from qwen3_moe_jax.machine.environment import MEMORY_VARIABLE, check_environment, faults
from qwen3_moe_jax.machine.probe import Machine, diagnose

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "environment.md"

ANY_TEXT = {
    "QWEN3_MOE_DEBUG",
    "QWEN3_MOE_CACHE",
    "QWEN3_MOE_WGPU_ADAPTER",
    "CUDA_VISIBLE_DEVICES",
    "JAX_PLATFORMS",
    "XLA_FLAGS",
    "QWEN3_MOE_NO_SKIPS",
    "QWEN3_MOE_REQUIRE_WGPU",
}
"""Folders and names; an adapter, a platform and XLA's flags are met where they are looked for."""

GOOD = {
    "QWEN3_MOE_COMPILERS": ["0", "3", " 8 "],
    "QWEN3_MOE_CORES": ["1", " 8 ", "4096"],
    "QWEN3_MOE_WGPU_MEMORY": ["12GiB", "500 MB", "1000"],
    "QWEN3_MOE_NATIVE": ["off", "OFF", "avx2", "neon"],
    "QWEN3_MOE_PROGRAMS": ["on", "off"],
    "NPROC": ["1", "8", "4096"],
    "XLA_PYTHON_CLIENT_PREALLOCATE": ["true", "false", "1", "0"],
    "XLA_CLIENT_MEM_FRACTION": ["0.9", ".5", "2"],
    "XLA_PYTHON_CLIENT_MEM_FRACTION": ["0.4"],
}
BAD = {
    "QWEN3_MOE_COMPILERS": ["-1", "two", "1.5", "1" * 5000, "\u0663"],
    "QWEN3_MOE_CORES": ["0", "-1", "two", "1.5", "4097"],
    "QWEN3_MOE_WGPU_MEMORY": ["abc", "0", "-1G", "1" * 5000],
    "QWEN3_MOE_NATIVE": ["nonsense", "avx 2"],
    "QWEN3_MOE_PROGRAMS": ["/tmp/programs", "no"],
    "NPROC": ["abc", "0", "-4", "1e9", "999999999", "4097"],
    "XLA_PYTHON_CLIENT_PREALLOCATE": ["abc", "FALSE"],
    "XLA_CLIENT_MEM_FRACTION": ["abc", "0", "-1", "nan", "inf"],
    "XLA_PYTHON_CLIENT_MEM_FRACTION": ["abc"],
}


@pytest.fixture(autouse=True)
def empty(monkeypatch):
    for name in GOOD:
        monkeypatch.delenv(name, raising=False)


def test_every_variable_of_the_page_is_checked_or_may_be_any_text():
    rows = re.findall(r"^\| `(\w+)` \|", PAGE.read_text(), re.MULTILINE)
    assert {*rows} == ({*GOOD} | ANY_TEXT)
    assert {*environment._CHECKS} == {*GOOD} == {*BAD}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in BAD.items() for v in values])
def test_a_value_that_cannot_be_is_one_line_that_names_the_variable(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(OptionError) as caught:
        check_environment()
    assert str(caught.value).startswith(f"{name}={value}: write ")
    assert str(caught.value).endswith(", or unset it")


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in GOOD.items() for v in ["", *values]])
def test_a_value_that_can_be_is_taken(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert not list(faults())


def test_two_names_of_one_share_are_refused(monkeypatch):
    monkeypatch.setenv(jax_devices.SHARE_VARIABLE, "0.9")
    monkeypatch.setenv(jax_devices.OLD_SHARE_VARIABLE, "0.9")
    assert len(list(faults())) == 1


def test_a_command_ends_with_2_before_it_looks_at_the_model_and_doctor_tells_it(monkeypatch, capsys):
    monkeypatch.setenv(MEMORY_VARIABLE, "abc")
    assert cli.main(["generate", "-m", "/no/such.gguf", "x"]) == ExitCode.USAGE
    assert capsys.readouterr().err == (
        f"qwen3-moe: {MEMORY_VARIABLE}=abc: write a size, for example 12GiB, or unset it\n"
    )
    found = diagnose(Machine((3, 12), {"jax": "0.11.2"}, environment=tuple(faults())))[1]
    assert (found.level, found.text) == ("problem", f"{MEMORY_VARIABLE}=abc")
    assert found.advice.startswith("write a size")


def test_python_is_told_the_same(monkeypatch):
    import qwen3_moe_jax as q3

    monkeypatch.setenv("NPROC", "abc")
    with pytest.raises(BackendUnavailableError, match="^NPROC=abc: write a whole number"):
        q3.load("/no/such.gguf")
