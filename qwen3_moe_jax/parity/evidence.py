"""What the clauses are judged by: runs of the reference and of one backend, each made once and kept."""

import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from threading import RLock
from typing import Any, Generic, TypeVar

import numpy as np

from qwen3_moe_jax.convert.packed import LANES
from qwen3_moe_jax.convert.source import ModelSource
from qwen3_moe_jax.convert.unpack import dequantize
from qwen3_moe_jax.core.runner import Forward, ForwardShape, Runner
from qwen3_moe_jax.core.sampling import Sampling
from qwen3_moe_jax.core.stages import INSIDE_EXPERTS, STAGES
from qwen3_moe_jax.machine.folders import writable_cache
from qwen3_moe_jax.machine.resident import ResidentPeak
from qwen3_moe_jax.machine.threads import ALONE, Workers
from qwen3_moe_jax.parity.crew import Crew
from qwen3_moe_jax.parity.file_check import rows_that_differ
from qwen3_moe_jax.parity.gate import GateResult, first_forward, inspect, layers_option
from qwen3_moe_jax.parity.judge import FUSED_STAGES, Judgement, StageJudge
from qwen3_moe_jax.parity.recorded import RecordedLogits, recorded_logits
from qwen3_moe_jax.parity.text_runs import (
    LogitDistance,
    TextRun,
    broken_invariants,
    checksums,
    differing_bits,
)
from qwen3_moe_jax.reference import ReferenceRunner

SMALL_MODEL_BYTES = 1 << 30
"""Up to this size the reference computes in float64 and is kept in memory, and runs are made side by side.

Above it the reference is float32 and reads each tensor from the file when it needs it, so that there is never
more than one whole model in memory.
"""

MAX_LOGIT_BYTES = 1 << 30
"""A text whose logits take more is run in windows, each from an empty cache."""

STAGE_TOKENS = 40
STAGE_CHUNK = 16
"""Stages are judged on a prompt of several chunks, so that what is carried from one to the next is seen."""

SINGLE_TOKENS = 6
WRITTEN_TOKENS = 24
PROMPT_TOKENS = 24

LAYERS_AT_A_TIME = 3
"""Layers of a large model that are judged side by side, where there are more workers than that: each reads
its weights, and compares, while workers multiply for the others."""

BATCHES = (2, 8, 16)
BATCH_TOKENS = 8
DECODED_TOKENS = 24

RUNS = {
    "VRAM-001": ("memory",),
    "LOADGATE-001": ("gate",),
    "STAGES-001": ("fused", "single", "judgements"),
    "INVARIANTS-001": ("free",),
    "PARITY-001": ("free", "replayed", "decoded"),
    "TEXT-001": ("free", "replayed"),
    "ROUTING-001": ("free", "replayed"),
    "DECODE-001": ("free", "written", "expected"),
    "DETERMINISM-001": ("free", "written", "again"),
    "QUANT-001": ("device_weights",),
}
"""Properties of the evidence that a clause asks for; those that a property waits for come before it."""

T = TypeVar("T")

_ONCE = RLock()


class Lazily(Generic[T]):
    """A value that is computed when it is first asked for, once, also by several threads."""

    def __init__(self, compute: Callable[[], T]):
        self._compute, self._lock, self._found = compute, RLock(), []

    def __call__(self) -> T:
        with self._lock:
            if not self._found:
                self._found.append(self._compute())
        return self._found[0]


class once:
    """A property that is computed ``Lazily``."""

    def __init__(self, compute):
        self._compute = compute
        self.__doc__ = compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        value = Lazily(partial(self._compute, instance))
        with _ONCE:
            value = instance.__dict__.setdefault(f"_lazily {self._name}", value)
        instance.__dict__[self._name] = value()
        return instance.__dict__[self._name]


def is_small(source: ModelSource) -> bool:
    """Whether the reference keeps the model in memory."""
    return source.nbytes <= SMALL_MODEL_BYTES


