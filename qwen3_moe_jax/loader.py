"""Which file, which backend, how much memory: from a path to a runner. ``api.load`` makes a model of it."""

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, NamedTuple

from qwen3_moe_jax.convert.manifest import MANIFEST_NAME
from qwen3_moe_jax.convert.progress import ProgressCallback
from qwen3_moe_jax.convert.regular_file import check_file_name
from qwen3_moe_jax.convert.source import ModelSource
from qwen3_moe_jax.core.arguments import check_number, check_text, wrong_kind
from qwen3_moe_jax.core.code_version import code_version
from qwen3_moe_jax.core.errors import BackendUnavailableError, MemoryPlanError, OptionError
from qwen3_moe_jax.core.mesh import AUTO_MESH, mesh_sizes
from qwen3_moe_jax.core.near_names import near_names
from qwen3_moe_jax.core.runner import Runner
from qwen3_moe_jax.core.runner_arguments import NO_LOOKUP
from qwen3_moe_jax.hub import names
from qwen3_moe_jax.hub.listing import files_in
from qwen3_moe_jax.jax_backend import spare_workers
from qwen3_moe_jax.machine import processes
from qwen3_moe_jax.machine.cuda import start_driver
from qwen3_moe_jax.machine.folders import programs_folder
from qwen3_moe_jax.machine.headroom import MAIN_MEMORY, Headroom, available_memory, main_memory
from qwen3_moe_jax.machine.jax_devices import all_devices, import_jax, jax_devices, simulate_devices
from qwen3_moe_jax.machine.kernels import AUTO, CHOICES, capability_of, is_before_ampere
from qwen3_moe_jax.machine.memory import MIN_CONTEXT, MemoryPlan
from qwen3_moe_jax.machine.nvidia import may_have_cards, nvidia_gpus
from qwen3_moe_jax.machine.probe import cards_are_hidden_by, environment_hides_cards
from qwen3_moe_jax.wgpu_backend.adapter import list_adapters, may_have_hardware

BACKENDS = ("jax", "wgpu", "reference")
DTYPES = ("float32", "bfloat16")
KV_CACHES = ("float32", "float16", "bfloat16", "int8")

FLOAT32_BYTES = 4

DEFAULT_CONTEXT = 4096
"""Tokens of KV cache when nothing else is asked for; a model with less takes its own."""

Context = int | Literal["fit"] | None
"""Tokens; "fit" is what ``fitting_context`` says, None is DEFAULT_CONTEXT or the model's own, if less."""

SHARE_OF_CARD, SHARE_OF_MAIN = 0.9, 0.5
"""What "fit" takes of the memory that the weights leave: other programs use main memory too."""

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}

SLACK_TOKENS = 1024
"""A cache has room for one more chunk of a prompt, in whole tiles."""


def embedded_model() -> Path:
    """The small real model that comes with the package."""
    return Path(str(files("qwen3_moe_jax") / "assets" / "tiny-coder-Q4_K_M.gguf"))


def model_path(path: str | os.PathLike[str] | None, *, quiet: bool = False) -> Path:
    """The file or folder that a name means, downloaded if it is on a hub; None is the embedded model.

    Args:
      path: a path (``~`` is the home folder; a folder with one model in it stands for that model),
        ``hf:OWNER/REPO[:QUANT]``, or the address of a model's page or file.
      quiet: a download says nothing.

    Raises:
      KindError: the path is no text and no path.
      ValueError: it is empty, as a variable that is not set is, or names nothing.
      ModelFileError: ``E_OPEN``, no file can have this name.
      HubError, MemoryPlanError, OutputFileError: as ``hub.pull.pull``.
    """
    if path is None:
        return embedded_model()
    if not isinstance(path, str | os.PathLike):
        raise wrong_kind("the model's path", path, "a text or a path")
    text = os.fsdecode(path)
    if not text:
        raise ValueError("the model's path is empty (a variable that is not set?): name a .gguf file")
    found = Path(os.path.expanduser(text))
    if os.path.exists(found):  # False, too, for a name that no file can have
        return _in_folder(found)
    if (name := names.parse(text)) is not None:
        from qwen3_moe_jax.hub.pull import pull

        return pull(name, quiet=quiet, refresh=False)
    check_file_name(found)
    if guess := names.guess(text):
        raise OptionError(f"there is no file {text}; did you mean {guess}?")
    if near := _near(found):
        raise OptionError(f"there is no file {text}; did you mean {' or '.join(near)}?")
    return found


