"""Every fault is a clean error that names what to do; none of them ends the GPU process."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from qwen3_moe_jax.core.errors import BackendUnavailableError
from qwen3_moe_jax.core.sampling import Sampling
from qwen3_moe_jax.machine.environment import MEMORY_VARIABLE, parse_bytes
from qwen3_moe_jax.testing.random_models import SMALL, write_random_gguf
from qwen3_moe_jax.wgpu_backend import adapter
from tests.wgpu import gpu_work
from tests.wgpu.cases import spoil_scale


@pytest.mark.parametrize(
    ("action", "args", "error", "words"),
    [
        ("nonfinite_stream", ("norm", float("nan")), "NumericalError", ["position 2", "trace"]),
        ("nonfinite_stream", ("layers.3.input_layernorm", float("inf")), "NumericalError", ["trace"]),
        ("overlong_forward", (), "ContextOverflowError", ["513", "512", "max_context"]),
        ("full_prompt", (), "ContextOverflowError", ["512"]),
        ("empty_prompt", (), "ValueError", ["non-empty"]),
        ("bad_token", (), "ValueError", ["4096"]),
        ("bad_expert", (), "ValueError", ["0 to 15"]),
        ("bad_stage", (), "ValueError", ["ffn_mope"]),
        ("empty_forward", (), "ValueError", ["non-empty"]),
        ("bad_layer", (), "ValueError", ["0 to 5"]),
        ("closed", ("forward",), "ModelClosedError", ["closed", "load it again"]),
        ("closed", ("stream",), "ModelClosedError", ["closed"]),
        ("closed", ("waiting",), "ModelClosedError", ["closed"]),
        ("overtaken", (), "RuntimeError", ["newer request"]),
        ("context_larger_than_a_binding", (), "MemoryPlanError", ["keys", "max_context"]),
        ("wrong_adapter", (), "BackendUnavailableError", ["Voodoo 2", "choose one of"]),
    ],
)
def test_errors(gpu, action, args, error, words):
    found, message = gpu(gpu_work.raised, action, *args)
    assert found == error, message
    for word in words:
        assert word in message
    assert "\n" not in message


def test_closing_gives_every_buffer_back(gpu):
    """Counted by wgpu; the devices too, since it holds destroyed memory as long as its device."""
    before, loaded, closed, failed, second, after = gpu(gpu_work.closing_counts)
    assert loaded[0] == second[0] == before[0] + 1
    assert loaded[2] - before[2] > 10_000_000
    assert second[1:] == loaded[1:]
    assert closed == failed == after == before


def test_a_damaged_file_ends_a_load_beside_the_kernels_that_are_compiled(gpu, tmp_path):
    write_random_gguf(tmp_path / "bad.gguf", SMALL, mix="q4_k_m")
    spoil_scale(tmp_path / "bad.gguf", "layers.0.mlp.experts.down_proj", 5)
    (error, message), given_back = gpu(gpu_work.damaged_load, tmp_path / "bad.gguf")
    assert error == "ModelFileError"
    assert "blk.0.ffn_down_exps.weight" in message
    assert given_back


def test_every_call_of_a_closed_model_says_so(gpu):
    """Submitting to a device that another thread has closed would end the process."""
    found = gpu(gpu_work.closed_calls)
    assert found.pop("device") == ("RuntimeError", "this wgpu device is closed: open the model again")
    assert set(found.values()) == {("ModelClosedError", "the model is closed: load it again")}, found


def test_streams_that_nobody_reads_to_the_end(gpu):
    """Batches in flight are dropped with their stream; the next request is right."""
    model = str(gpu_work.EMBEDDED)
    expected = gpu(gpu_work.stream, model, [1, 2, 3], 12, Sampling())
    assert gpu(gpu_work.abandon_streams, model, 12) == expected


def test_few_tokens_are_queued_ahead_and_no_thread_waits_for_the_device(gpu):
    """What a stop wastes is bounded; a submit would wait for a thread that waits for the device."""
    ahead, waits = gpu(gpu_work.tokens_on_their_way, str(gpu_work.EMBEDDED), "hardware", 40)
    assert 4 <= ahead <= 6
    assert waits == 0


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the process's size is read from /proc")
@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=0.7, top_k=20, top_p=0.8)], ids=["0", "0.7"]
)
def test_requests_leave_no_memory_behind(gpu, sampling):
    assert gpu(gpu_work.memory_growth, str(gpu_work.EMBEDDED), 20, sampling) < 8 << 20


def test_a_plan_that_does_not_fit_is_refused_before_any_upload():
    """In a process of its own, where the environment says that there is little memory."""
    code = "from tests.wgpu import gpu_work; print(*gpu_work.raised('plan_too_large'))"
    environment = dict(os.environ, **{MEMORY_VARIABLE: "20MB"})
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    if "no graphics adapter" in run.stdout:
        pytest.skip(run.stdout)
    assert run.stdout.startswith("MemoryPlanError"), run.stdout + run.stderr
    for words in ("weights 0.01 GB + KV cache", "0.02 GB free", MEMORY_VARIABLE):
        assert words in run.stdout


def test_sizes_of_memory():
    assert [parse_bytes(t) for t in ("12GiB", "1.5G", "500 MB", "4096")] == [
        12 << 30,
        3 << 29,
        500 << 20,
        4096,
    ]
    with pytest.raises(ValueError, match="12GiB"):
        parse_bytes("a lot")


class FakeAdapter:
    """As much of ``wgpu.GPUAdapter`` as is looked at before a device is made."""

    def __init__(self, device: str, type: str, backend: str):
        self.info = {"device": device, "adapter_type": type, "backend_type": backend, "description": ""}
        self.summary = f"{device} ({type}) via {backend}"
        self.limits = dict.fromkeys(adapter._LIMITS, 1 << 28)
        self.features = {"shader-f16"}


FOUND = [
    FakeAdapter("llvmpipe", "CPU", "Vulkan"),
    FakeAdapter("Iris", "IntegratedGPU", "Vulkan"),
    FakeAdapter("Radeon", "DiscreteGPU", "OpenGL"),
    FakeAdapter("Radeon", "DiscreteGPU", "Vulkan"),
]


@pytest.fixture
def adapters(monkeypatch):
    """Replaces the adapters that wgpu finds."""

    def replace(found: list) -> None:
        gpu = SimpleNamespace(enumerate_adapters_sync=lambda: found)
        monkeypatch.setattr(adapter, "_wgpu", lambda: SimpleNamespace(gpu=gpu))

    monkeypatch.delenv(adapter.ADAPTER_VARIABLE, raising=False)
    return replace


def test_hardware_comes_first(adapters):
    adapters(FOUND)
    assert [r.summary for r in adapter.list_adapters()] == [
        "Radeon (DiscreteGPU) via Vulkan",
        "Iris (IntegratedGPU) via Vulkan",
        "Radeon (DiscreteGPU) via OpenGL",
        "llvmpipe (CPU) via Vulkan",
    ]
    assert adapter.probe()[0] is FOUND[3]
    assert "software" in str(adapter.list_adapters()[-1])


def test_an_adapter_is_chosen_by_argument_and_environment(adapters, monkeypatch):
    adapters(FOUND)
    assert adapter.probe("opengl")[0] is FOUND[2]
    monkeypatch.setenv(adapter.ADAPTER_VARIABLE, "IRIS")
    assert adapter.probe()[0] is FOUND[1]
    assert adapter.probe("llvm")[0] is FOUND[0]


def test_no_adapter_is_one_readable_line(adapters):
    adapters([])
    assert adapter.list_adapters() == []
    with pytest.raises(BackendUnavailableError, match=r"^WebGPU finds no graphics adapter: install .*$"):
        adapter.probe()


@pytest.mark.parametrize(
    ("system", "files", "possible"),
    [
        ("linux", [], False),
        ("linux", ["dri/card0", "nvram"], False),
        ("linux", ["dri/renderD128"], True),
        ("linux", ["nvidia0"], True),
        ("linux", ["dxg"], True),
        ("darwin", [], True),
        ("win32", [], True),
    ],
)
def test_a_linux_without_a_gpus_device_file_has_no_hardware(monkeypatch, tmp_path, system, files, possible):
    monkeypatch.setattr(adapter.sys, "platform", system)
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert adapter.may_have_hardware(tmp_path) == possible
