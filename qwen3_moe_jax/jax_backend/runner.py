"""The jax backend: the Flax model, jitted as a whole, behind the ``Runner`` protocol."""

import sys
import time
import weakref
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from qwen3_moe_jax.convert.packed import LANES
from qwen3_moe_jax.convert.progress import ProgressCallback
from qwen3_moe_jax.convert.source import ModelSource
from qwen3_moe_jax.core.errors import ModelClosedError, NumericalError
from qwen3_moe_jax.core.runner import (
    Capabilities,
    Forward,
    ForwardOptions,
    Generated,
    IsOver,
)
from qwen3_moe_jax.core.runner_arguments import (
    ForwardRequest,
    check_open,
    checked_forward,
    checked_prompt,
    checked_text,
    per_prompt,
)
from qwen3_moe_jax.core.sampling import Sampling
from qwen3_moe_jax.core.stages import LAYER_STAGES, StageKey
from qwen3_moe_jax.jax_backend import programs
from qwen3_moe_jax.jax_backend.batching import Batch, Request, run_all
from qwen3_moe_jax.jax_backend.compile_clock import compile_clock
from qwen3_moe_jax.jax_backend.decode_path import PATHS, Decoder, choose
from qwen3_moe_jax.jax_backend.generate import (
    COMPILER_OPTIONS,
    MAX_STEPS,
    PREFILL_CHUNKS,
    chunk_lengths,
)
from qwen3_moe_jax.jax_backend.kv_cache import KVCache, whole_tiles
from qwen3_moe_jax.jax_backend.likelihood import log_likelihoods
from qwen3_moe_jax.jax_backend.model import Qwen3Moe
from qwen3_moe_jax.jax_backend.params import GPU_ROLES, Params, load_params, split_path
from qwen3_moe_jax.jax_backend.programs import Program
from qwen3_moe_jax.jax_backend.settings import own_settings
from qwen3_moe_jax.kernels_pallas import Matrices
from qwen3_moe_jax.kernels_pallas import dequantize as dequantize_on_device
from qwen3_moe_jax.kernels_pallas.gpu.device import ask_ptxas_once
from qwen3_moe_jax.kernels_pallas.implementations import Record, recording
from qwen3_moe_jax.machine.headroom import available_memory
from qwen3_moe_jax.machine.jax_devices import enable_compilation_cache, jax_devices
from qwen3_moe_jax.machine.kernels import AUTO, capability_of, choose_kernels
from qwen3_moe_jax.machine.memory import MemoryPlan, check_slots, fitting_slots

LAYER_STAGE_NAMES = frozenset(stage.name for stage in LAYER_STAGES)

SECONDS_PER_DISPATCH = 0.06
"""Streaming asks the device for as many tokens at once as take about this long."""

DEFAULT_SLOTS = 16
"""Sequences at a time of ``generate_batch`` unless told otherwise: what one decode kernel holds."""

MIN_BATCH_TOKENS = 256
"""Slots of ``generate_batch`` have room for at least this many tokens."""


