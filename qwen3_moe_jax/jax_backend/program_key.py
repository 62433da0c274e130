"""What a compiled program depends on besides its arguments, as text that is the same in every process."""

import dataclasses
import enum
import functools
import hashlib
import json
import os
import platform
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qwen3_moe_jax.core.code_version import code_version
from qwen3_moe_jax.machine.xla_flags import flags_file


def fingerprint(value: Any) -> Any:
    """Returns ``value`` as plain lists, strings and numbers, the same in every process.

    Raises:
      TypeError: nothing says what this value is made of.
    """
    match value:
        case enum.Enum():
            return [type(value).__qualname__, value.name]
        case None | bool() | int() | float() | str():
            return value
        case np.dtype() | type():
            return str(value)
        case Mapping():
            return ["map", *sorted([str(k), fingerprint(v)] for k, v in value.items())]
        case frozenset() | set():
            return ["set", *sorted(json.dumps(fingerprint(v), default=str) for v in value)]
        case list() | tuple():
            return [fingerprint(v) for v in value]
        case np.ndarray() | jax.Array():
            array = np.asarray(value)
            return ["array", array.shape, str(array.dtype), hashlib.sha256(array.tobytes()).hexdigest()]
        case functools.partial():
            return ["partial", fingerprint(value.func), fingerprint(value.args), fingerprint(value.keywords)]
        case _:
            return _fingerprint_of_object(value)


def _fingerprint_of_object(value: Any) -> list[Any]:
    if not (getattr(value, "__module__", None) or "").startswith(_OWN):
        raise TypeError(f"{type(value).__qualname__} has no fingerprint: its programs are not kept on disk")
    if dataclasses.is_dataclass(value):
        fields = [f.name for f in dataclasses.fields(value) if f.compare and f.name not in ("parent", "name")]
        return [type(value).__qualname__, *([n, fingerprint(getattr(value, n))] for n in fields)]
    if callable(value) and "<" not in getattr(value, "__qualname__", "<"):
        return [value.__module__, value.__qualname__]
    raise TypeError(f"{value!r} has no fingerprint: its programs are not kept on disk")


_OWN = __name__.partition(".")[0]
"""The package whose code is part of every key: what a function or class of others does is not known."""

TRACE_SETTINGS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_numpy_dtype_promotion",
    "jax_debug_nans",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
)
"""JAX's settings that change what a function is traced to, when they change between two calls."""

_WITHOUT_EFFECT = ("cache", "dump", "log", "traceback", "explain", "profiler", "check_tracer_leaks")
"""Words in the names of JAX's settings that do not change a program."""


def digest(facts: Mapping[str, Any]) -> str:
    """Returns the name in the store of what depends on ``facts`` alone: their SHA-256."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def changes_programs(name: str) -> bool:
    """Whether programs may depend on a setting of JAX."""
    return not any(word in name for word in _WITHOUT_EFFECT)


def environment() -> dict[str, Any]:
    """Returns what this process and machine add to a key: versions, device, driver, settings, code."""
    settings = {
        name: str(value) for name, value in sorted(jax.config.values.items()) if changes_programs(name)
    }
    return {**_fixed_environment(), "settings": settings}


@functools.cache
def _fixed_environment() -> dict[str, Any]:
    device = jax.local_devices()[0]
    return {
        "versions": {name: _version(name) for name in _PACKAGES},
        "python": sys.version,
        "machine": [platform.system(), platform.machine(), _processor() if device.platform == "cpu" else ""],
        "device": [device.platform, device.device_kind, str(getattr(device, "compute_capability", ""))],
        "cores": getattr(device, "core_count", os.cpu_count()),
        "runtime": device.client.platform_version,
        "driver": _first_line("/proc/driver/nvidia/version"),
        "flags": [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NPROC")],
        "flags in a file": flags_file(os.environ.get("XLA_FLAGS", "")).decode(errors="replace"),
        "code": code_version(),
    }


_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "jax-cuda12-plugin",
    "jax-cuda12-pjrt",
    "jax-cuda13-plugin",
    "jax-cuda13-pjrt",
)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text().partition("\n")[0]
    except OSError:
        return ""


def _processor() -> str:
    """The processor's model and instructions, which XLA compiles for."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "|".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))
