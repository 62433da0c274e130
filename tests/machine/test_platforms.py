"""Settings that keep JAX from starting, or from a GPU: one line that names the setting."""

import os
import subprocess
import sys

import pytest

from qwen3_moe_jax import cli, loader
from qwen3_moe_jax.core.errors import BackendUnavailableError, MemoryPlanError, SettingError
from qwen3_moe_jax.machine import jax_devices, probe
from qwen3_moe_jax.machine.nvidia import NvidiaGpu
from qwen3_moe_jax.machine.probe import Machine, diagnose

PROGRAM = """
import sys
import qwen3_moe_jax as q3
import qwen3_moe_jax.cli
if sys.argv[2:]:
    import jax
    jax.config.update("jax_platforms", sys.argv[2])
try:
    q3.load(backend="jax", gate=False)
except q3.BackendUnavailableError as error:
    print(error)
from qwen3_moe_jax.machine.probe import detect, diagnose
print(diagnose(detect())[0])
"""


def load_with(platforms: str, *arguments: str) -> list[str]:
    environment = {**os.environ, "JAX_PLATFORMS": platforms, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "", *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("platforms", ["cuda", "nonsense", "rocm", "tpu", "cuda,nonsense"])
def test_a_platform_that_is_not_there_is_one_line_that_names_the_variable(platforms):
    line, doctor = load_with(platforms)
    assert line.startswith(f"JAX does not start with JAX_PLATFORMS={platforms} (")
    assert "unset it, or use JAX_PLATFORMS=cpu" in line
    assert ("pip install 'qwen3-moe-jax[cuda13]'" in line) == ("cuda" in platforms)
    assert "level='problem'" in doctor
    assert f"JAX_PLATFORMS={platforms}" in doctor
    assert "pip install -U" not in doctor


def test_the_same_by_jaxs_config():
    line, doctor = load_with("", "nonsense")
    assert line.startswith("JAX does not start with jax.config.jax_platforms=nonsense (")
    assert "jax.config.jax_platforms=nonsense" in doctor


def test_an_error_without_a_setting_says_what_jax_says(monkeypatch):
    monkeypatch.setattr(jax_devices, "platforms_wanted", lambda: ("", ""))
    error = jax_devices.why_jax_does_not_start(RuntimeError("no\n driver"))
    assert error == "JAX does not start: no driver"
    assert jax_devices.why_jax_does_not_start(AssertionError()) == "JAX does not start: AssertionError"
    found = diagnose(Machine((3, 12), {"jax": "0.11.2"}, jax_error=error))[0]
    assert (found.level, found.advice) == ("problem", "pip install -U qwen3-moe-jax")


def test_a_variable_that_jax_cannot_read_is_named_and_not_the_platform(monkeypatch):
    monkeypatch.setattr(jax_devices, "platforms_wanted", lambda: ("cpu", "JAX_PLATFORMS"))
    error = ValueError("invalid truth value 'foo' for environment 'JAX_ENABLE_X64'")
    line = jax_devices.why_jax_does_not_start(error)
    assert line.startswith("JAX does not start with JAX_ENABLE_X64 (invalid truth value 'foo'")
    assert line.endswith("): correct JAX_ENABLE_X64 or unset it")
    assert "JAX_PLATFORMS" not in jax_devices.why_jax_does_not_start(RuntimeError("no"))


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (
            ValueError("invalid truth value 'x' for environment 'JAX_ENABLE_X64'"),
            SettingError,
            "JAX_ENABLE_X64",
        ),
        (
            ValueError('Invalid value "x" for JAX flag jax_default_prng_impl'),
            SettingError,
            "JAX_DEFAULT_PRNG_IMPL",
        ),
        (ImportError("libjax_common.so: failed to map segment from shared object"), MemoryPlanError, "limit"),
        (ImportError("no module named jax"), BackendUnavailableError, "no module named jax"),
    ],
)
def test_a_jax_that_cannot_be_imported_is_one_line(monkeypatch, error, kind, words):
    def fails(name):
        raise error

    monkeypatch.setattr(jax_devices, "platforms_wanted", lambda: ("", ""))
    monkeypatch.setattr(jax_devices.importlib, "import_module", fails)
    with pytest.raises(kind) as caught:
        jax_devices.import_jax()
    assert type(caught.value) is kind
    assert words in str(caught.value)


CARD = NvidiaGpu("NVIDIA H100", "580.1", "9.0", 80 << 30)


@pytest.mark.parametrize(
    ("platforms", "visible", "hidden"),
    [
        ("cpu", None, "JAX_PLATFORMS=cpu"),
        ("", "", "CUDA_VISIBLE_DEVICES=''"),
        ("", "-1", "CUDA_VISIBLE_DEVICES='-1'"),
        ("cuda,cpu", "0", ""),
        ("", "none", "CUDA_VISIBLE_DEVICES='none'"),
        ("", "GPU-8932f937,1", ""),
        ("", None, ""),
    ],
)
def test_a_gpu_that_a_setting_hides_is_the_reason_of_the_choice(monkeypatch, platforms, visible, hidden):
    monkeypatch.setattr(probe, "platforms_wanted", lambda: (platforms, "JAX_PLATFORMS" if platforms else ""))
    monkeypatch.setattr(loader, "nvidia_gpus", lambda: (CARD,))
    monkeypatch.setattr(loader, "list_adapters", lambda: [])
    monkeypatch.setattr(loader, "jax_sees_gpu", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    choice = loader.choose_backend()
    assert choice.backend == "jax"
    assert choice.fallbacks == ()
    assert (f"hidden by {hidden}" in choice.reason) if hidden else ("sees an NVIDIA GPU" in choice.reason)


def test_the_choice_of_a_backend_survives_a_jax_that_does_not_start(monkeypatch):
    def fails():
        raise BackendUnavailableError("no")

    monkeypatch.setattr(loader, "jax_devices", fails)
    assert not loader.jax_sees_gpu()


def test_an_empty_path_is_refused_and_home_is_expanded(monkeypatch, tmp_path):
    import qwen3_moe_jax as q3

    with pytest.raises(ValueError, match="path is empty"):
        q3.load("")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m.gguf").write_bytes(loader.embedded_model().read_bytes())
    with q3.load("~/m.gguf", backend="reference", max_context=64, gate=False) as model:
        assert model.source.path == tmp_path / "m.gguf"


def test_errors_name_the_argument_in_python_and_the_option_on_the_command_line(capsys):
    import qwen3_moe_jax as q3

    with (
        q3.load(backend="reference", max_context=16, gate=False) as model,
        pytest.raises(q3.ContextOverflowError, match="raise max_context$"),
    ):
        model.generate("x" * 400)
    options = ["--backend", "reference", "--context", "16", "--no-gate"]
    assert cli.main(["generate", "x" * 400, *options]) == 1
    assert capsys.readouterr().err.strip().endswith("raise --context")


POLICY = ("XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


@pytest.mark.parametrize(
    ("policy", "theirs", "found"),
    [
        (jax_devices.set_memory_policy, {}, ("false", "0.95", None)),
        (jax_devices.take_card, {}, ("true", "0.92", None)),
        (jax_devices.take_card, {POLICY[0]: "false", POLICY[1]: "0.5"}, ("false", "0.5", None)),
        (jax_devices.set_memory_policy, {POLICY[2]: "0.4"}, ("false", None, "0.4")),
    ],
)
def test_how_much_of_a_card_is_taken(monkeypatch, policy, theirs, found):
    """JAX ends where both names of the share are set."""
    monkeypatch.setattr(os, "environ", dict(theirs))
    policy()
    assert tuple(map(os.environ.get, POLICY)) == found