class JaxRunner:
    """The model on JAX's default device; see ``runner.Runner`` for the protocol.

    Attributes:
      decoder: the Flax module and the ways in which it writes a token.
      params: the parameters, packed.
      reused_tokens: tokens of the last stream's prompt that were in the cache already.
      plan: the memory that it is expected to take.
      kernels: those that it runs, and why.
    """

    name = "jax"
    reused_tokens = 0
    capabilities = Capabilities(
        beside=True, interventions=True, open_batch=True, dequantized=True, concurrent=True
    )

    @own_settings()
    def __init__(
        self,
        source: ModelSource,
        *,
        max_context: int | None = None,
        compute_dtype: Any = None,
        cache_dtype: Any = None,
        kernels: str = AUTO,
        progress: ProgressCallback | None = None,
    ):
        """Loads the weights.

        Args:
          source: an open model.
          max_context: tokens of the KV cache; None is all that the model was trained for.
          compute_dtype: float32 or bfloat16 operands of matrix products; None is float32 on the
            CPU and bfloat16 on a GPU, whose kernels take 16-bit operands.
          cache_dtype: of the KV cache: float32, float16, bfloat16 or int8 (with a float32 scale for
            each head's vector); None is float32 on the CPU and float16 on a GPU.
          kernels: "hopper", "portable" or "xla"; "auto" takes the fastest that the device has.
          progress: told how far loading is.

        Raises:
          BackendUnavailableError: JAX does not start, or the device does not run these kernels.
          MemoryPlanError: weights and cache do not fit the device.
        """
        if not programs.use_default_store():
            enable_compilation_cache()
        compile_clock()
        self.config = source.config
        self.max_context = source.config.max_position_embeddings if max_context is None else max_context
        self.device = jax_devices()[0]
        on_gpu = self.device.platform == "gpu"
        self.kernels = choose_kernels(kernels, capability_of(self.device), jax.__version_info__)
        self.compute_dtype = jnp.dtype(compute_dtype or (jnp.bfloat16 if on_gpu else jnp.float32))
        self.cache_dtype = jnp.dtype(cache_dtype or (jnp.float16 if on_gpu else jnp.float32))
        self._types = dict(source.types)
        self.plan = MemoryPlan.of(source, _cache_length(self.max_context), self.cache_dtype.itemsize)
        self.plan.check(available_memory(self.device))
        self.params = load_params(source, GPU_ROLES if on_gpu else {}, self.device, progress)
        self.is_closed = False
        self._batches: weakref.WeakSet[Batch] = weakref.WeakSet()
        if on_gpu:
            ask_ptxas_once()
        model = Qwen3Moe(source.config, self.compute_dtype, kernels=self.kernels.name)
        self.decoder = choose(model, self.params, self.device, self.cache_dtype)
        self._spare: Batch | None = None
        self._spare_tokens: list[int] = []  # whose keys and values its row holds
        self._record = Record()

    @property
    def cache_nbytes(self) -> int:
        return self.plan.cache

    @property
    def model(self) -> Qwen3Moe:
        """The Flax module."""
        return self.decoder.model

    def describe(self) -> dict[str, object]:
        device, record = self.device, self._recorded()
        implementations = {t: record.of_type(t) for t in sorted(set(self._types.values()))}
        is_gpu, refused = device.platform == "gpu", dict(self.decoder.refused)
        return {
            "backend": self.name,
            "device": f"{device.device_kind} ({device.platform})",
            "kernels": self.kernels.name,
            "kernels_reason": self.kernels.reason,
            "compute_dtype": self.compute_dtype.name,
            "cache_dtype": self.cache_dtype.name,
            "implementations": {t.name: found for t, found in implementations.items() if found},
            "refused": record.refusals(),
            "decode": self.decoder.describe(),
            "fallbacks": [
                f"decoding is not in {path.name}: {refused[path.name]}"
                for path in PATHS
                if is_gpu and path.is_one_launch and path.name in refused
            ],
            "batch_invariant": self.decoder.is_batch_invariant,
        }

    @own_settings()
    def _recorded(self) -> Record:
        """What runs the ops: what has run, or where nothing has, what the tracing of one token says."""
        if not self._record:
            ids = start = jax.ShapeDtypeStruct((1,), jnp.int32)
            cache = jax.eval_shape(lambda: KVCache.create(self.config, 1, whole_tiles(1), self.cache_dtype))
            step = lambda params, ids, *state: self.decoder.step(params, ids[:, None], *state)
            with recording(self._record):
                jax.eval_shape(step, self.params, ids, start, cache)
        return self._record

    def close(self) -> None:
        """Deletes the arrays of weights and of every batch, whoever else still names them."""
        self.is_closed = True
        self._spare = None
        for batch in list(self._batches):
            batch.close()
        params, self.params = self.params, {}
        for array in jax.tree.leaves(params):
            array.delete()

    @contextmanager
    def _open(self) -> Generator[None]:
        """Raises ModelClosedError at the start, and where the model is closed meanwhile."""
        check_open(self)
        try:
            yield
        except (RuntimeError, KeyError, ValueError) as error:
            if self.is_closed:
                raise ModelClosedError from error
            raise

    @own_settings()
    def dequantized(self, path: str, tile: int, expert: int | None = None) -> np.ndarray:
        check_open(self)
        layer, name = split_path(path)
        if layer is None:
            value, first, rows = self.params[path], 0, self.params[path].shape[0]
        else:
            tensor = self.params["layers"][name]
            value, first, rows = tensor.options[tensor.which[layer]], tensor.first[layer], tensor.rows
        if expert is not None:
            rows //= self.config.num_experts
            first += expert * rows
        count = min(LANES, rows - LANES * tile)
        w = Matrices(value, jnp.int32(first + LANES * tile), (count, value.shape[1]))
        return np.asarray(_dequantize_rows(w))

    def memory(self) -> dict[str, int] | None:
        check_open(self)
        stats = self.device.memory_stats()
        if not stats:
            return None
        return {"peak": stats["peak_bytes_in_use"], "planned": self.plan.total, "cache": self.plan.cache}

    def forward(self, token_ids: Sequence[int], **options: Unpack[ForwardOptions]) -> Forward:
        """As ``Runner.forward``; ``interventions`` change stages inside the jitted model."""
        request = checked_forward(self, token_ids, **options)
        with self._open():
            return self._forward(request)

    @own_settings()
    def _forward(self, r: ForwardRequest) -> Forward:
        token_ids, chosen, expert_ids = r.token_ids, r.layers, r.expert_ids
        row = len(r.beside) // 2
        tokens = _rows([*r.beside[:row], token_ids, *r.beside[row:]], len(token_ids))
        decoder = self.decoder.clone(
            capture=r.capture, interventions=r.interventions, layers=None if r.is_whole else chosen
        )
        chunks = chunk_lengths(len(token_ids), r.chunk_sizes or PREFILL_CHUNKS)
        length = whole_tiles(sum(chunks))  # prompts of nearby lengths share a program
        cache = KVCache.create(self.config, len(tokens), length, self.cache_dtype, self.device)
        parts, start = [], 0
        for chunk in chunks:
            part = slice(start, start + chunk)
            forced = None
            if expert_ids is not None:
                forced = _padded(expert_ids[:, part], 1, chunk)[:, None].repeat(len(tokens), axis=1)
            ids, begin = _padded(tokens[:, part], 1, chunk), jnp.full((len(tokens),), start)
            with recording(self._record):
                outputs = _forward_chunk(decoder, self.params, cache, ids, begin, forced, row)
            cache = outputs.pop("cache")
            real = min(chunk, len(token_ids) - start)
            parts.append(jax.tree.map(lambda x, n=real: np.asarray(x)[:n], outputs))
            start += chunk
        whole = jax.tree.map(lambda *p: np.concatenate(p), *parts)
        stages = {
            (name, None if index is None else chosen[index]): value
            for (name, index), value in whole["stages"].items()
        }
        return Forward(whole["logits"], np.moveaxis(whole["expert_ids"], 0, 1), stages)

    @own_settings()
    def log_likelihoods(self, token_ids: Sequence[int], *, first: int = 1) -> np.ndarray:
        tokens = checked_text(self, token_ids, first)
        chunks = chunk_lengths(len(tokens) - 1)
        length = whole_tiles(sum(chunks))
        cache = KVCache.create(self.config, 1, length, self.cache_dtype, self.device)
        with self._open():
            return log_likelihoods(self.decoder.model, self.params, cache, tokens, chunks, first)

    def stream(
        self,
        token_ids: Sequence[int],
        *,
        max_tokens: int,
        sampling: Sampling,
        stop_ids: Collection[int] = (),
        reuse: bool = False,
    ) -> Iterator[int]:
        prompt = checked_prompt(self, token_ids).tolist()
        return self._stream(Request(prompt, sampling, max_tokens, stop_ids), reuse)

    def _stream(self, request: Request, reuse: bool) -> Iterator[int]:
        with self._open():
            held, self._spare_tokens = self._spare_tokens, []
            batch = self._take_spare()
            tokens = list(request.token_ids)
            self.reused_tokens = filled = _shared(held, tokens) if reuse else 0
            try:
                batch.admit(
                    tokens,
                    sampling=request.sampling,
                    max_tokens=request.max_tokens,
                    stop_ids=request.stop_ids,
                    filled=filled,
                )
                written, count, reason = 0, 1, None
                while reason is None:
                    began = time.perf_counter()
                    with recording(self._record):
                        made = batch.step(count, ahead=count if written else 0)
                    for progress in made:
                        reason, written = progress.finish_reason, written + len(progress.tokens)
                        count = _next_count(count, time.perf_counter() - began)
                        tokens += progress.tokens
                        yield from progress.tokens
                if reason == "nonfinite":
                    raise self._nonfinite(len(request.token_ids) + written - 1)
            finally:
                self._keep_spare(batch, tokens)

    def open_batch(self, slots: int, *, context: int | None = None) -> Batch:
        check_open(self)
        context = context or self.max_context
        length, itemsize = _cache_length(context), self.cache_dtype.itemsize
        check_slots(self.config, slots, length, itemsize, available_memory(self.device))
        return self._new_batch(slots, context)

    def generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int | Sequence[int],
        sampling: Sampling | Sequence[Sampling],
        stop_ids: Collection[int] = (),
        slots: int | None = None,
        is_over: IsOver | None = None,
    ) -> list[Generated]:
        check_open(self)
        settings = per_prompt(len(prompts), max_tokens, sampling)
        if not prompts:
            return []
        longest = max(len(prompt) + limit for prompt, (limit, _) in zip(prompts, settings, strict=True))
        # of few lengths, so that few shapes are compiled
        context = min(max(MIN_BATCH_TOKENS, 1 << (longest - 1).bit_length()), self.max_context)
        if slots is None:
            free = available_memory(self.device).nbytes
            most, itemsize = min(len(prompts), DEFAULT_SLOTS), self.cache_dtype.itemsize
            slots = fitting_slots(self.config, most, _cache_length(context), itemsize, free)
        batch = self.open_batch(slots, context=context)
        requests = [
            Request(prompt, its_sampling, limit, frozenset(stop_ids))
            for prompt, (limit, its_sampling) in zip(prompts, settings, strict=True)
        ]
        with self._open():
            return run_all(batch, requests, is_over)

    def _nonfinite(self, position: int) -> NumericalError:
        return NumericalError(
            f"the jax backend's logits are not finite at position {position}: "
            "run `qwen3-moe trace` to find the first stage that is not"
        )

    def _take_spare(self) -> Batch:
        """A batch with one slot: the last request's buffers, unless another one has them."""
        batch, self._spare = self._spare, None
        return batch or self._new_batch(1, self.max_context)

    def _keep_spare(
        self, batch: Batch, tokens: Sequence[int] = (), is_exit: Callable[[], bool] = sys.is_finalizing
    ) -> None:
        """Lets the next request use this one's buffers, unless a failed step has taken them.

        ``tokens`` are the prompt and what was written: those in the cache are known to the next request.
        At the interpreter's exit JAX is gone before the last streams are, and so is ``sys`` itself.
        """
        if self.is_closed or is_exit():
            return
        if batch.is_whole:
            self._spare_tokens = list(tokens[: batch.sound_length(0)])
            batch.free_all()
            self._spare = batch

    @own_settings()
    def _new_batch(self, slots: int, context: int) -> Batch:
        length = _cache_length(context)
        cache = KVCache.create(self.config, slots, length, self.cache_dtype, self.device)
        batch = Batch(self.decoder, self.params, cache, context)
        self._batches.add(batch)
        return batch


