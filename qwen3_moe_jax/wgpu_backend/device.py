"""One WebGPU device: buffers, uploads, kernels and read-back.

Everything is validated by wgpu when it is made or encoded. What it would only
find at ``queue.submit`` ends the process, so it cannot be expressed here:
buffers are destroyed by ``close`` alone, command buffers are made and submitted
in one place, and a closed device refuses work. Who shares a device between
threads keeps ``close`` from other calls, as ``WgpuRunner`` does with a lock.
"""

import os
import re
import struct
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np

from qwen3_moe_jax.core.errors import BackendUnavailableError, MemoryPlanError
from qwen3_moe_jax.wgpu_backend.adapter import (
    MAX_SHARED_BYTES,
    SHARED_BYTES,
    AdapterReport,
    Tuning,
    probe,
    tuning_for,
)
from qwen3_moe_jax.wgpu_backend.layout import grid_words
from qwen3_moe_jax.wgpu_backend.mapped import Readback, Shared
from qwen3_moe_jax.wgpu_backend.wgsl import render

UPLOAD_PIECE = 16 << 20
"""Bytes a write; submitting after each bounds what waits in staging memory, and is twice as fast."""

# What WebGPU guarantees everywhere; asking for no more keeps the kernels portable.
_PORTABLE_LIMITS = {
    "max-storage-buffers-per-shader-stage": 8,
    "max-compute-workgroup-storage-size": SHARED_BYTES,
    "max-compute-invocations-per-workgroup": 256,
    "max-compute-workgroup-size-x": 256,
    "max-compute-workgroups-per-dimension": 65535,
}

TIMESTAMPS = ("timestamp-query", "timestamp-query-inside-passes")
MAX_QUERIES = 4096
"""Of one query set of WebGPU."""

VENDORS_OF_32 = (0x10DE, 0x106B)
"""PCI's numbers of NVIDIA and Apple: all subgroups of their GPUs have 32 invocations."""

_BINDING = re.compile(r"@binding\((\d+)\) var<(uniform|storage, read|storage, read_write)>")

_BUFFER_TYPES = {"uniform": "uniform", "storage, read": "read-only-storage", "storage, read_write": "storage"}


COMPILERS = 4
"""Threads that compile kernels for hardware: 16 are slower. A software adapter has no cores to spare."""

GRIDS_BINDING = 8
"""Where kernels of types whose weights are points of a grid find the table of points."""


@dataclass(frozen=True, eq=False)
class Kernel:
    """A kernel that is compiled beside, and the layout of its bindings (binding number to buffer type)."""

    name: str
    layout: Any
    bindings: dict[int, str]
    compiled: Future[Any]

    @cached_property
    def pipeline(self) -> Any:
        """What is compiled; waits for it."""
        return self.compiled.result()


@dataclass(frozen=True, eq=False)
class Dispatch:
    """A kernel with its resources; the grid is settled when it is encoded."""

    kernel: Kernel
    group: Any


Launch = tuple[Dispatch, int, int, int]
"""A dispatch and its grid."""


