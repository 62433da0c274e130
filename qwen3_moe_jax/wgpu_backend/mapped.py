"""Buffers that the host sees: shared memory that it writes, and what it reads back."""

import itertools
import threading
import time
import weakref
from functools import cache
from typing import Any

import numpy as np

MIN_PAUSE = 50e-6
MAX_PAUSE = 1e-3
"""Seconds between two questions whether a submit is done; each pause is twice as long as the last."""


class Shared:
    """A buffer that is mapped into the host's memory whenever the device is not to copy from it.

    Attributes:
      buffer: of wgpu.
      bytes: uint8, the whole of it while it is mapped. Reading them can be very slow.
    """

    def __init__(self, buffer: Any):
        self.buffer = buffer
        self.bytes = self._mapped()
        self._pending: Any = None

    def _mapped(self) -> np.ndarray:
        # Not its write_mapped: that copies with the interpreter's lock held.
        return np.frombuffer(self.buffer._experimental_get_mapped_range(), np.uint8)

    def unmap(self) -> None:
        """Gives it to the device; what is still written to ``bytes`` is lost, or a fault."""
        self.bytes = np.empty(0, np.uint8)
        self.buffer.unmap()

    def start(self) -> None:
        """Asks for it back; called right after the submit."""
        self._pending = self.buffer.map_async("WRITE")

    def wait(self) -> None:
        """Until it is mapped."""
        if self._pending is not None:
            self._pending.sync_wait()
            self._pending = None
            self.bytes = self._mapped()


class Readback:
    """The start of a buffer, copied at the end of a submit and readable when that is done; then used again.

    wgpu's ``map_async`` lets a thread wait for the device, and a submit waits for that thread
    (https://github.com/gfx-rs/wgpu/issues/9470). Here the caller asks from time to time, so that submits
    go on beside what the device does.
    """

    def __init__(self, source: Any, staging: Any, device: Any):
        self.source = source
        self.staging = staging
        self._device = device
        self._status: int | None = None

    def start(self) -> None:
        """Asks for the copy; called right after the submit."""
        ffi, native, answered = _library()
        self._status = None
        number = next(_numbers)
        _asked[number] = self
        info = ffi.new("WGPUBufferMapCallbackInfo *")
        info.mode = native.WGPUCallbackMode_AllowProcessEvents
        info.callback = answered
        info.userdata1 = ffi.cast("void *", number)
        size = self.staging.size
        native.wgpuBufferMapAsync(self.staging._internal, native.WGPUMapMode_Read, 0, size, info[0])

    def wait(self) -> np.ndarray:
        """The bytes, uint8, when the submit is done.

        Raises:
          RuntimeError: the device was lost.
        """
        ffi, native, _ = _library()
        pause = MIN_PAUSE
        while self._status is None:
            native.wgpuDevicePoll(self._device._internal, False, ffi.NULL)
            if self._status is None:
                time.sleep(pause)
                pause = min(2 * pause, MAX_PAUSE)
        buffer, size = self.staging._internal, self.staging.size
        if self._status != native.WGPUMapAsyncStatus_Success:
            raise RuntimeError(
                f"the wgpu device gave no result (status {self._status}): open the model again"
            )
        data = np.frombuffer(
            ffi.buffer(native.wgpuBufferGetMappedRange(buffer, 0, size), size), np.uint8
        ).copy()
        native.wgpuBufferUnmap(buffer)
        return data


_loading = threading.Lock()
_numbers = itertools.count(1)
_asked: weakref.WeakValueDictionary[int, Readback] = weakref.WeakValueDictionary()


def _library() -> tuple[Any, Any, Any]:
    """As ``_native``, whose callback must be one: of two that threads make at once one would be freed."""
    with _loading:
        return _native()


@cache
def _native() -> tuple[Any, Any, Any]:
    """wgpu's foreign functions, its library, and what it calls when a buffer is mapped.

    One callback for all: wgpu may call it for a buffer that nobody waits for any more.
    """
    from wgpu.backends import wgpu_native

    ffi: Any = wgpu_native.ffi

    @ffi.callback("void(WGPUMapAsyncStatus, WGPUStringView, void *, void *)")
    def answered(status: int, _message: Any, number: Any, _unused: Any) -> None:
        found = _asked.pop(int(ffi.cast("uintptr_t", number)), None)
        if found is not None:
            found._status = status

    return ffi, wgpu_native.lib, answered
