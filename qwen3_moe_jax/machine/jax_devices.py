"""JAX's devices, and one line where it does not start: the variable that is the cause, not a traceback."""

import importlib
import os
import re
import warnings
from collections.abc import Callable
from typing import Any

from qwen3_moe_jax.core.errors import BackendUnavailableError, MemoryPlanError, SettingError
from qwen3_moe_jax.machine.folders import check_writable, readable_cache
from qwen3_moe_jax.machine.headroom import main_memory
from qwen3_moe_jax.machine.xla_flags import check_xla_flags

PLATFORMS_VARIABLE = "JAX_PLATFORMS"
CARDS_VARIABLE = "CUDA_VISIBLE_DEVICES"
PREALLOCATE_VARIABLE = "XLA_PYTHON_CLIENT_PREALLOCATE"
SHARE_VARIABLE = "XLA_CLIENT_MEM_FRACTION"
OLD_SHARE_VARIABLE = "XLA_PYTHON_CLIENT_MEM_FRACTION"

CARD_SHARE = 0.95
"""Of a card's memory, what arrays may take: XLA's own limit of 0.75 would refuse a model of 18.5 GB on a card
of 24 GB. The rest is the driver's, compiled programs' and the screen's."""

SERVER_SHARE = 0.92
"""Of a card's memory, what a server takes at its start."""

_WITH_A_SETTING = "JAX does not start with "

MIN_COMPILE_SECONDS = 0.1
"""Programs that take longer to compile are kept on disk."""


def import_jax() -> Any:
    """The module: imported late, for JAX is slow to start and the other backends do not need it.

    Raises:
      SettingError: JAX cannot read one of its own variables.
      MemoryPlanError: its libraries do not fit what ``ulimit`` allows.
      BackendUnavailableError: it is not there, or broken.
    """
    try:
        return importlib.import_module("jax")
    except Exception as error:
        raise _fault(error) from error


def set_memory_policy() -> None:
    """Lets XLA take of a card what it needs, up to ``CARD_SHARE``; a user's own settings stay."""
    os.environ.setdefault(PREALLOCATE_VARIABLE, "false")
    _limit_share(CARD_SHARE)


def take_card() -> None:
    """Lets XLA take ``SERVER_SHARE`` of a card in one piece when it starts; a user's own settings stay.

    A pool that grows does so by pieces of 1, 2, 4, ... GB, each too small for what is left of the others:
    the keys of a server's cache are one array of up to half of the card.
    """
    os.environ.setdefault(PREALLOCATE_VARIABLE, "true")
    _limit_share(SERVER_SHARE)


def _limit_share(share: float) -> None:
    if not os.environ.get(OLD_SHARE_VARIABLE):  # JAX refuses both
        os.environ.setdefault(SHARE_VARIABLE, str(share))


def simulate_devices(count: int) -> None:
    """Makes JAX's CPU look like at least ``count`` devices; of no effect on a GPU, or when JAX has started.

    They share its cores and its memory, so they show what a mesh computes and not how fast.
    """
    config = import_jax().config
    try:
        if count > int(config.jax_num_cpu_devices):
            config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # JAX has started: whoever needs more devices says how many there are
        return


def jax_devices() -> list[Any]:
    """JAX's devices (``jax.Device``) of this process, its default one first.

    Raises:
      BackendUnavailableError: JAX does not start; the line names the setting that is the cause.
    """
    return _devices(lambda jax: jax.local_devices())


def all_devices() -> list[Any]:
    """Those of all processes, in an order that is the same in each: process by process.

    Raises:
      BackendUnavailableError: as ``jax_devices``.
    """
    return _devices(lambda jax: sorted(jax.devices(), key=lambda d: d.process_index))


def _devices(of: Callable[[Any], list[Any]]) -> list[Any]:
    set_memory_policy()
    check_xla_flags()
    try:
        return of(import_jax())
    except (BackendUnavailableError, MemoryPlanError):
        raise
    except Exception as error:  # a plugin that is broken, or absent, raises whatever it likes
        raise _fault(error) from error


def _fault(error: Exception) -> Exception:
    """What to raise for an error of JAX."""
    if "failed to map segment" in str(error) or "Cannot allocate memory" in str(error):
        return MemoryPlanError(f"JAX's libraries do not fit {main_memory()}: raise the limit")
    line = why_jax_does_not_start(error)
    return (SettingError if line.startswith(_WITH_A_SETTING) else BackendUnavailableError)(line)


def why_jax_does_not_start(error: Exception) -> str:
    """One line: the setting or the platforms that are asked for, or what JAX says."""
    said = re.sub(r"\s+", " ", f"{error}" or type(error).__name__)[:300]
    if setting := re.search(r"environment '(\w+)'|for JAX flag (jax_\w+)", said):
        variable = setting[1] or setting[2].upper()
        return f"{_WITH_A_SETTING}{variable} ({said}): correct {variable} or unset it"
    wanted, origin = platforms_wanted()
    if wanted in ("", "cpu"):  # a processor is always there: something else is the cause
        return f"JAX does not start: {said}"
    return (
        f"{_WITH_A_SETTING}{origin}={wanted} ({said}): {advice_for(wanted)}unset it, or use "
        f"{PLATFORMS_VARIABLE}=cpu"
    )


def platforms_wanted() -> tuple[str, str]:
    """The platforms that JAX is told to use, and by what; ("", "") where it chooses."""
    in_environment = os.environ.get(PLATFORMS_VARIABLE, "")
    try:
        configured = str(import_jax().config.jax_platforms or "")
    except Exception:  # a broken installation: the variable is all that there is
        configured = in_environment
    if not configured or configured == in_environment:
        return in_environment, PLATFORMS_VARIABLE if in_environment else ""
    return configured, "jax.config.jax_platforms"


def advice_for(platforms: str) -> str:
    """What to install for a platform that is asked for; "" where that is of no use."""
    if {"cuda", "gpu"} & set(platforms.split(",")):
        return "install the plugin (pip install 'qwen3-moe-jax[cuda13]'), "
    return ""


def enable_compilation_cache() -> None:
    """Keeps compiled programs on disk between runs, unless the user has chosen a place already."""
    config = import_jax().config
    chosen = config.jax_compilation_cache_dir
    if chosen is not None:
        check_writable(chosen)
    elif config.jax_enable_compilation_cache and (folder := readable_cache("xla")):
        config.update("jax_compilation_cache_dir", str(folder))
        config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
    # what fails later (a disk that fills up) costs time alone: JAX would say so for each program
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache entry")
