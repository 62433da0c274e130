"""How fast a loaded model is, in rows that can be laid beside llama-bench's.

A row is ``pp512`` (a prompt of 512 tokens), ``tg128`` (128 tokens written), ``tg128 @ d4096`` (the same
with 4,096 tokens in the KV cache), or one of these for a batch, ``8 x pp512``. The names are those of
llama.cpp's ``llama-bench`` (tools/llama-bench/README.md). Rows of one sequence run through
``Runner.stream``, as a user's request does: ``pp`` ends when the first new token is there, ``tg`` counts
those after it. Rows of a batch fill a cache of their own and write all sequences in one program; they
are offered by the jax backend.

The first run of every row compiles and is left out. Prompts are random tokens of a fixed seed, as in
llama-bench. A batch samples, for greedy sequences fall into loops and then share their experts,
which would flatter a mixture of experts.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np

from qwen3_moe_jax.convert.config import Qwen3MoeConfig
from qwen3_moe_jax.convert.source import ModelSource
from qwen3_moe_jax.core.errors import MemoryPlanError
from qwen3_moe_jax.core.runner import Runner
from qwen3_moe_jax.core.sampling import Sampling
from qwen3_moe_jax.machine import processes
from qwen3_moe_jax.machine.limits import Limits, prefill_operations, step_nbytes

GREEDY = Sampling(temperature=0)
BATCH_SAMPLING = Sampling(temperature=1.0, top_k=20)

SEED = 7

MEASURED, NOT_OFFERED, NO_MEMORY, TOO_SLOW, FAILED = (
    "measured",
    "not offered",
    "does not fit",
    "too slow",
    "failed",
)
"""What can become of a row; all but the last are answers."""


@dataclass(frozen=True)
class Workload:
    """What a row times.

    Attributes:
      kind: "pp", reading prompts, or "tg", writing.
      tokens: of each sequence.
      depth: tokens of each sequence that are in the cache before (tg).
      sequences: None for one that streams, else the size of a batch.
    """

    kind: str
    tokens: int
    depth: int = 0
    sequences: int | None = None

    @property
    def name(self) -> str:
        """As llama-bench would say it: "8 x tg128 @ d512"."""
        many = f"{self.sequences} x " if self.sequences else ""
        return f"{many}{self.kind}{self.tokens}" + (f" @ d{self.depth}" if self.depth else "")

    @property
    def count(self) -> int:
        """How many sequences run."""
        return self.sequences or 1

    @property
    def prompt(self) -> int:
        """Tokens of the prompt that comes first."""
        return self.tokens if self.kind == "pp" else max(self.depth, 1)

    @property
    def context(self) -> int:
        """Positions of the cache that a sequence takes: prompt, its first new token, and what is timed."""
        return self.prompt + 1 + (self.tokens if self.kind == "tg" else 0)


def plan(
    prompt_tokens: Sequence[int],
    new_tokens: int,
    depths: Sequence[int],
    batches: Sequence[int],
    batch_prompt: int,
) -> list[Workload]:
    """The rows of a benchmark: prompts, writing at each depth, and for each batch both.

    A batch has prompts of ``batch_prompt`` tokens, and writes after them.
    """
    rows = [Workload("pp", n) for n in prompt_tokens]
    rows += [Workload("tg", new_tokens, depth) for depth in depths]
    for sequences in batches:
        rows += [
            Workload("pp", batch_prompt, 0, sequences),
            Workload("tg", new_tokens, batch_prompt, sequences),
        ]
    return rows


@dataclass(frozen=True)
class Timing:
    """Seconds of several runs, and of the first one, which compiled and does not count."""

    first_run: float
    runs: tuple[float, ...]


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
      workload: what it timed.
      outcome: MEASURED, or why not: NOT_OFFERED, NO_MEMORY, TOO_SLOW or FAILED.
      reason: in words, unless measured.
      timing: if measured.
      limit: tokens per second of all sequences that the machine allows, where that is known.
      limited_by: "memory" or "arithmetic".
    """

    workload: Workload
    outcome: str = MEASURED
    reason: str = ""
    timing: Timing | None = None
    limit: float | None = None
    limited_by: str = ""

    @property
    def rates(self) -> list[float]:
        """Tokens per second of all sequences, run by run."""
        tokens = self.workload.count * self.workload.tokens
        return [tokens / seconds for seconds in self.timing.runs] if self.timing else []

    @property
    def best(self) -> float | None:
        return max(self.rates, default=None)

    @property
    def median(self) -> float | None:
        return median(self.rates) if self.rates else None

    @property
    def share(self) -> float | None:
        """The best run's share of the limit."""
        return self.best / self.limit if self.best and self.limit else None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        w = self.workload
        return {
            "test": w.name,
            "kind": w.kind,
            "tokens": w.tokens,
            "depth": w.depth,
            "sequences": w.count,
            "outcome": self.outcome,
            "reason": self.reason,
            "tokens_per_s_best": self.best,
            "tokens_per_s_median": self.median,
            "seconds": list(self.timing.runs) if self.timing else [],
            "first_run_s": self.timing and self.timing.first_run,
            "limit_tokens_per_s": self.limit,
            "limited_by": self.limited_by,
            "share_of_limit": self.share,
        }


