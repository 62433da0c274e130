"""How much main memory this process has come to hold, and what of it can be given back."""

import ctypes
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


@dataclass(frozen=True)
class ResidentPeak:
    """The peak of resident memory since ``start``.

    Attributes:
      before: bytes at the start.
    """

    before: int

    @classmethod
    def start(cls) -> "ResidentPeak | None":
        """Sets the system's mark of the peak back to what is resident now; None where that cannot be done."""
        try:
            _CLEAR.write_text(_RESET_PEAK)
            return cls(_status("VmRSS"))
        except (OSError, KeyError, ValueError):
            return None

    def growth(self) -> int:
        """Bytes that the process held more at its peak than at the start."""
        return max(0, _status("VmHWM") - self.before)


def give_back() -> None:
    """Gives memory that is free inside of this process to the system, where its C library can (glibc).

    A compiler leaves more than 100 MB in pieces between what lives on; no later request would fill them.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _status(field: str) -> int:
    fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(fields[field].split()[0]) * 1024
