"""What the tests of compiling and of shared buffers do on a GPU, in the spawned process."""

import threading
from dataclasses import replace
from typing import Any
from unittest import mock

from qwen3_moe_jax.wgpu_backend import device as device_module
from qwen3_moe_jax.wgpu_backend.adapter import probe
from qwen3_moe_jax.wgpu_backend.device import Device
from tests.wgpu.gpu_work import EMBEDDED, device, runner


def shared_buffers() -> list[int]:
    """Buffers of each layer's matrices."""
    layers = runner(str(EMBEDDED), "own")._weights.layers
    return [
        len(
            {
                id(each.buffer[0])
                for each in (*w.qkv, *w.o_proj, *w.router, *(x for pair in w.gate_up for x in pair), *w.down)
            }
        )
        for w in layers
    ]


def compiled_beside(count: int) -> tuple[set[str], bool, str]:
    """Threads that compile ``count`` kernels of hardware, all at once, and what a wrong kernel ends with."""
    report = replace(device("own").report, software=False)
    adapter = probe()[0]
    together = threading.Barrier(count)
    names: set[str] = set()
    whole = Device._compile

    def compile(self: Device, *args: Any) -> Any:
        together.wait(60)
        names.add(threading.current_thread().name.split("_")[0])
        return whole(self, *args)

    with (
        mock.patch.object(device_module, "probe", return_value=(adapter, report)),
        mock.patch.object(device_module.os, "cpu_count", return_value=count),
    ):
        own = Device()
    with mock.patch.object(Device, "_compile", compile):
        made = [own.kernel("merge", HEAD_DIM=32 * (i + 1), WG=64) for i in range(count)]
        own.finish_kernels()
    with mock.patch.object(device_module, "render", return_value="@compute fn main("):
        own.kernel("merge", HEAD_DIM=512, WG=64)
    try:
        own.finish_kernels()
        error = ""
    except Exception as found:
        error = type(found).__name__
    own.close()
    return names, all(kernel.pipeline is not None for kernel in made), error
