"""What this backend asks of a ``jax.Device``, a class of an extension module without types."""

from typing import Any, Protocol


class Device(Protocol):
    """A ``jax.Device``.

    Attributes:
      platform: "cpu" or "gpu".
      device_kind: the product's name.
      local_hardware_id: CUDA's number of a GPU.
    """

    @property
    def platform(self) -> str: ...

    @property
    def device_kind(self) -> str: ...

    @property
    def local_hardware_id(self) -> int | None: ...

    def memory_stats(self) -> dict[str, Any] | None:
        """Bytes by name, or None where the device does not tell."""
        ...
