"""What a graphics adapter's memory gives a shader that does nothing but read."""

import time

import numpy as np

from qwen3_moe_jax.wgpu_backend.device import Device

HARDWARE_BYTES, SOFTWARE_BYTES = 512 << 20, 64 << 20
"""Read by one dispatch: far more than a cache holds."""

WORKGROUP, WORKGROUPS = 256, 4096
REPEATS, RUNS = 8, 4


def read_rate(device: Device) -> float:
    """Bytes per second, the best of several runs of REPEATS dispatches each; the values are checked."""
    nbytes = min(SOFTWARE_BYTES if device.report.software else HARDWARE_BYTES, device.max_bytes)
    count, stride = nbytes // 4, WORKGROUP * WORKGROUPS
    data = device.upload(np.arange(count, dtype=np.uint32), "memory")
    sums = device.buffer(4 * stride, "sums")
    kernel = device.kernel("read", WG=WORKGROUP)
    dispatch = device.bind(kernel, {0: device.uniform(count // 4, stride), 1: data, 2: sums})
    best = float("inf")
    for _ in range(RUNS):
        device.read(sums, np.uint32, 1)
        began = time.perf_counter()
        device.run([(dispatch, WORKGROUPS, 1, 1)] * REPEATS)
        device.read(sums, np.uint32, 1)
        best = min(best, time.perf_counter() - began)
    total = int(device.read(sums, np.uint32, stride).astype(np.uint64).sum()) & 0xFFFFFFFF
    if total != count * (count - 1) // 2 & 0xFFFFFFFF:
        raise RuntimeError(f"{device.report.summary} reads other values than were written")
    return REPEATS * 4 * count / best
