"""``bisect``: the first stage at which a backend departs from the reference, and why.

Every stage is judged from the inputs that the backend itself had (``judge``),
so that the first departure is where the fault is, not where its consequences
show. The prompt is run in several ways, the telling one first: with the expert
layer opened, as in production, token by token, and over a length that takes
every chunk size; a fault that only one of them has is still found.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen3_moe_jax.convert.source import ModelSource
from qwen3_moe_jax.core.runner import Runner
from qwen3_moe_jax.core.stages import INSIDE_EXPERTS, STAGES
from qwen3_moe_jax.inspection.trace import Trace, ordered_keys, stage_text, trace
from qwen3_moe_jax.parity import metrics
from qwen3_moe_jax.parity.causes import Cause, explain
from qwen3_moe_jax.parity.judge import FUSED_STAGES, Judgement, StageJudge

CHUNK = 16
SINGLE_TOKENS = 6
LONG_TOKENS = 560
"""More than the largest prefill chunk."""

LONG_JUDGED_TOKENS = 48
MAX_LONG_BYTES = 1 << 29
"""Stages of the long prompt are only captured when they take less than this."""


@dataclass(frozen=True)
class Departure:
    """Where a backend goes wrong.

    Attributes:
      run: which way of running the prompt shows it.
      judgement: the stage, its layer, tensor and type, and by how much it is off.
      cause: why.
    """

    run: str
    judgement: Judgement
    cause: Cause

    @property
    def stage(self) -> str:
        return self.judgement.stage

    @property
    def layer(self) -> int | None:
        return self.judgement.layer

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        j = self.judgement
        return {
            "name": j.where,
            "stage": j.stage,
            "layer": j.layer,
            "tensor": j.tensor,
            "type": j.type,
            "expert": self.cause.expert,
            "rows": list(self.cause.rows),
            "cause": self.cause.words,
            "proven": self.cause.proven,
            "run": self.run,
            "error_in_sigmas": j.sigmas if np.isfinite(j.sigmas) else str(j.sigmas),
            "nmse": j.nmse if np.isfinite(j.nmse) else str(j.nmse),
            "nonfinite": j.nonfinite,
            "token": j.token,
            "wrong_share": j.wrong,
        }

    def in_words(self) -> str:
        """A few lines for people."""
        j = self.judgement
        what = j.where if j.layer is None else f"{j.where} (layer {j.layer}, {j.stage})"
        lines = [f"first departure: {what}"]
        if j.tensor:
            expert = f", expert {self.cause.expert}" if self.cause.expert is not None else ""
            lines.append(f"tensor: {j.tensor} ({j.type}){expert}")
        lines.append(f"cause: {self.cause.words}{'' if self.cause.proven else ' (a guess)'}")
        if not j.missing:
            size = f"{j.sigmas:.3g} times the rounding's sigma" if np.isfinite(j.sigmas) else "not finite"
            lines.append(
                f"error: {size}, NMSE {j.nmse:.2g}, {j.wrong:.2%} of its values, seen in: {self.run}"
            )
        return "\n".join(lines)


def bisect(source: ModelSource, runner: Runner, token_ids: Sequence[int]) -> Departure | None:
    """The first stage at which a backend departs from the reference, or None.

    Args:
      source: the true weights.
      runner: the backend under suspicion.
      token_ids: a prompt; 40 tokens are plenty, the first 560 are used.
    """
    ids = np.asarray(token_ids, np.int32)[: min(LONG_TOKENS, runner.max_context)]
    chunks = {"chunk_sizes": (CHUNK,)}
    short = ids[: 2 * CHUNK + CHUNK // 2]
    runs = [
        ("the expert layer opened", short, tuple(STAGES), chunks),
        ("as in production", short, FUSED_STAGES, chunks),
    ]
    runs.append(("token by token", short[:SINGLE_TOKENS], FUSED_STAGES, {"chunk_sizes": (1,)}))
    if len(ids) > len(short):
        runs.append(("a long prompt", ids, _long_capture(source, len(ids)), {}))
    for run, prompt, capture, extra in runs:
        recorded = trace(runner, prompt, capture, **extra)
        maximum = LONG_JUDGED_TOKENS if len(prompt) > len(short) else None
        found = bisect_trace(source, recorded, run=run, max_tokens=maximum)
        if found:
            return found
    return None


def _long_capture(source: ModelSource, tokens: int) -> tuple[str, ...]:
    """Stages of a long prompt that fit in memory: those around the fused experts, or the input alone."""
    config = source.config
    a_token = (
        6 * config.hidden_size + 8 * config.num_attention_heads * config.head_dim + 3 * config.num_experts
    )
    nbytes = 4 * tokens * (config.num_hidden_layers * a_token + config.vocab_size)
    return FUSED_STAGES if nbytes <= MAX_LONG_BYTES else ("inp_embd",)


def bisect_trace(
    source: ModelSource, recorded: Trace, *, run: str = "a recorded trace", max_tokens: int | None = None
) -> Departure | None:
    """The first stage of a recorded trace that departs, or None.

    Args:
      source: the true weights.
      recorded: stages that any machine recorded of this model.
      run: how to call it in the result.
      max_tokens: positions to judge; None is all.
    """
    judge = StageJudge(source, recorded.facts, recorded.token_ids, recorded.forward, max_tokens=max_tokens)
    first = judge.first_departure()
    if first is None:
        return None
    cause = explain(judge, first)
    opened = any(name in INSIDE_EXPERTS for name, _ in recorded.forward.stages)
    if first.stage == "ffn_moe_out" and not opened and not cause.proven:
        cause = Cause(
            "the fused expert operation is wrong; the same experts one operation at a time are right"
        )
    return Departure(run, first, cause)


@dataclass(frozen=True)
class Comparison:
    """One stage of two traces.

    Attributes:
      name: "ffn_norm-12".
      nmse: squared difference over the first's square.
      cosine: minimum over positions.
    """

    name: str
    nmse: float
    cosine: float


def compare(good: Trace, other: Trace) -> list[Comparison]:
    """Every stage that two traces of one prompt share, with how far apart they are there.

    Errors add up from stage to stage here; ``bisect_trace`` tells whose fault each is.

    Raises:
      ValueError: the traces are of different prompts.
    """
    if not np.array_equal(good.token_ids, other.token_ids):
        raise ValueError("the traces are of different prompts: record both with the same text")
    rows = []
    for key in ordered_keys(good.forward.stages.keys() & other.forward.stages.keys()):
        a, b = good.forward.stages[key], other.forward.stages[key]
        if a.shape != b.shape:
            rows.append(Comparison(stage_text(key), float("inf"), metrics.WORST_COSINE))
            continue
        a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
        nmse = float(metrics.nmse(b.reshape(1, -1), a.reshape(1, -1))[0])
        rows.append(Comparison(stage_text(key), nmse, float(metrics.cosine(a, b).min())))
    return rows
