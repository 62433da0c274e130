"""``XLA_FLAGS``: XLA ends the process for a flag that it does not know, so another one tries them first.

The trial costs 0.15 s of CPU time, once for each text of the variable and each version of jaxlib; nothing
where the variable is not set, or JAX has started.
"""

import hashlib
import importlib.metadata
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

from qwen3_moe_jax.core.errors import SettingError
from qwen3_moe_jax.machine.folders import readable_cache
from qwen3_moe_jax.machine.remembered import remember, remembered

VARIABLE = "XLA_FLAGS"
CACHE_NAME = "xla_flags.json"
TRIAL = "from jaxlib import xla_client; xla_client.CompileOptions()"
"""The first thing in JAX that reads the flags."""

MAX_SECONDS = 120
"""Of a trial that does not end: the flags are taken then as they are."""

_REFUSAL = re.compile(
    r"\] ((?:Unknown flags?|Could not open file|Couldn't interpret value|Flag parsing)\b.*)"
)


def check_xla_flags() -> None:
    """Raises SettingError for flags with which XLA would end this process."""
    flags = os.environ.get(VARIABLE, "")
    if flags.strip() and not _has_started() and (refusal := _refusal(flags, flags_file(flags))):
        raise SettingError(f"JAX does not start with {VARIABLE} ({refusal}): correct {VARIABLE} or unset it")


def _has_started() -> bool:
    """Whether JAX has made its clients, and so has read the flags."""
    bridge = sys.modules.get("jax._src.xla_bridge")
    return bridge is not None and bridge.backends_are_initialized()


def flags_file(flags: str) -> bytes:
    """The content of a file that ``XLA_FLAGS`` may name in place of flags; empty where there is none."""
    try:
        return b"" if not flags or flags.strip().startswith("-") else Path(flags).read_bytes()
    except (OSError, ValueError):
        return b""


@cache
def _refusal(flags: str, content: bytes) -> str:
    """What XLA says of flags that it does not take; "" for others."""
    facts = [flags.encode("utf-8", "surrogateescape"), content, _version().encode()]
    key = hashlib.sha256(b"\0".join(facts)).hexdigest()
    folder = readable_cache()
    path = folder and folder / CACHE_NAME
    if path and key in remembered(path):
        return ""
    said = _try()
    if said is None:
        return ""
    if path and not said:
        remember(path, key)
    return said


def _version() -> str:
    try:
        return importlib.metadata.version("jaxlib")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _try() -> str | None:
    """XLA's own words for its end; "" if it takes the flags, None where that cannot be known."""
    command = [sys.executable, "-P", "-c", TRIAL]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, errors="replace", timeout=MAX_SECONDS
        )
    except (OSError, subprocess.SubprocessError):
        return None
    if done.returncode == 0:
        return ""
    found = _REFUSAL.search(done.stderr)
    return " ".join(found[1].split())[:300] if found else None