def _near(path: Path) -> list[str]:
    """Paths of models beside one that is not there, whose names are like its own."""
    try:
        beside = {p.name: p for p in path.parent.iterdir() if p.suffix == ".gguf" or p.is_dir()}
    except OSError:
        return []
    found = (beside[name] for name in near_names(path.name, beside, cutoff=0.75))
    return [str(p) for p in found if p.is_file() or (p / MANIFEST_NAME).exists()]


def _in_folder(path: Path) -> Path:
    """The one GGUF model of a folder that is no checkpoint; else the path itself.

    Raises:
      OptionError: the folder has several models.
    """
    if not path.is_dir() or (path / MANIFEST_NAME).exists():
        return path
    variants = files_in(path, deep=False)
    if len(variants) > 1:
        listed = ", ".join(v.files[0].path for v in variants)
        raise OptionError(f"{path} has {len(variants)} models: name one of {listed}")
    return path / variants[0].files[0].path if variants else path


class Choice(NamedTuple):
    """What ``backend="auto"`` means on a machine.

    Attributes:
      backend: one of BACKENDS.
      reason: in words.
      fallbacks: what is not used though it is there, one line each.
    """

    backend: str
    reason: str
    fallbacks: tuple[str, ...] = ()


def choose_backend(kernels: str = AUTO, mesh: str | None = None, adapter: str | None = None) -> Choice:
    """An NVIDIA GPU through JAX; else a hardware WebGPU adapter; else JAX on the CPU.

    A GPU before Ampere has no kernels: a hardware WebGPU adapter is faster than XLA's operations.

    Args:
      kernels: one of ``machine.kernels.CHOICES``; a named one is JAX's.
      mesh: as for ``make_runner``; a named one is JAX's.
      adapter: as for ``make_runner``; a named one is wgpu's.
    """
    if mesh is not None:
        return Choice("jax", f"a mesh is asked for: {mesh}")
    if kernels != AUTO:
        return Choice("jax", f"kernels {kernels} are asked for")
    if adapter is not None:
        return Choice("wgpu", f"a WebGPU adapter is asked for: {adapter}")
    why, fallbacks = "no NVIDIA GPU", ()
    if nvidia := bool(nvidia_gpus()):
        hidden = cards_are_hidden_by()
        if hidden:
            why = f"the NVIDIA GPU is hidden by {hidden}"
        elif jax_sees_gpu():
            capability = capability_of(jax_devices()[0])
            if not is_before_ampere(capability):
                return Choice("jax", "JAX sees an NVIDIA GPU")
            why = f"the NVIDIA GPU, {capability}, is before Ampere (8.0): no kernels for it"
        else:
            why = "JAX does not see the NVIDIA GPU"
            fallbacks = (f"{why}: run `qwen3-moe doctor`",)
    adapters = list_adapters() if nvidia or may_have_hardware() else []
    hardware = [adapter for adapter in adapters if not adapter.software]
    if hardware:
        return Choice("wgpu", f"{why}; WebGPU adapter {hardware[0].summary}", fallbacks)
    return Choice("jax", f"{why}, no WebGPU hardware", fallbacks)


def start_gpu() -> None:
    """Starts JAX where there is an NVIDIA GPU for it: a driver takes a second, not the interpreter's.

    Failures are left to whoever asks for the devices.
    """
    if not may_have_cards():
        return
    with ThreadPoolExecutor(3) as pool:
        if not environment_hides_cards():
            pool.submit(start_driver)
        pool.submit(code_version)  # every program's key has it
        asked = pool.submit(_start_spares)
        is_hidden = cards_are_hidden_by()  # imports JAX
        if asked.result() and not is_hidden:
            jax_sees_gpu()
        else:
            spare_workers.end()


def _start_spares() -> bool:
    """Starts spare compilers where there is a card, while JAX is imported; says whether there is one."""
    if not nvidia_gpus():  # a process of 0.2 s
        return False
    if not environment_hides_cards() and (folder := programs_folder()) is not None:
        spare_workers.begin(folder)
    return True


def native_kernels_against() -> str | None:
    """Why the jax backend does not take a CPU's native kernels by itself, or None where it does."""
    from qwen3_moe_jax.jax_backend.native import Native

    return Native.begin(jax_devices()[0], AUTO, has_dtype=False).reason()


