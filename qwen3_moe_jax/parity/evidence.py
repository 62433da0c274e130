"""What the clauses are judged by: runs of the reference and of one backend, each made once and kept."""

from collections.abc import Sequence
from dataclasses import dataclass
from threading import RLock
from typing import Any

import numpy as np

from convert.model_source import ModelSource
from qwen3_moe_jax.parity import metrics
from qwen3_moe_jax.parity.gate import GateResult, forward_options, gate_layers, inspect
from qwen3_moe_jax.parity.judge import FUSED_STAGES, Judgement, StageJudge
from qwen3_moe_jax.parity.recorded import RecordedLogits, recorded_logits
from qwen3_moe_jax.reference import ReferenceRunner
from qwen3_moe_jax.runner import Forward, Runner
from qwen3_moe_jax.sampling import Sampling

FLOAT64_ORACLE_BYTES = 1 << 30
"""The reference computes in float64 for models up to this size, and in float32 above."""

STAGE_TOKENS = 40
STAGE_CHUNK = 16
"""Stages are judged on a prompt of several chunks, so that what is carried from one to the next is seen."""

SINGLE_TOKENS = 6
WRITTEN_TOKENS = 24
PROMPT_TOKENS = 24

ROWS_AT_A_TIME = 128


_ONCE = RLock()


class once:
    """A property that is computed once, also when several threads ask for it."""

    def __init__(self, compute):
        self._compute = compute
        self.__doc__ = compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        with _ONCE:
            lock = instance.__dict__.setdefault(f"_lock of {self._name}", RLock())
        with lock:
            if self._name not in instance.__dict__:
                instance.__dict__[self._name] = self._compute(instance)
        return instance.__dict__[self._name]


def by_rows(function, *arrays: np.ndarray) -> np.ndarray:
    """``function`` of a few rows at a time, so that float64 copies stay small."""
    parts = [
        function(*(a[start : start + ROWS_AT_A_TIME] for a in arrays))
        for start in range(0, len(arrays[0]), ROWS_AT_A_TIME)
    ]
    return np.concatenate(parts)


class Oracle:
    """The reference on this file: the truth that backends are held against.

    Attributes:
      source: the open model.
      text_ids: token ids of the text.
    """

    def __init__(self, source: ModelSource, text_ids: Sequence[int]):
        self.source = source
        self.text_ids = np.asarray(text_ids, np.int32)
        self.dtype = np.float64 if source.nbytes <= FLOAT64_ORACLE_BYTES else np.float32

    @once
    def runner(self) -> ReferenceRunner:
        return ReferenceRunner(self.source, dtype=self.dtype)

    @once
    def text(self) -> Forward:
        """The text, with router logits."""
        return self.runner.forward(self.text_ids, capture=("ffn_moe_logits",))

    @once
    def router_logits(self) -> np.ndarray:
        """[L, T, E]."""
        return stacked(self.text, "ffn_moe_logits")

    @once
    def recorded(self) -> list[RecordedLogits]:
        return recorded_logits(self.source)


def stacked(forward: Forward, stage: str) -> np.ndarray:
    """One stage of every layer: [L, T, ...]."""
    layers = sorted(layer for name, layer in forward.stages if name == stage)
    return np.stack([forward.stages[stage, layer] for layer in layers])


@dataclass(frozen=True)
class LogitDistance:
    """Logits of one backend against the reference's, over a text.

    Attributes:
      cosine: [T], over the vocabulary.
      nmse: [T].
      kl: [T], nats.
      top1: share of positions whose best token is the same.
      largest: largest difference of any logit.
    """

    cosine: np.ndarray
    nmse: np.ndarray
    kl: np.ndarray
    top1: float
    largest: float

    @classmethod
    def of(cls, expected: np.ndarray, actual: np.ndarray) -> "LogitDistance":
        rows = min(len(expected), len(actual))
        expected, actual = expected[:rows], actual[:rows]
        with np.errstate(invalid="ignore", over="ignore"):
            return cls(
                by_rows(metrics.cosine, expected, actual),
                by_rows(metrics.nmse, actual, expected),
                by_rows(metrics.kl_divergence, expected, actual),
                float(by_rows(metrics.top1_agrees, expected, actual).mean()),
                float(np.abs(actual - expected).max()),
            )

    def figures(self) -> dict[str, float]:
        """What a receipt keeps."""
        return {
            "cosine_min": float(self.cosine.min()),
            "cosine_mean": float(self.cosine.mean()),
            "nmse_max": float(self.nmse.max()),
            "nmse_mean": float(self.nmse.mean()),
            "kl_mean": float(self.kl.mean()),
            "kl_max": float(self.kl.max()),
            "top1_agreement": self.top1,
            "largest_difference": self.largest,
        }


