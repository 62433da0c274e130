"""What a model file holds, what will run on it here, what it will take: all from its header, no weight read.

Of a GGUF file that cannot run (another architecture, a type that is not supported) the same is said, as far
as it can be, with the fault.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from qwen3_moe_jax import loader
from qwen3_moe_jax.convert.errors import ModelFileError
from qwen3_moe_jax.convert.ggml_types import BLOCK_FORMATS, GGMLType
from qwen3_moe_jax.convert.gguf_file import GGUFFile
from qwen3_moe_jax.convert.layouts.gpu_tiles import TILED_TYPES
from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.convert.source import ModelSource
from qwen3_moe_jax.convert.tokenizer_metadata import check_tokenizer
from qwen3_moe_jax.machine.estimate import Place, place_of
from qwen3_moe_jax.machine.kernels import NATIVE
from qwen3_moe_jax.machine.memory import MemoryPlan

CONTEXTS = (4096, 32_768)
"""Contexts of which the memory is told, beside the file's own."""

LONGEST_VALUE = 100

PALLAS_TYPES = frozenset(t.name for t in TILED_TYPES)
"""Types that the GPU kernels take."""


def report_on(
    path: str | os.PathLike[str], *, estimates: bool = True, sha256: bool = False
) -> dict[str, Any]:
    """Facts of a model file or a checkpoint, ready for JSON.

    Args:
      path: the file or folder.
      estimates: say what will run here, with memory and rates; a CPU's memory speed is measured in about 1 s.
      sha256: hash the whole file.

    Returns:
      path, nbytes, types, groups, metadata, tensors; ``fault`` and ``advice`` of a file that cannot run, else
      identity, config, rope_scaling, and with ``estimates`` ``here``.

    Raises:
      ModelFileError: nothing can be said of the file.
    """
    try:
        with open_model(path) as source:
            check_tokenizer(source.metadata, source.config.vocab_size)
            return _of_model(source, estimates, sha256)
    except ModelFileError as error:
        if os.path.isdir(path):
            raise
        return _of_foreign(path, error)


def _of_model(source: ModelSource, estimates: bool, sha256: bool) -> dict[str, Any]:
    tensors = [
        {"path": p, "name": s.gguf_name, "type": t.name, "shape": s.shape, "nbytes": _nbytes(t, s.shape)}
        for p, s in source.specs.items()
        for t in [source.types[p]]
    ]
    config = {k: v for k, v in vars(source.config).items() if k != "rope_scaling"}
    scaling = source.config.rope_scaling
    report = {
        "path": str(source.path),
        "nbytes": source.nbytes,
        "identity": source.identity,
        "config": config,
        "rope_scaling": scaling and vars(scaling),
        **_of_tensors(tensors, source.metadata),
        "warnings": list(source.warnings),
    }
    if sha256:
        report["sha256"] = source.sha256()
    if estimates:
        report["here"] = _here(source, place_of(loader.choose_backend().backend))
    return report


def _of_foreign(path: str | os.PathLike[str], fault: ModelFileError) -> dict[str, Any]:
    """What can be said of a GGUF file that cannot run; raises ``fault`` if it is no GGUF file."""
    try:
        file = GGUFFile.open(path)
    except ModelFileError:
        raise fault from None
    with file:
        tensors = [
            {"path": None, "name": t.name, "type": t.type_name, "shape": t.shape, "nbytes": t.nbytes}
            for t in file.tensors.values()
        ]
        report = {"path": str(path), "nbytes": file.nbytes, **_of_tensors(tensors, file.metadata)}
    return {**report, "fault": str(fault), "fault_code": fault.code, "advice": fault.advice}


def _of_tensors(tensors: list[dict[str, Any]], metadata: Any) -> dict[str, Any]:
    return {
        "types": dict(Counter(t["type"] for t in tensors)),
        "groups": groups_of(tensors),
        "metadata": {key: short(value) for key, value in metadata.items()},
        "tensors": tensors,
    }


def groups_of(tensors: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tensors of all layers with one name together: how many of each type, and their bytes."""
    groups: dict[str, dict[str, Any]] = {}
    for t in tensors:
        name = re.sub(r"^blk\.\d+\.", "blk.*.", t["name"])
        group = groups.setdefault(name, {"name": name, "types": Counter(), "nbytes": 0})
        group["types"][t["type"]] += 1
        group["nbytes"] += t["nbytes"]
    return [{**g, "types": dict(g["types"])} for g in groups.values()]


def is_supported(type_name: str) -> bool:
    """Whether this project computes with a ggml type."""
    return type_name in GGMLType.__members__


def _nbytes(kind: GGMLType, shape: tuple[int, ...]) -> int:
    block, weights = BLOCK_FORMATS[kind], 1
    for size in shape:
        weights *= size
    return weights // block.weights * block.nbytes


def _here(source: ModelSource, place: Place) -> dict[str, Any]:
    """What will run on this machine, and estimates of memory and rate by context."""
    longest = source.config.max_position_embeddings
    contexts = sorted({min(context, longest) for context in (*CONTEXTS, longest)})
    types = sorted({t.name for t in source.types.values()})
    return {
        "backend": place.backend,
        "memory": str(place.memory),
        "bandwidth": place.bandwidth,
        "bandwidth_origin": place.origin,
        "implementations": {t: implementation(place, t) for t in types},
        "contexts": [_at(source, place, context) for context in contexts],
    }


def implementation(place: Place, type_name: str) -> str:
    """What is expected to multiply by matrices of a type."""
    if place.backend != "jax":
        return {"wgpu": "wgsl"}.get(place.backend, "numpy")
    if place.on_gpu:
        return place.kernels if type_name in PALLAS_TYPES else "xla"
    if place.kernels == NATIVE:
        from qwen3_moe_jax.kernels_pallas.native.operands import ARRAYS  # imports JAX

        return NATIVE if type_name in {kind.name for kind in ARRAYS} else "xla"
    return place.kernels


def _at(source: ModelSource, place: Place, context: int) -> dict[str, Any]:
    plan = place.settled(MemoryPlan.of(source, context, place.itemsize))
    free = place.memory.nbytes
    return {
        "context": context,
        "weights": plan.weights,
        "cache": plan.cache,
        "total": plan.total,
        "fits": None if free is None else plan.needed <= free,
        "weights_in_a_file": plan.is_mapped,
        "estimated_tokens_per_second": None if plan.is_mapped else place.rate(source, context),
    }


def short(value: object) -> object:
    """Long arrays and texts as a summary."""
    if isinstance(value, list | tuple) and len(value) > 8:
        return f"[{len(value)} values: {', '.join(repr(v) for v in value[:4])}, ...]"
    if isinstance(value, str) and len(value) > LONGEST_VALUE:
        return f"{value[:LONGEST_VALUE]!r}... ({len(value)} characters)"
    return value