def _cache_length(context: int) -> int:
    """Positions of a cache for ``context`` tokens and one more chunk, in whole tiles."""
    return whole_tiles(context + PREFILL_CHUNKS[-1])


def _shared(held: Sequence[int], tokens: Sequence[int]) -> int:
    """How many tokens of a prompt a row holds from its beginning: not the last, which is the first step's."""
    pairs = zip(held, tokens[:-1], strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(held), len(tokens) - 1))


def _next_count(count: int, seconds: float) -> int:
    """Tokens per dispatch after ``count`` tokens took ``seconds``."""
    return min(2 * count, MAX_STEPS) if seconds < SECONDS_PER_DISPATCH / 2 else count


@jax.jit
def _dequantize_rows(w: Matrices) -> jax.Array:
    """All rows of a matrix."""
    return dequantize_on_device(w.slice(0, w.rows))


@partial(
    Program,
    static_argnames=("decoder", "row"),
    donate_argnames=("cache",),
    compiler_options=COMPILER_OPTIONS,
)
def _forward_chunk(
    decoder: Decoder,
    params: Params,
    cache: KVCache,
    token_ids: jax.Array,
    start: jax.Array,
    expert_ids: jax.Array | None,
    row: int,
) -> dict[str, Any]:
    """One chunk of a batch of prompts [B, T], its row ``row`` alone: logits [T, V], expert_ids [T, L, X],
    stages with T first; and the cache of the batch."""
    step = decoder.read(params, token_ids, start, cache, expert_ids)
    return {
        "logits": step.logits[row],
        "expert_ids": jnp.moveaxis(step.expert_ids[:, row], 0, 1),
        "cache": step.cache,
        "stages": dict(_sown(step.stages, row)),
    }


def _sown(stages: Mapping[str, jax.Array], row: int) -> Iterator[tuple[StageKey, jax.Array]]:
    """Stages of one sequence out of Flax's collection: ((name, index of the layer), value [T, ...])."""
    for name, value in stages.items():
        if name in LAYER_STAGE_NAMES:
            yield from (((name, i), layer[row]) for i, layer in enumerate(value))
        else:
            yield (name, None), value[row]


def _rows(sequences: Sequence[Sequence[int] | NDArray[np.int32]], length: int) -> np.ndarray:
    """Token ids int32 [B, length]: longer sequences are cut, zeros follow shorter ones."""
    rows = np.zeros((len(sequences), length), np.int32)
    for row, sequence in zip(rows, sequences, strict=True):
        part = np.asarray(sequence[:length])
        row[: len(part)] = part
    return rows


def _padded(values: np.ndarray, axis: int, length: int) -> np.ndarray:
    """``values`` with zeros after them up to ``length`` along ``axis``."""
    widths = [(0, 0)] * values.ndim
    widths[axis] = (0, length - values.shape[axis])
    return np.pad(values, widths)