class Evidence:
    """Runs of one backend; each property is one run or what follows from it.

    Attributes:
      oracle: the reference.
      runner: the backend.
      facts: its ``describe()``.
    """

    def __init__(self, oracle: Oracle, runner: Runner):
        self.oracle = oracle
        self.runner = runner
        self.facts = runner.describe()

    @property
    def source(self) -> ModelSource:
        return self.oracle.source

    @property
    def compute_dtype(self) -> str:
        return str(self.facts["compute_dtype"])

    @property
    def label(self) -> str:
        """Backend and compute dtype: "jax bfloat16"."""
        return f"{self.runner.name} {self.compute_dtype}"

    def runs(self) -> list[str]:
        """Names of the properties that run the backend, for threads that make them ahead."""
        return ["free", "replayed", "fused", "written", "single", "gate"]

    @property
    def chunks(self) -> dict[str, tuple[int, ...]]:
        """Option of ``forward`` that cuts a short prompt in several chunks, where the backend can."""
        return {"chunk_sizes": (STAGE_CHUNK,)} if "chunk_sizes" in forward_options(self.runner) else {}

    @once
    def free(self) -> Forward:
        """The text, as the backend runs it for a user: it chooses its own experts."""
        return self.runner.forward(self.oracle.text_ids)

    @once
    def replayed(self) -> Forward:
        """The text with the reference's experts, and the backend's own router logits."""
        return self.runner.forward(
            self.oracle.text_ids, expert_ids=self.oracle.text.expert_ids, capture=("ffn_moe_logits",)
        )

    @once
    def free_distance(self) -> LogitDistance:
        return LogitDistance.of(self.oracle.text.logits, self.free.logits)

    @once
    def replayed_distance(self) -> LogitDistance:
        return LogitDistance.of(self.oracle.text.logits, self.replayed.logits)

    @once
    def router_errors(self) -> np.ndarray:
        """Largest error of any router logit of each layer and token, with replayed experts: [L, T]."""
        error = stacked(self.replayed, "ffn_moe_logits") - self.oracle.router_logits
        return np.abs(error).max(axis=-1)

    @once
    def fused(self) -> Forward:
        """A short prompt in chunks, with every stage that a fused expert layer shows."""
        return self.runner.forward(self.stage_ids, capture=FUSED_STAGES, **self.chunks)

    @property
    def stage_ids(self) -> np.ndarray:
        return self.oracle.text_ids[:STAGE_TOKENS]

    @property
    def few(self) -> dict[str, tuple[int, ...]]:
        """Option of ``forward`` for the layers that the gate looks at, where the backend can."""
        alone = "layers" in forward_options(self.runner)
        return {"layers": gate_layers(self.source)} if alone else {}

    @once
    def single(self) -> Forward | None:
        """A few tokens one by one, as decoding takes them, in a few layers; None where that is no option."""
        if not self.chunks:
            return None
        ids = self.stage_ids[:SINGLE_TOKENS]
        return self.runner.forward(ids, capture=FUSED_STAGES, chunk_sizes=(1,), **self.few)

    @once
    def judgements(self) -> list[tuple[str, Judgement]]:
        """Every stage: of all layers as a prompt runs, and of a few as decoding does."""
        found = [("prompt", j) for j in self._judge(self.stage_ids, self.fused)]
        if self.single:
            ids = self.stage_ids[:SINGLE_TOKENS]
            found += [("token by token", j) for j in self._judge(ids, self.single, **self.few)]
        return found

    def _judge(self, ids: np.ndarray, forward: Forward, **options) -> list[Judgement]:
        return list(StageJudge(self.source, self.facts, ids, forward, **options).judgements())

    @once
    def written(self) -> list[int]:
        """Tokens written greedily after the first tokens of the text."""
        return self.write()

    def write(self) -> list[int]:
        """Writes again."""
        prompt = self.oracle.text_ids[:PROMPT_TOKENS].tolist()
        return list(self.runner.stream(prompt, max_tokens=WRITTEN_TOKENS, sampling=Sampling(temperature=0)))

    @once
    def gate(self) -> GateResult:
        return inspect(self.runner, self.source)