class Device:
    """A logical device on one adapter.

    Attributes:
      report: what the adapter is.
      tuning: settings for its kind.
      subgroups: lanes may exchange values directly: every subgroup has 32 of them.
      max_bytes: the largest part of a buffer that one binding can show.
      max_buffer_bytes: the largest buffer.
      shared_bytes: of a workgroup's memory.
      unchecked: kernels go without wgpu's checks of indices and loops.
      timestamps: ``run_timed`` can be called: they were asked for, and the adapter writes them inside passes.
    """

    def __init__(
        self,
        adapter: str | None = None,
        *,
        tuning: Tuning | None = None,
        subgroups: bool | None = None,
        max_bytes: int | None = None,
        timestamps: bool = False,
        unchecked: bool | None = None,
        exact: bool = False,
    ):
        """Opens an adapter.

        Args:
          adapter: part of the wanted adapter's summary.
          tuning, subgroups: in place of what suits the adapter.
          max_bytes: largest binding, in place of the adapter's limit.
          unchecked: whether kernels go without wgpu's checks of indices and loops; default on hardware.
          exact: no kernel rounds activations.
          timestamps: asks for what ``run_timed`` needs, where the adapter offers it.

        Raises:
          BackendUnavailableError: no such adapter, or it lacks what every kernel needs.
        """
        gpu_adapter, self.report = probe(adapter)
        self.tuning = tuning or tuning_for(self.report, exact=exact)
        self.subgroups = _fixed_subgroups(gpu_adapter) if subgroups is None else subgroups
        limits = _device_limits(self.report)
        wanted = ("subgroup", *(TIMESTAMPS if timestamps else ()))
        features = [f for f in wanted if f in gpu_adapter.features]
        try:
            self._device: Any = gpu_adapter.request_device_sync(
                label="qwen3-moe", required_features=features, required_limits=limits
            )
        except RuntimeError as error:
            raise BackendUnavailableError(f"{self.report.summary} gives no device: {error}") from error
        self.unchecked = not self.report.software if unchecked is None else unchecked
        largest = min(limits["max-storage-buffer-binding-size"], limits["max-buffer-size"])
        self.max_bytes = min(max_bytes or largest, largest) & ~255
        self.max_buffer_bytes = limits["max-buffer-size"]
        self.shared_bytes = limits["max-compute-workgroup-storage-size"]
        self.timestamps = timestamps and set(TIMESTAMPS) <= set(features)
        self._kernels: dict[tuple, Kernel] = {}
        self._naming = threading.Lock()
        count = 1 if self.report.software else min(COMPILERS, os.cpu_count() or 1)
        self._compilers = ThreadPoolExecutor(count, thread_name_prefix="compile")
        self._buffers: weakref.WeakSet[Any] = weakref.WeakSet()
        self._grid_table: Any = None
        self._open = True

    def close(self) -> None:
        """Destroys every buffer, whoever still names it, and refuses further work."""
        self._open = False
        self._compilers.shutdown(cancel_futures=True)  # what is begun ends on a device that is still there
        self._kernels.clear()
        for buffer in list(self._buffers):
            buffer.destroy()
        self._device = self._grid_table = None  # what wgpu has destroyed, it gives back with the device

    def _check_open(self) -> None:
        if not self._open:
            raise RuntimeError("this wgpu device is closed: open the model again")

    def buffer(self, nbytes: int, label: str, *, uniform: bool = False) -> Any:
        """A storage buffer of at least ``nbytes``, zeroed; ``uniform`` allows uniform bindings too.

        Raises:
          MemoryPlanError: the device has no memory for it.
        """
        self._check_open()
        import wgpu

        usage = wgpu.BufferUsage.STORAGE | wgpu.BufferUsage.COPY_DST | wgpu.BufferUsage.COPY_SRC
        if uniform:
            usage |= wgpu.BufferUsage.UNIFORM
        size = max(16, -(-nbytes // 16) * 16)
        try:
            made = self._device.create_buffer(size=size, usage=usage, label=label)
        except wgpu.GPUError as error:
            raise MemoryPlanError(
                f"{self.report.name} has no memory left for {label} ({size / 2**20:.0f} MiB): {error}"
            ) from error
        self._buffers.add(made)
        return made

    def write(self, buffer: Any, data: np.ndarray, offset: int = 0) -> None:
        """Copies an array (a multiple of 4 bytes) into a buffer."""
        self._check_open()
        raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        queue = self._device.queue
        for start in range(0, len(raw), UPLOAD_PIECE):
            queue.write_buffer(buffer, offset + start, raw[start : start + UPLOAD_PIECE])
            if len(raw) > UPLOAD_PIECE:
                queue.submit([])

    def flush(self) -> None:
        """Starts pending writes, so that their staging memory is freed."""
        self._check_open()
        self._device.queue.submit([])

    def upload(self, data: np.ndarray, label: str) -> Any:
        """A new storage buffer that holds ``data``."""
        buffer = self.buffer(data.nbytes, label)
        self.write(buffer, data)
        return buffer

    def uniform(self, *values: int | float, label: str = "params") -> Any:
        """A uniform buffer of 32-bit values: ints as u32, floats as f32."""
        words = b"".join(struct.pack("<f" if isinstance(v, float) else "<I", v) for v in values)
        buffer = self.buffer(len(words), label, uniform=True)
        self._device.queue.write_buffer(buffer, 0, words)
        return buffer

    def read(self, buffer: Any, dtype: Any, count: int, offset: int = 0) -> np.ndarray:
        """Waits for all submitted work and copies ``count`` values out of a buffer."""
        self._check_open()
        dtype = np.dtype(dtype)
        data = self._device.queue.read_buffer(buffer, offset, count * dtype.itemsize)
        return np.frombuffer(data, dtype).copy()

    def kernel(self, name: str, **constants: Any) -> Kernel:
        """The kernel of one shader and one set of constants, compiled once, by another thread."""
        self._check_open()
        key = (name, *sorted((k, str(v)) for k, v in constants.items()))
        with self._naming:
            if key not in self._kernels:
                self._kernels[key] = self._begin(name, constants)
            return self._kernels[key]

    def finish_kernels(self) -> None:
        """Waits until every kernel is compiled.

        Raises:
          GPUError: of wgpu, for the first kernel that is wrong.
        """
        with self._naming:
            wanted = list(self._kernels.values())
        for kernel in wanted:
            _ = kernel.pipeline

    def _begin(self, name: str, constants: dict[str, Any]) -> Kernel:
        import wgpu

        code = render(name, **constants)
        bindings = {int(number): _BUFFER_TYPES[kind] for number, kind in _BINDING.findall(code)}
        entries = [
            {"binding": i, "visibility": wgpu.ShaderStage.COMPUTE, "buffer": {"type": type}}
            for i, type in sorted(bindings.items())
        ]
        layout = self._device.create_bind_group_layout(entries=entries, label=name)
        return Kernel(name, layout, bindings, self._compilers.submit(self._compile, name, code, layout))

    def _compile(self, name: str, code: str, layout: Any) -> Any:
        return self._device.create_compute_pipeline(
            label=name,
            layout=self._device.create_pipeline_layout(bind_group_layouts=[layout]),
            compute={"module": self._module(code, name), "entry_point": "main"},
        )

    def _module(self, code: str, name: str) -> Any:
        """A shader; for hardware without a check around every index and a count of every loop's turns."""
        if not self.unchecked:
            return self._device.create_shader_module(code=code, label=name)
        from wgpu.backends import wgpu_native

        native, ffi, lib = (cast(Any, part) for part in (wgpu_native, wgpu_native.ffi, wgpu_native.lib))
        text, label = (ffi.new("char []", part.encode()) for part in (code, name))
        source = ffi.new("WGPUShaderSourceWGSL *")
        source.chain.sType = lib.WGPUSType_ShaderSourceWGSL
        source.code.data, source.code.length = text, len(text) - 1
        wanted = ffi.new("WGPUShaderModuleDescriptor *")
        wanted.nextInChain = ffi.cast("WGPUChainedStruct *", source)
        wanted.label.data, wanted.label.length = label, len(label) - 1
        made = native._api.libf.wgpuDeviceCreateShaderModuleTrusted(self._device._internal, wanted, 0)
        return native.GPUShaderModule(name, made, self._device)

    def bind(self, kernel: Kernel, resources: dict[int, Any]) -> Dispatch:
        """A kernel with a buffer, or (buffer, offset, nbytes), for each of its bindings."""
        self._check_open()
        entries = []
        for number in kernel.bindings:
            found = self._grids() if number == GRIDS_BINDING else resources[number]
            buffer, offset, size = found if isinstance(found, tuple) else (found, 0, found.size)
            entries.append(
                {"binding": number, "resource": {"buffer": buffer, "offset": offset, "size": size}}
            )
        group = self._device.create_bind_group(layout=kernel.layout, entries=entries, label=kernel.name)
        return Dispatch(kernel, group)

    def _grids(self) -> Any:
        """The table of the points of all grids, uploaded when a kernel first reads it."""
        if self._grid_table is None:
            self._grid_table = self.upload(grid_words(), "grids")
        return self._grid_table

    def run(self, launches: Sequence[Launch], readback: Readback | None = None) -> None:
        """Encodes the launches, in order, into one command buffer and submits it."""
        self._check_open()
        encoder = self._device.create_command_encoder()
        _encode(encoder.begin_compute_pass(), launches)
        if readback:
            encoder.copy_buffer_to_buffer(readback.source, 0, readback.staging, 0, readback.staging.size)
        self._device.queue.submit([encoder.finish()])
        if readback:
            readback.start()

    def run_timed(self, launches: Sequence[Launch]) -> np.ndarray:
        """As ``run``, one timestamp after each: nanoseconds that each took, float64 [len(launches)].

        A launch begins when the one before has ended: all of them are taken to depend on each other.

        Raises:
          ValueError: there are MAX_QUERIES launches or more.
        """
        self._check_open()
        import wgpu
        from wgpu.backends import wgpu_native

        native: Any = wgpu_native.lib
        count = len(launches) + 1
        if count > MAX_QUERIES:
            raise ValueError(f"{len(launches)} launches at once: time at most {MAX_QUERIES - 1}")
        queries = self._device.create_query_set(type="timestamp", count=count)
        ticks = self._device.create_buffer(
            size=8 * count, usage=wgpu.BufferUsage.QUERY_RESOLVE | wgpu.BufferUsage.COPY_SRC
        )
        encoder = self._device.create_command_encoder()
        _encode(encoder.begin_compute_pass(), launches, queries)
        encoder.resolve_query_set(queries, 0, count, ticks, 0)
        self._device.queue.submit([encoder.finish()])
        read = np.frombuffer(self._device.queue.read_buffer(ticks), np.uint64)
        period = float(native.wgpuQueueGetTimestampPeriod(self._device.queue._internal))
        return np.diff(read.astype(np.int64)) * period

    def shared(self, nbytes: int) -> Shared:
        """Memory that the host writes and the device copies from."""
        self._check_open()
        import wgpu

        usage = wgpu.BufferUsage.MAP_WRITE | wgpu.BufferUsage.COPY_SRC
        made = self._device.create_buffer(
            size=-(-nbytes // 16) * 16, usage=usage, mapped_at_creation=True, label="staging"
        )
        self._buffers.add(made)
        return Shared(made)

    def send(
        self, piece: Shared, copies: Sequence[tuple[int, Any, int, int]], launches: Sequence[Launch]
    ) -> None:
        """Submits copies (from, buffer, to, bytes) out of shared memory, then launches, and maps it again."""
        self._check_open()
        piece.unmap()
        encoder = self._device.create_command_encoder()
        for start, target, offset, nbytes in copies:
            encoder.copy_buffer_to_buffer(piece.buffer, start, target, offset, nbytes)
        if launches:
            _encode(encoder.begin_compute_pass(), launches)
        self._device.queue.submit([encoder.finish()])
        piece.start()

    def readback(self, source: Any, nbytes: int) -> Readback:
        """A small buffer that later submits copy ``source`` to."""
        self._check_open()
        import wgpu

        usage = wgpu.BufferUsage.MAP_READ | wgpu.BufferUsage.COPY_DST
        made = self._device.create_buffer(size=nbytes, usage=usage, label="readback")
        self._buffers.add(made)
        return Readback(source, made, self._device)


def _encode(compute: Any, launches: Sequence[Launch], queries: Any = None) -> None:
    """The launches, in order, and the end of the pass; one timestamp before them and one after each.

    Straight into wgpu's library: its Python wrappers take most of the time of a token's hundreds of calls.
    What is wrong with a call, the encoder's ``finish`` says.
    """
    from wgpu.backends import wgpu_native

    native: Any = wgpu_native.lib
    set_pipeline = native.wgpuComputePassEncoderSetPipeline
    set_group = native.wgpuComputePassEncoderSetBindGroup
    dispatch_groups = native.wgpuComputePassEncoderDispatchWorkgroups
    nothing, into = wgpu_native.ffi.NULL, compute._internal
    pipeline = None
    if queries:
        from wgpu.backends.wgpu_native.extras import write_timestamp

        write_timestamp(compute, queries, 0)
    for number, (dispatch, x, y, z) in enumerate(launches, 1):
        if dispatch.kernel.pipeline is not pipeline:
            pipeline = dispatch.kernel.pipeline
            set_pipeline(into, pipeline._internal)
        set_group(into, 0, dispatch.group._internal, 0, nothing)
        dispatch_groups(into, x, y, z)
        if queries:
            write_timestamp(compute, queries, number)
    compute.end()


def _device_limits(report: AdapterReport) -> dict[str, int]:
    limits = dict(_PORTABLE_LIMITS)
    for name, needed in limits.items():
        if report.limits.get(name, needed) < needed:
            raise BackendUnavailableError(
                f"{report.summary} allows {name} {report.limits[name]}, and the kernels need {needed}: "
                "choose another adapter"
            )
    for name in ("max-storage-buffer-binding-size", "max-buffer-size"):
        limits[name] = report.limits[name]
    shared = "max-compute-workgroup-storage-size"
    limits[shared] = min(report.limits[shared], MAX_SHARED_BYTES)
    return limits


def _fixed_subgroups(adapter: Any) -> bool:
    """Whether every subgroup is known to have 32 invocations.

    wgpu-native says 4 to 128 of every Vulkan adapter; the vendor tells what it is.
    """
    info = adapter.info
    sizes = [
        info.get(f"{name}_{end}_size", 0) for name in ("subgroup", "stackgroup") for end in ("min", "max")
    ]
    told = sizes[:2] == [32, 32] or sizes[2:] == [32, 32]
    return "subgroup" in adapter.features and (told or info.get("vendor_id") in VENDORS_OF_32)