def jax_sees_gpu() -> bool:
    """Whether the jax backend is going to run on a GPU; False where JAX does not start."""
    try:
        return any(device.platform == "gpu" for device in jax_devices())
    except (BackendUnavailableError, MemoryPlanError):
        return False


def make_runner(
    source: ModelSource,
    backend: str,
    *,
    max_context: Context = None,
    dtype: str | None = None,
    kv_cache: str | None = None,
    kernels: str = AUTO,
    adapter: str | None = None,
    mesh: str | None = None,
    prompt_lookup: bool = False,
    progress: ProgressCallback | None = None,
    check: Callable[[int], object] | None = None,
    **first: Any,
) -> Runner:
    """The named backend with the model loaded.

    Args:
      source: an open model.
      backend: one of BACKENDS.
      max_context: tokens of KV cache, as ``Context``.
      dtype: matrix operands on jax, one of DTYPES, or None for what suits the device; reference computes in
        float32, and so does wgpu but for long prompts on NVIDIA GPUs, where "float32" asks for it.
      kv_cache: dtype of the KV cache on jax, one of KV_CACHES, or None for what suits the device.
      kernels: of the jax backend, one of ``machine.kernels.CHOICES``.
      adapter: part of a WebGPU adapter's name.
      mesh: how jax splits the model over devices, such as "tp=2,ep=1", or "auto"; None is one device.
      prompt_lookup: whether what is written will be guessed from the text before it (jax).
      progress: told how far loading is.
      check: called with the tokens of KV cache once the arguments are checked; what it raises ends the load.
      first: what will be asked first, for a backend that compiles: ``first_prompt`` and ``first_forward``
        of ``JaxRunner``.

    Raises:
      ValueError: an unknown backend, dtype or name of kernels.
      OptionError: a context that the model does not have, or a mesh that it cannot be split over.
      BackendUnavailableError: the backend cannot run here.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is not one of auto, {', '.join(BACKENDS)}")
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if kv_cache not in (None, *KV_CACHES):
        raise ValueError(f"kv_cache {kv_cache!r} is not one of {', '.join(KV_CACHES)}")
    if adapter is not None:
        check_text("adapter", adapter)
        if backend != "wgpu":
            raise BackendUnavailableError(f"the {backend} backend takes no WebGPU adapter: leave out adapter")
    if kv_cache is not None and backend != "jax":
        raise BackendUnavailableError(f"the {backend} backend chooses its KV cache: leave out kv_cache")
    if kernels not in CHOICES:
        raise ValueError(f"kernels {kernels!r} is not one of {', '.join(CHOICES)}")
    if kernels != AUTO and backend != "jax":
        raise BackendUnavailableError(f"the {backend} backend has kernels of its own: leave out kernels")
    if mesh is not None:
        check_mesh(mesh, backend)
        first = {**first, "mesh": mesh}
    if prompt_lookup:
        if backend != "jax":
            raise BackendUnavailableError(NO_LOOKUP.format(backend))
        first = {**first, "prompt_lookup": True}
    max_context = checked_context(source, backend, max_context, kv_cache, mesh)
    if check is not None:
        check(max_context)
    return _MAKERS[backend](source, max_context, dtype, kv_cache, kernels, adapter, progress, first)


def check_mesh(mesh: str, backend: str) -> None:
    """Raises for a text that names no mesh, and a backend that has none.

    Makes JAX's CPU look like as many devices as are named, in all processes together, if it has not started.

    Raises:
      KindError, ValueError: no text, or one that is no mesh.
      BackendUnavailableError: the backend runs on one device.
    """
    check_text("mesh", mesh)
    if backend != "jax":
        raise BackendUnavailableError(f"the {backend} backend runs on one device: leave out mesh")
    if mesh != AUTO_MESH:
        size = math.prod(mesh_sizes(mesh).values())
        simulate_devices(-(-size // processes.count()))


def checked_context(
    source: ModelSource,
    backend: str,
    max_context: Context = None,
    kv_cache: str | None = None,
    mesh: str | None = None,
) -> int:
    """What ``Context`` means for a model on this machine.

    Raises:
      OptionError: a context that the model does not have.
    """
    maximum = source.config.max_position_embeddings
    if max_context == "fit":
        max_context = min(processes.everyones("context", fitting_context(source, backend, kv_cache, mesh)))
    if max_context is not None:
        check_number("max_context", max_context)
    max_context = min(DEFAULT_CONTEXT, maximum) if max_context is None else max_context
    max_context = int(max_context)
    if not 1 < max_context <= maximum:
        raise OptionError(f"a context of {max_context} tokens: this model takes from 2 to {maximum}")
    return max_context


def fitting_context(
    source: ModelSource, backend: str, kv_cache: str | None = None, mesh: str | None = None
) -> int:
    """The context that the file and the memory of this machine allow.

    All of the model's own where its cache takes at most a share of what the weights leave; else the
    power of two below that (few lengths, so that few are compiled). DEFAULT_CONTEXT, or what fits, where
    that share is less. WebGPU does not tell how much memory is free, and beside weights that stay in a file
    memory is for these: DEFAULT_CONTEXT there.
    """
    maximum = source.config.max_position_embeddings
    minimum = min(DEFAULT_CONTEXT, maximum)
    free, itemsize = _place_of_cache(backend, kv_cache)
    if free is None or free.nbytes is None:
        return minimum
    plan = _plan(source, maximum, itemsize, mesh)
    usual = replace(plan, cache=plan.cache * (minimum + SLACK_TOKENS) // maximum)
    if backend == "jax" and mesh is None and usual.settled(free).is_mapped:
        return minimum  # a longer cache pushes weights out of memory
    left = free.nbytes - plan.weights - plan.working
    fits = lambda share: int(left * share) * maximum // plan.cache - SLACK_TOKENS
    found = fits(SHARE_OF_MAIN if free.where == MAIN_MEMORY else SHARE_OF_CARD)
    if found >= maximum:
        return maximum
    found = found if found >= minimum else min(fits(1.0), minimum)
    return 1 << (found.bit_length() - 1) if found >= MIN_CONTEXT else minimum


def _plan(source: ModelSource, length: int, itemsize: int, mesh: str | None) -> MemoryPlan:
    """What one device holds of a model."""
    if mesh is None:
        return MemoryPlan.of(source, length, itemsize)
    from qwen3_moe_jax.jax_backend.placement import Placement
    from qwen3_moe_jax.jax_backend.sharding import named_mesh

    return Placement.of(source, named_mesh(mesh), all_devices()).planned(source, length, itemsize)


def _place_of_cache(backend: str, kv_cache: str | None) -> tuple[Headroom | None, int]:
    """Where a backend keeps its cache, and bytes of a value; None where the memory is not known."""
    if backend == "wgpu":
        return None, FLOAT32_BYTES
    if backend == "reference":
        return main_memory(), FLOAT32_BYTES
    device = jax_devices()[0]
    default = "float32" if device.platform == "cpu" else "float16"
    return available_memory(device), ITEM_BYTES[kv_cache or default]


def _make_jax(source, max_context, dtype, kv_cache, kernels, _adapter, progress, first) -> Runner:
    import_jax()  # whose faults are one line
    from qwen3_moe_jax.jax_backend.runner import JaxRunner
    from qwen3_moe_jax.jax_backend.sharding import named_mesh

    if "mesh" in first:
        first = {**first, "mesh": named_mesh(first["mesh"])}
    return JaxRunner(
        source,
        max_context=max_context,
        compute_dtype=dtype,
        cache_dtype=kv_cache,
        kernels=kernels,
        progress=progress,
        **first,
    )


def _make_wgpu(source, max_context, dtype, _kv_cache, _kernels, adapter, progress, _first) -> Runner:
    _only_float32("wgpu", dtype)
    from qwen3_moe_jax.wgpu_backend.runner import WgpuRunner

    exact = dtype is not None
    return WgpuRunner(source, max_context=max_context, adapter=adapter, exact=exact, progress=progress)


def _make_reference(source, max_context, dtype, _kv_cache, _kernels, _adapter, _progress, _first) -> Runner:
    _only_float32("reference", dtype)
    from qwen3_moe_jax.reference import ReferenceRunner

    MemoryPlan.of(source, max_context, FLOAT32_BYTES).check(main_memory())
    return ReferenceRunner(source, max_context=max_context)


def _only_float32(backend: str, dtype: str) -> None:
    if dtype not in (None, "float32"):
        raise BackendUnavailableError(
            f"the {backend} backend computes in float32 only: leave out dtype={dtype}"
        )


_MAKERS: dict[str, Callable[..., Runner]] = {
    "jax": _make_jax,
    "wgpu": _make_wgpu,
    "reference": _make_reference,
}