class Oracle:
    """The reference on this file: the truth that backends are held against.

    Attributes:
      source: the open model.
      text_ids: token ids of the text.
      windows: parts of the text that are run one after the other; the whole of it where its logits fit.
      workers: share the work on the matrices of a large model.
      crew: processes that do so in place of these, where there are any.
    """

    def __init__(self, source: ModelSource, text_ids: Sequence[int], crew: Crew | None = None):
        self.source, self.crew = source, crew
        self.text_ids = np.asarray(text_ids, np.int32)
        self.is_small = is_small(source)
        self.dtype = np.float64 if self.is_small else np.float32
        self.workers = ALONE if self.is_small else Workers.one_a_processor()
        row = 4 * source.config.vocab_size
        stride = max(1, MAX_LOGIT_BYTES // row)
        if len(self.text_ids) > stride:  # windows of one length, a power of two, so that they share programs
            stride = 1 << (stride.bit_length() - 1)
        self.windows = [slice(s, s + stride) for s in range(0, len(self.text_ids), stride)]
        self.logits_nbytes = min(stride, len(self.text_ids)) * row

    @once
    def runner(self) -> ReferenceRunner:
        return ReferenceRunner(self.source, dtype=self.dtype, resident=self.is_small, workers=self.workers)

    @once
    def text(self) -> Forward:
        """The text, with router logits; logits that take much lie in a file, not in memory."""
        texts = [self.text_ids[window] for window in self.windows]
        if self.crew is not None:
            logits, runs = self.crew.forwards(texts, self.dtype, ("ffn_moe_logits",))
        else:
            logits = self._room_for_logits()
            rooms = [logits[window] for window in self.windows]
            runs = self.runner.forwards(texts, rooms, capture=("ffn_moe_logits",))
        stages = {key: np.concatenate([run.stages[key] for run in runs]) for key in runs[0].stages}
        return Forward(logits, np.concatenate([run.expert_ids for run in runs], axis=1), stages)

    def _room_for_logits(self) -> np.ndarray:
        shape = (len(self.text_ids), self.source.config.vocab_size)
        if len(self.windows) == 1:
            return np.empty(shape, np.float32)
        with tempfile.TemporaryFile(dir=writable_cache("scratch")) as file:
            return np.memmap(file, np.float32, "w+", shape=shape)

    @once
    def router_logits(self) -> np.ndarray:
        """[L, T, E]."""
        return stacked(self.text, "ffn_moe_logits")

    def logits(self, token_ids: np.ndarray) -> np.ndarray:
        """Of a short text: [T, V]."""
        run, crew = self.runner.forward, self.crew
        return run(token_ids).logits if crew is None else crew.forwards([token_ids], self.dtype)[0]

    @once
    def file_rows(self) -> tuple[int, int]:
        """As ``rows_that_differ``, of every tensor."""
        crew, source = self.crew, self.source
        return rows_that_differ(source, source.specs) if crew is None else crew.check_file()

    @once
    def sha256(self) -> str:
        """Of the file, all of which is read."""
        return self.source.sha256()

    @once
    def recorded(self) -> list[RecordedLogits]:
        return recorded_logits(self.source)


def stacked(forward: Forward, stage: str) -> np.ndarray:
    """One stage of every layer: [L, T, ...]."""
    layers = sorted(layer for name, layer in forward.stages if name == stage and layer is not None)
    return np.stack([forward.stages[stage, layer] for layer in layers])


class Evidence:
    """Runs of one backend; each property is one run or what follows from it.

    Attributes:
      oracle: the reference.
      runner: the backend.
      facts: its ``describe()``.
      resident: the process's memory since before the backend was loaded; None where that is not known.
      load_seconds: that its load took; 0 where it was loaded before.
      in_batches: a few tokens one by one, by the size of the batch in whose middle they run.
    """

    def __init__(
        self,
        oracle: Oracle,
        runner: Runner,
        resident: ResidentPeak | None = None,
        load_seconds: float = 0.0,
    ):
        self.oracle = oracle
        self.runner = runner
        self.facts = runner.describe()
        self.resident, self.load_seconds = resident, load_seconds
        self.in_batches: Mapping[int, Lazily[Forward]] = {
            size: Lazily(partial(self._in_batch, size)) for size in (1, *BATCHES)
        }

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

    def runs(self, clauses: Collection[str]) -> list[Callable[[], Any]]:
        """What these clauses are going to ask for and threads can make ahead, in the order of the clauses."""
        names = dict.fromkeys(name for id, used in RUNS.items() if id in clauses for name in used)
        runs = [partial(getattr, self, name) for name in names]
        if "DETERMINISM-001" in clauses and self.is_batch_invariant:
            runs += [self.in_batches[size] for size in sorted(self.in_batches, reverse=True)]
        return runs

    def expect(self, clauses: Collection[str]) -> None:
        """Tells the runner which forward passes these clauses are going to ask for."""
        names = {name for id in clauses for name in RUNS.get(id, ())}
        of_text = {len(self.oracle.text_ids[window]) for window in self.oracle.windows}
        fused, logits = frozenset(FUSED_STAGES), frozenset({"ffn_moe_logits"})
        tokens, capture, layers = first_forward(self.source)
        chunks, stages = (STAGE_CHUNK,), min(STAGE_TOKENS, len(self.oracle.text_ids))
        shapes: dict[str, list[ForwardShape]] = {
            "gate": [ForwardShape(tokens, capture, layers)],
            "fused": [ForwardShape(stages, fused, chunk_sizes=chunks)],
            "single": [ForwardShape(SINGLE_TOKENS, fused, layers, chunk_sizes=(1,))],
            "free": [ForwardShape(count) for count in of_text],
            "replayed": [ForwardShape(count, logits, is_forced=True) for count in of_text],
        }
        if self.is_batch_invariant:
            shapes["decoded"] = [ForwardShape(DECODED_TOKENS, chunk_sizes=(1,), is_forced=True)]
        wanted = [shape for name, found in shapes.items() if name in names for shape in found]
        if "DETERMINISM-001" in clauses and self.is_batch_invariant:
            sizes = sorted(self.in_batches, reverse=True)
            wanted += [ForwardShape(BATCH_TOKENS, chunk_sizes=(1,), rows=size) for size in sizes]
        self.runner.expect(wanted)

    @property
    def chunks(self) -> dict[str, Any]:
        """Option of ``forward`` that cuts a short prompt in several chunks, where the backend can."""
        return {"chunk_sizes": (STAGE_CHUNK,)}

    @once
    def free(self) -> TextRun:
        """The text, as the backend runs it for a user: it chooses its own experts."""
        return self._run_text()

    @once
    def again(self) -> np.ndarray:
        """``free`` a second time: its checksums."""
        _ = self.free  # whose programs this takes
        windows = (self.oracle.text_ids[window] for window in self.oracle.windows)
        return np.concatenate([checksums(self.runner.forward(ids).logits) for ids in windows])

    @once
    def replayed(self) -> TextRun:
        """The text with the reference's experts, and the backend's own router logits."""
        return self._run_text(self.oracle.text.expert_ids, ("ffn_moe_logits",))

    def _run_text(self, expert_ids: np.ndarray | None = None, capture: Collection[str] = ()) -> TextRun:
        parts = []
        for window in self.oracle.windows:
            ids = self.oracle.text_ids[window]
            forced = None if expert_ids is None else expert_ids[:, window]
            forward = self.runner.forward(ids, capture=capture, expert_ids=forced)
            part = TextRun(
                LogitDistance.of(self.oracle.text.logits[window], forward.logits, self.oracle.workers),
                forward.expert_ids,
                stacked(forward, *capture) if capture else None,
                checksums(forward.logits),
                tuple(broken_invariants(self.source.config, forward, len(ids))),
            )
            parts.append(part)
        if len(parts) == 1:
            return parts[0]
        return TextRun(
            LogitDistance.joined([p.distance for p in parts]),
            np.concatenate([p.expert_ids for p in parts], axis=1),
            np.concatenate([p.router_logits for p in parts], axis=1) if capture else None,
            np.concatenate([p.checksums for p in parts]),
            tuple(line for p in parts for line in p.broken),
        )

    @property
    def is_batch_invariant(self) -> bool:
        """Whether the backend promises a sequence the same bits in every batch, and takes batches."""
        return bool(self.facts.get("batch_invariant")) and self.runner.capabilities.beside

    @once
    def decoded(self) -> LogitDistance | None:
        """Tokens one by one with the reference's experts, by the step that decoding takes.

        None where that step is the prompt's own program, of which STAGES-001 judges every stage.
        """
        if not self.is_batch_invariant:
            return None
        ids = self.oracle.text_ids[:DECODED_TOKENS]
        forced = self.oracle.text.expert_ids[:, : len(ids)]
        forward = self.runner.forward(ids, expert_ids=forced, chunk_sizes=(1,))
        return LogitDistance.of(self.oracle.text.logits[: len(ids)], forward.logits)

    def _in_batch(self, size: int) -> Forward:
        """A few tokens one by one, in the middle of a batch of ``size`` pieces of the text."""
        ids = self.oracle.text_ids
        others = [ids[3 * n : 3 * n + BATCH_TOKENS] for n in range(1, size)]
        options: dict[str, Any] = {"beside": others} if others else {}
        return self.runner.forward(ids[:BATCH_TOKENS], chunk_sizes=(1,), **options)

    @once
    def router_errors(self) -> np.ndarray:
        """Largest error of any router logit of each layer and token, with replayed experts: [L, T]."""
        error = self.replayed.router_logits - self.oracle.router_logits
        return np.abs(error).max(axis=-1)

    @once
    def fused(self) -> Forward:
        """A short prompt in chunks, with every stage that a fused expert layer shows."""
        return self.runner.forward(self.stage_ids, capture=FUSED_STAGES, **self.chunks)

    @property
    def stage_ids(self) -> np.ndarray:
        return self.oracle.text_ids[:STAGE_TOKENS]

    @property
    def few(self) -> dict[str, Any]:
        """Option of ``forward`` for the layers that the gate looks at, where the backend can."""
        return layers_option(self.runner, self.source)

    @once
    def single(self) -> Forward | None:
        """A few tokens one by one, as decoding takes them, in a few layers; None where that is no option."""
        if not self.chunks:
            return None
        ids = self.stage_ids[:SINGLE_TOKENS]
        return self.runner.forward(ids, capture=FUSED_STAGES, chunk_sizes=(1,), **self.few)

    @once
    def judgements(self) -> list[tuple[str, Judgement]]:
        """Every stage: of all layers as a prompt runs, and of a few as decoding does.

        Operands of 16 bits make the output of a fused expert layer so uncertain that one wrong scale can hide
        in it: where that output departs by the plain model alone, the layer's inner stages are judged too.
        """
        found = [("prompt", j) for j in self._judge(self.stage_ids, self.fused)]
        suspects = {j.layer for _, j in found if j.stage == "ffn_moe_out" and j.is_excused}
        if suspects:
            opened = self.runner.forward(self.stage_ids, capture=tuple(STAGES), **self.chunks)
            inner = self._judge(self.stage_ids, opened)
            found += [("opened", j) for j in inner if j.layer in suspects and j.stage in INSIDE_EXPERTS]
        if self.single:
            ids = self.stage_ids[:SINGLE_TOKENS]
            found += [("token by token", j) for j in self._judge(ids, self.single, **self.few)]
        return found

    def _judge(self, ids: np.ndarray, forward: Forward, layers: Sequence[int] = ()) -> list[Judgement]:
        if self.oracle.crew is not None:
            return self.oracle.crew.judge(self.facts, ids, forward, layers)
        judge = StageJudge(self.source, self.facts, ids, forward, layers, workers=self.oracle.workers)
        return judge.side_by_side(LAYERS_AT_A_TIME if self.oracle.workers.count > LAYERS_AT_A_TIME else 1)

    @once
    def written(self) -> list[int]:
        """Tokens written greedily after the first tokens of the text."""
        return self.write()

    def write(self) -> list[int]:
        """Writes again."""
        prompt = self.oracle.text_ids[:PROMPT_TOKENS].tolist()
        return list(self.runner.stream(prompt, max_tokens=WRITTEN_TOKENS, sampling=Sampling(temperature=0)))

    @once
    def expected(self) -> np.ndarray:
        """The reference's logits at every token of ``written``, which it chose from: float64 [n, V]."""
        prompt = self.oracle.text_ids[:PROMPT_TOKENS]
        ids = np.concatenate([prompt, self.written])
        return self.oracle.logits(ids)[len(prompt) - 1 : -1].astype(np.float64)

    @once
    def device_weights(self) -> tuple[int, int] | None:
        """Weights of the first and last rows of every matrix that differ on the device, and of how many.

        None where the backend's weights cannot be read back.
        """
        if not self.runner.capabilities.dequantized:
            return None
        different = count = 0
        for path, spec in self.source.specs.items():
            if len(spec.shape) == 1:
                continue
            *experts, rows, columns = spec.shape
            expert = experts[0] - 1 if experts else None
            for tile in {0, (rows - 1) // LANES}:
                part = (LANES * tile, min(LANES * (tile + 1), rows)), (0, columns)
                box = part if expert is None else ((expert, expert + 1), *part)
                expected = dequantize(self.source.part(path, box)).reshape(-1, columns)
                actual = self.runner.dequantized(path, tile, expert)
                different += differing_bits(actual, expected)
                count += expected.size
        return different, count

    @once
    def gate(self) -> GateResult:
        return inspect(self.runner, self.source)

    @once
    def memory(self) -> dict[str, int] | None:
        """Bytes at the peak and of the KV cache after a short text was written; None where none are told.

        The device's own figures, or for a large model that verify itself loaded into main
        memory, how much this process has grown by.
        """
        _ = self.written  # what is measured
        found = self.runner.memory()
        if found:
            return found
        if self.resident is None or self.oracle.is_small:
            return None
        return {"peak": self.resident.growth(), "cache": self.runner.cache_nbytes}
