"""The load gate: a check of seconds when a backend first meets a file.

A few tokens go through a few layers: the first of every mix of quantization
types, and the last. Every stage is judged from its own inputs (``judge``), on a
sample of each matrix's rows, so that the cost does not grow with the model.
What passed is remembered by file, code, backend and device.
"""

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwen3_moe_jax.convert.source import ModelSource
from qwen3_moe_jax.core.code_version import code_version
from qwen3_moe_jax.core.errors import ParityError
from qwen3_moe_jax.core.runner import Runner
from qwen3_moe_jax.machine import processes
from qwen3_moe_jax.machine.folders import readable_cache
from qwen3_moe_jax.machine.remembered import remember, remembered
from qwen3_moe_jax.machine.threads import Workers, one_thread_per_product
from qwen3_moe_jax.parity.judge import FUSED_STAGES, Judgement, StageJudge

TOKENS = 4
JUDGED_TOKENS = 2
JUDGED_ROWS = 128

FEW_LAYERS = 8
"""A model of no more layers runs whole: its time is compilation, of a program that verify needs too."""

WORKERS = 4
"""Threads that judge: a layer of Qwen3-30B-A3B is 50 million weights of 16 experts."""

CACHE_NAME = "gates.json"


@dataclass(frozen=True)
class GateResult:
    """What the check found.

    Attributes:
      layers: the layers that ran.
      stages: how many stages were judged.
      departures: the stages that were wrong, in the order of the forward pass.
      seconds: how long it took, compilation included.
    """

    layers: tuple[int, ...]
    stages: int
    departures: tuple[Judgement, ...]
    seconds: float


def gate_layers(source: ModelSource) -> tuple[int, ...]:
    """The first layer of every mix of quantization types, and the last; all of a model of a few layers."""
    if source.config.num_hidden_layers <= FEW_LAYERS:
        return tuple(range(source.config.num_hidden_layers))
    first: dict[tuple, int] = {}
    for layer in range(source.config.num_hidden_layers):
        prefix = f"layers.{layer}."
        mix = tuple(t for path, t in source.types.items() if path.startswith(prefix))
        first.setdefault(mix, layer)
    return tuple(sorted({*first.values(), source.config.num_hidden_layers - 1}))


def first_forward(source: ModelSource) -> tuple[int, frozenset[str], tuple[int, ...] | None]:
    """What :func:`inspect` will ask of a runner: tokens, stages, layers (None for all)."""
    layers = gate_layers(source)
    is_part = len(layers) < source.config.num_hidden_layers
    return TOKENS, frozenset(FUSED_STAGES), layers if is_part else None


def layers_option(runner: Runner, source: ModelSource) -> dict[str, Any]:
    """The option of ``forward`` that runs the gate's layers alone; empty where every layer has to run."""
    layers = first_forward(source)[2]
    return {} if layers is None else {"layers": layers}


def inspect(runner: Runner, source: ModelSource) -> GateResult:
    """Runs the check, whatever is remembered."""
    began = time.perf_counter()
    options = layers_option(runner, source)
    layers = tuple(options.get("layers") or range(source.config.num_hidden_layers))
    vocab = source.config.vocab_size
    token_ids = np.arange(1, TOKENS + 1) * vocab // (2 * TOKENS)
    forward = runner.forward(token_ids, capture=FUSED_STAGES, **options)
    judge = StageJudge(
        source,
        runner.describe(),
        token_ids,
        forward,
        layers=layers,
        max_rows=JUDGED_ROWS,
        max_tokens=JUDGED_TOKENS,
        workers=Workers.one_a_processor(WORKERS),
    )
    with one_thread_per_product():
        judgements = list(judge.judgements())
    departures = tuple(j for j in judgements if j.departs)
    return GateResult(layers, len(judgements), departures, time.perf_counter() - began)


def check_once(runner: Runner, source: ModelSource, cache_dir: Path | None = None) -> GateResult | None:
    """Checks a backend that meets a file for the first time; returns None if it has passed before.

    Args:
      runner: the loaded backend.
      source: the file that it was loaded from.
      cache_dir: where to remember; None is the user's cache folder.

    Raises:
      ParityError: a stage departs; nothing is remembered.
    """
    folder = cache_dir or readable_cache()
    path = folder and folder / CACHE_NAME
    key = gate_key(runner, source)
    is_known = path is not None and key in remembered(path)
    if all(processes.everyones("passed gate", is_known)):
        return None
    result = inspect(runner, source)
    if result.departures:
        raise ParityError(_explain(runner, result.departures[0]))
    if path:
        remember(path, key)
    return result


def gate_key(runner: Runner, source: ModelSource) -> str:
    """Changes with the file, this project's code, the backend's settings, its device and NumPy."""
    facts = json.dumps(runner.describe(), sort_keys=True, default=str)
    return hashlib.sha256(
        f"{source.identity}\n{code_version()}\n{np.__version__}\n{facts}".encode()
    ).hexdigest()


def _explain(runner: Runner, departure: Judgement) -> str:
    tensor = f" ({departure.tensor}, {departure.type})" if departure.tensor else ""
    return (
        f"the {runner.name} backend computes wrongly on this machine: {departure.where}{tensor} is the first "
        "stage that departs from the reference; `qwen3-moe bisect` names the cause, gate=False loads anyway"
    )
