"""Which of the jax backend's kernels a device runs: the choice behind ``--kernels`` and ``kernels=``.

"hopper" are the kernels with ``wgmma`` and the tensor memory accelerator, "portable" those that run from
Ampere on, "xla" XLA's own operations; a CPU has "native" ones beside these. An
operation whose kernel does not take its arguments runs in XLA
whatever was chosen. On an H100 the decode kernel with ``wgmma`` is a little faster for one sequence
(650 tokens/s of a file; the portable one 642 of weights on the device) and prompts are much faster (42,224
against 26,598 tokens/s: docs/receipts/paths_h100.json), so it goes first.
"""

import importlib.metadata
import re
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from qwen3_moe_jax.core.errors import BackendUnavailableError

KERNELS = ("hopper", "portable", "xla")
"""The fastest first."""

AUTO = "auto"
NATIVE = "native"
"""A CPU's own (``kernels_pallas.native``): whether they run is found out when a model is loaded."""

CHOICES = (AUTO, *KERNELS, NATIVE)

KERNEL_JAX = (0, 11)
"""The GPU kernels are written for the Mosaic GPU API of this JAX version and later."""

HOPPER = (9, 0)
AMPERE = (8, 0)


class Device(Protocol):
    """What is asked of a ``jax.Device``."""

    @property
    def platform(self) -> str:
        """ "cpu", "gpu" or "tpu"."""
        ...

    @property
    def device_kind(self) -> str:
        """The device's name."""
        ...


class Kernels(NamedTuple):
    """A choice.

    Attributes:
      name: one of KERNELS, or NATIVE.
      reason: why, in words.
    """

    name: str
    reason: str


def capability_of(device: Device) -> str:
    """An NVIDIA GPU's compute capability, such as "8.9"; "" for other devices."""
    if device.platform != "gpu":
        return ""
    return str(getattr(device, "compute_capability", ""))


def installed_jax() -> tuple[int, ...]:
    """The version of JAX, without importing it; () where there is none."""
    try:
        version = importlib.metadata.version("jax")
    except importlib.metadata.PackageNotFoundError:
        return ()
    return tuple(int(n) for n in version.split(".")[:3] if n.isdigit())


def reason_against(name: str, capability: str, jax_version: Sequence[int]) -> str | None:
    """Why these kernels do not run on a device, or None.

    Args:
      name: one of KERNELS.
      capability: compute capability of an NVIDIA GPU; "" for other devices.
      jax_version: such as (0, 11, 2).
    """
    if name == "xla":
        return None
    needed = "9.0 (Hopper)" if name == "hopper" else "8.0 (Ampere) or later"
    numbers = _numbers(capability)
    if numbers is None:
        return f"they need an NVIDIA GPU of compute capability {needed}"
    if not (numbers == HOPPER if name == "hopper" else numbers >= AMPERE):
        return f"they need compute capability {needed}, and this is {capability}"
    if tuple(jax_version[:2]) < KERNEL_JAX:
        found = ".".join(map(str, jax_version))
        return f"they need JAX 0.11 (Python 3.12 or later), and this is {found}"
    return None


def choose_kernels(wanted: str, capability: str, jax_version: Sequence[int]) -> Kernels:
    """The kernels that are asked for, or the fastest that the device has.

    Args:
      wanted: one of CHOICES.
      capability, jax_version: as :func:`reason_against`.

    Raises:
      BackendUnavailableError: the device does not run what is asked for.
    """
    if wanted != AUTO:
        if reason := reason_against(wanted, capability, jax_version):
            raise BackendUnavailableError(
                f"kernels {wanted} do not run on this device: {reason}; leave the option out, or use xla"
            )
        return Kernels(wanted, "as asked")
    against = {name: reason_against(name, capability, jax_version) for name in KERNELS}
    name = next(name for name in KERNELS if against[name] is None)
    if name == "xla":
        return Kernels(name, f"no other kernels: {against['portable']}")
    return Kernels(name, f"the fastest for compute capability {capability}")


def is_before_ampere(capability: str) -> bool:
    """Whether an NVIDIA GPU is too old for the kernels; False where its capability is not known."""
    numbers = _numbers(capability)
    return numbers is not None and numbers < AMPERE


def _numbers(capability: str) -> tuple[int, int] | None:
    found = re.fullmatch(r"(\d+)\.(\d+)", capability)
    return None if found is None else (int(found[1]), int(found[2]))