Run = Callable[[], Sequence[float]]
"""One run; seconds of each thing that it times."""


def repeated(run: Run, repeats: int, max_seconds: float = float("inf")) -> list[Timing]:
    """Runs once uncounted, then ``repeats`` times, or until ``max_seconds`` are over (but once at least)."""
    began = time.perf_counter()
    first = run()
    runs = [run()]
    while len(runs) < repeats and _goes_on(time.perf_counter() - began < max_seconds):
        runs.append(run())
    return [Timing(f, tuple(r)) for f, r in zip(first, zip(*runs, strict=True), strict=True)]


def _goes_on(has_time: bool) -> bool:
    """What process 0 says, where there are several: its clock decides, and all run the same."""
    return processes.of_first("another run", has_time)


def random_prompts(config: Qwen3MoeConfig, sequences: int, tokens: int, seed: int = SEED) -> np.ndarray:
    """Token ids int32 [sequences, tokens], the same at each call."""
    return np.random.default_rng(seed).integers(0, config.vocab_size, (sequences, tokens), dtype=np.int32)


def time_stream(runner: Runner, prompt: Sequence[int], new_tokens: int) -> tuple[float, float]:
    """Seconds until the first new token, and from there until ``new_tokens`` more."""
    began = time.perf_counter()
    tokens = runner.stream(prompt, max_tokens=new_tokens + 1, sampling=GREEDY)
    next(tokens)
    first = time.perf_counter()
    written = sum(1 for _ in tokens)
    if written != new_tokens:
        raise RuntimeError(f"{written} tokens were written in place of {new_tokens}")
    return first - began, time.perf_counter() - first


