"""Environment variables that a user may set, and which values each can have: looked at before any wait.

``docs/reference/environment.md`` lists them. Not here: folders, names and lists of devices, of which
any text may be one (``QWEN3_MOE_CACHE``, ``CUDA_VISIBLE_DEVICES``), and what JAX reads itself
(``jax_devices``, ``xla_flags``).
"""

import math
import os
import re
from collections.abc import Callable, Iterator

from qwen3_moe_jax.core.errors import SettingError
from qwen3_moe_jax.machine.folders import STORE_VARIABLE
from qwen3_moe_jax.machine.jax_devices import OLD_SHARE_VARIABLE, PREALLOCATE_VARIABLE, SHARE_VARIABLE
from qwen3_moe_jax.machine.threads import VARIABLE as CORES_VARIABLE
from qwen3_moe_jax.machine.xla_flags import check_xla_flags

COMPILERS_VARIABLE = "QWEN3_MOE_COMPILERS"
"""How many other processes may compile, on a CPU too; 0 is none."""

MEMORY_VARIABLE = "QWEN3_MOE_WGPU_MEMORY"
"""Memory that a model may take on a WebGPU adapter, as ``parse_bytes`` reads it."""

NATIVE_VARIABLE = "QWEN3_MOE_NATIVE"
THREADS_VARIABLE = "NPROC"

MAX_THREADS = 4096
"""Of XLA's CPU client: with millions it ends the process."""

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def check_environment() -> None:
    """Raises SettingError for the first variable whose value cannot be; the line names it."""
    for fault in faults():
        raise SettingError(fault)
    check_xla_flags()


def faults() -> Iterator[str]:
    """One line for each variable whose value cannot be, but XLA_FLAGS (``check_xla_flags``)."""
    for name, find in _CHECKS.items():
        value = os.environ.get(name, "")
        if value and (wanted := find(value)):
            yield f"{name}={value}: {wanted}, or unset it"
    if all(os.environ.get(name) for name in (SHARE_VARIABLE, OLD_SHARE_VARIABLE)):
        yield f"{SHARE_VARIABLE} and {OLD_SHARE_VARIABLE} are both set: unset {OLD_SHARE_VARIABLE}"


def parse_bytes(text: str) -> int:
    """``12GiB``, ``12G``, ``500 MB`` or plain bytes (units are powers of 1024).

    Raises:
      ValueError: not a size.
    """
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([kmgt]?)(?:i?b)?\s*", text.lower(), re.ASCII)
    if match is None:
        raise ValueError(f"{text!r} is no size: write for example 12GiB")
    return int(float(match[1]) * _UNITS[match[2]])


def _size(value: str) -> str:
    try:
        return "" if parse_bytes(value) > 0 else "write a size above 0, for example 12GiB"
    except ValueError:
        return "write a size, for example 12GiB"


def _count(minimum: int, maximum: int) -> Callable[[str], str]:
    def find(value: str) -> str:
        is_one = re.fullmatch(r"\s*\d{1,9}\s*", value, re.ASCII) and minimum <= int(value) <= maximum
        return "" if is_one else f"write a whole number from {minimum} to {maximum}"

    return find


def _one_of(*words: str) -> Callable[[str], str]:
    return lambda value: "" if value.strip().lower() in words else f"write {' or '.join(words)}"


def _switch(value: str) -> str:
    """As XLA reads it, which takes FALSE for true."""
    return "" if value in ("true", "True", "1", "false", "False", "0") else "write true or false"


def _share(value: str) -> str:
    try:
        is_one = 0 < float(value) < math.inf
    except ValueError:
        is_one = False
    return "" if is_one else "write a share of the card's memory, such as 0.9"


def _form(value: str) -> str:
    """Of the CPU's kernels, those that there are; whether this processor has one is seen at the load."""
    if value.lower() == "off":
        return ""
    from qwen3_moe_jax.kernels_pallas.native.forms import FORMS  # imports JAX

    return _one_of("off", *(form.name for form in FORMS))(value)


_CHECKS: dict[str, Callable[[str], str]] = {
    COMPILERS_VARIABLE: _count(0, 999),
    CORES_VARIABLE: _count(1, MAX_THREADS),
    MEMORY_VARIABLE: _size,
    NATIVE_VARIABLE: _form,
    STORE_VARIABLE: _one_of("on", "off"),
    THREADS_VARIABLE: _count(1, MAX_THREADS),
    PREALLOCATE_VARIABLE: _switch,
    SHARE_VARIABLE: _share,
    OLD_SHARE_VARIABLE: _share,
}
"""Each says what to write in place of a value that cannot be; "" for one that can."""
