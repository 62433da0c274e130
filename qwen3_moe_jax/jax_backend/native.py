"""Whether this process computes with ``kernels_pallas.native``, found out beside the load of the weights."""

from concurrent.futures import Future, ThreadPoolExecutor

from qwen3_moe_jax.core.errors import BackendUnavailableError
from qwen3_moe_jax.jax_backend.device import Device
from qwen3_moe_jax.kernels_pallas.native import library
from qwen3_moe_jax.kernels_pallas.native.forms import VARIABLE, is_off
from qwen3_moe_jax.machine.folders import readable_cache
from qwen3_moe_jax.machine.kernels import AUTO, NATIVE, Kernels
from qwen3_moe_jax.machine.threads import cores

NATIVE_DTYPE = "int15"
"""What products round activations to there: 15 bits, with a scale for each 256."""


class Native:
    """Loads the library in a thread of its own: where it has to be compiled, weights are read meanwhile.

    Attributes:
      is_named: whether it was asked for by name.
    """

    def __init__(self, reason: str | None, is_named: bool):
        self.is_named, self._reason = is_named, reason
        self._started: Future[library.Loaded | str] | None = None
        if reason is None:
            pool = ThreadPoolExecutor(1, thread_name_prefix="native")
            self._started = pool.submit(self._start)
            pool.shutdown(wait=False)

    @classmethod
    def begin(cls, device: Device, wanted: str, has_dtype: bool, *, is_split: bool = False) -> "Native":
        """Starts, unless the device is no CPU, or other kernels or a dtype of the operands are asked for.

        Args:
          device: of the weights.
          wanted: of ``machine.kernels.CHOICES``.
          has_dtype: whether a dtype of the operands was named.
          is_split: whether the model is split over several devices.
        """
        reason = None
        if wanted not in (AUTO, NATIVE):
            reason = "as asked"
        elif device.platform != "cpu":
            reason = f"the native kernels are a CPU's, and the device is a {device.platform}"
        elif is_split:
            reason = "the native kernels run on one device, and the model is split over several"
        elif has_dtype:
            reason = "the native kernels round activations to 15 bits, and a dtype is asked for"
        elif wanted == AUTO and is_off():
            reason = f"{VARIABLE} is off"
        return cls(reason, wanted == NATIVE)

    @staticmethod
    def _start() -> library.Loaded | str:
        return library.start(readable_cache("native"), cores())

    def _found(self) -> library.Loaded | str:
        return (self._reason or "") if self._started is None else self._started.result()

    def reason(self) -> str | None:
        """Why the kernels do not run, or None; waits for the library."""
        found = self._found()
        return found if isinstance(found, str) else None

    def kernels(self, others: Kernels) -> Kernels:
        """What runs; waits for the library.

        Args:
          others: what runs if these kernels do not.

        Raises:
          BackendUnavailableError: they were asked for by name, and do not run.
        """
        found = self._found()
        if isinstance(found, library.Loaded):
            return Kernels(NATIVE, f"{found.form}, {found.threads} thread{'s' * (found.threads > 1)}")
        if self.is_named:
            raise BackendUnavailableError(f"kernels native do not run here: {found}")
        return Kernels("xla", found) if others.name == "xla" and found != "as asked" else others