@dataclass
class Benchmark:
    """Measures rows of one loaded model.

    Attributes:
      source: the open model.
      runner: the backend.
      repeats: counted runs of each row.
      max_seconds: no further run begins after this long in a row, and a row that
        the earlier ones predict to take longer than this is left out.
      given_limits: what the device allows, if known better than ``limits``, which the machine's facts give.
    """

    source: ModelSource
    runner: Runner
    repeats: int = 3
    max_seconds: float = float("inf")
    given_limits: Limits | None = None
    _rates: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._facts = self.runner.describe()
        self.limits = self.given_limits or Limits.of(self._facts)

    def rows(self, workloads: Sequence[Workload]) -> Iterator[list[Row]]:
        """Rows as they are measured; the two of a batch, which share their runs, together."""
        for together in _grouped(workloads):
            yield self._measure(together)

    def _measure(self, together: list[Workload]) -> list[Row]:
        reason = self._why_not_offered(together[0])
        if reason:
            return [Row(w, NOT_OFFERED, reason) for w in together]
        seconds = self._expected_seconds(together[-1])
        if not _goes_on(seconds <= self.max_seconds):
            reason = f"about {seconds:.0f} s; --max-seconds {self.max_seconds:.0f}"
            return [Row(w, TOO_SLOW, reason) for w in together]
        try:
            timings = repeated(self._run_of(together), self.repeats, self.max_seconds)
        except (MemoryError, MemoryPlanError) as error:
            return [Row(w, NO_MEMORY, _one_line(error)) for w in together]
        except (RuntimeError, ValueError, ArithmeticError, NotImplementedError) as error:
            outcome = NO_MEMORY if is_out_of_memory(error) else FAILED
            return [Row(w, outcome, _one_line(error)) for w in together]
        rows = [Row(w, timing=t, **self._limit(w)) for w, t in zip(together, timings, strict=True)]
        for row in rows:
            if row.best is not None:
                self._rates.setdefault(row.workload.kind, row.best / row.workload.count)
        return rows

    def _why_not_offered(self, workload: Workload) -> str:
        if workload.sequences and self.runner.name != "jax":
            return f"the {self.runner.name} backend runs one sequence at a time"
        return ""

    def _expected_seconds(self, workload: Workload) -> float:
        """Of the minimum that a row takes: its first run and one that counts, from the rates so far."""
        once = 0.0
        if "pp" in self._rates:
            once += workload.count * workload.prompt / self._rates["pp"]
        if "tg" in self._rates and workload.kind == "tg":
            once += workload.tokens / self._rates["tg"]
        return 2 * once

    def _run_of(self, together: list[Workload]) -> Run:
        workload = together[-1]
        prompts = random_prompts(self.source.config, workload.count, workload.prompt)
        if workload.sequences:
            from qwen3_moe_jax.measure.benchmark_batch import BatchRun

            new_tokens = workload.tokens if workload.kind == "tg" else 0
            runner: Any = self.runner  # of jax: the others offer no batches
            return BatchRun(runner, prompts, new_tokens, BATCH_SAMPLING)
        prompt = prompts[0].tolist()
        if workload.kind == "pp":
            return lambda: time_stream(self.runner, prompt, 0)[:1]
        return lambda: time_stream(self.runner, prompt, workload.tokens)[1:]

    def _limit(self, workload: Workload) -> dict[str, Any]:
        w, config = workload, self.source.config
        if w.kind == "pp":
            rate, work = self.limits.arithmetic.rate, prefill_operations(config, w.count, w.tokens)
            tokens, name = w.count * w.tokens, "arithmetic"
        else:
            rate, name = self.limits.memory.rate, "memory"
            work, tokens = self.step_nbytes(w), w.count
        return {"limit": rate and tokens * rate / work, "limited_by": name}

    def step_nbytes(self, workload: Workload) -> float:
        """Bytes that one token of each sequence reads at least, at the middle of a row that writes."""
        dtype = np.dtype(str(self._facts.get("cache_dtype", self._facts["compute_dtype"])))
        depth = workload.depth + (workload.tokens + 1) / 2
        return step_nbytes(self.source, dtype.itemsize, workload.count, depth)


def _grouped(workloads: Sequence[Workload]) -> Iterator[list[Workload]]:
    """Each alone, but the prompts of a batch with what is written after them."""
    waiting: list[Workload] = []
    for w in workloads:
        if waiting and not (
            w.kind == "tg" and w.sequences == waiting[0].sequences and w.depth == waiting[0].tokens
        ):
            yield waiting
            waiting = []
        if waiting or not (w.sequences and w.kind == "pp"):
            yield [*waiting, w]
            waiting = []
        else:
            waiting = [w]
    if waiting:
        yield waiting


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error, JAX's own too, says that memory did not suffice."""
    text = str(error)
    return "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
