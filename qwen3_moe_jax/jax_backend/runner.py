"""The jax backend: the Flax model, jitted as a whole, behind the ``Runner`` protocol."""

import sys
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, Unpack

import jax
import numpy as np

from qwen3_moe_jax.convert.progress import ProgressCallback
from qwen3_moe_jax.convert.source import ModelSource
from qwen3_moe_jax.core.batch import TokenScore
from qwen3_moe_jax.core.errors import BackendUnavailableError, NumericalError
from qwen3_moe_jax.core.lookup import PromptLookup
from qwen3_moe_jax.core.runner import (
    Capabilities,
    Compilation,
    Forward,
    ForwardOptions,
    ForwardShape,
    Generated,
    IsOver,
    Platform,
    TokenIds,
)
from qwen3_moe_jax.core.runner_arguments import (
    ForwardRequest,
    check_open,
    checked_forward,
    checked_prompt,
    checked_text,
    open_throughout,
    per_prompt,
)
from qwen3_moe_jax.core.sampling import Sampling
from qwen3_moe_jax.jax_backend import generate, programs, spare_workers
from qwen3_moe_jax.jax_backend.batches import Batches
from qwen3_moe_jax.jax_backend.batching import Batch
from qwen3_moe_jax.jax_backend.beside_load import load_beside
from qwen3_moe_jax.jax_backend.compile_clock import compile_clock
from qwen3_moe_jax.jax_backend.decode_path import PATHS
from qwen3_moe_jax.jax_backend.forward import forward
from qwen3_moe_jax.jax_backend.generate import chunk_lengths
from qwen3_moe_jax.jax_backend.kv_cache import KVCache, whole_tiles
from qwen3_moe_jax.jax_backend.likelihood import Scored, token_scores
from qwen3_moe_jax.jax_backend.mapped_weights import describe_mapped
from qwen3_moe_jax.jax_backend.native import NATIVE_DTYPE, Native
from qwen3_moe_jax.jax_backend.placement import Placement
from qwen3_moe_jax.jax_backend.preparation import Preparation
from qwen3_moe_jax.jax_backend.program_farm import farm
from qwen3_moe_jax.jax_backend.qwen3_moe import Qwen3Moe
from qwen3_moe_jax.jax_backend.requests import Request, agreed, lowest, run_all, shared_tokens
from qwen3_moe_jax.jax_backend.session_programs import (
    FirstForward,
    Session,
    cache_length,
    dtypes_on,
)
from qwen3_moe_jax.jax_backend.settings import own_settings
from qwen3_moe_jax.jax_backend.sharding import MeshShape
from qwen3_moe_jax.jax_backend.streaming import progress_of
from qwen3_moe_jax.jax_backend.token_scores import MAX_TOP, host_scores
from qwen3_moe_jax.jax_backend.wanted import Wanted, long_of, missing_of
from qwen3_moe_jax.kernels_pallas.implementations import NATIVE, Record, recording
from qwen3_moe_jax.machine.headroom import available_memory
from qwen3_moe_jax.machine.jax_devices import all_devices, enable_compilation_cache
from qwen3_moe_jax.machine.kernels import AUTO
from qwen3_moe_jax.machine.memory import cache_nbytes, check_slots, fitting_slots

DEFAULT_SLOTS = 16
"""Sequences at a time of ``generate_batch`` unless told otherwise: what one decode kernel holds."""

MIN_BATCH_TOKENS = 256
"""Slots of ``generate_batch`` have room for at least this many tokens."""


class JaxRunner:
    """The model on JAX's default device; see ``runner.Runner`` for the protocol.

    Attributes:
      placement: where the model lies.
      decoder: the Flax module and the ways in which it writes a token.
      params: the parameters, packed.
      reused_tokens: tokens of the last stream's prompt that were in the cache already.
      plan: the memory that it is expected to take.
      kernels: those that it runs, and why.
    """

    name = "jax"
    reused_tokens = 0
    capabilities = Capabilities(
        beside=True, interventions=True, open_batch=True, dequantized=True, concurrent=True, lookup=True
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
        mesh: MeshShape | Literal["auto"] | None = None,
        progress: ProgressCallback | None = None,
        first_prompt: int | None = None,
        first_forward: FirstForward | None = None,
        others_follow: bool = True,
        prompt_lookup: bool = False,
    ):
        """Loads the weights.

        Args:
          source: an open model.
          max_context: tokens of the KV cache; None is all that the model was trained for.
          compute_dtype: float32 or bfloat16 operands of matrix products. None is bfloat16 on a GPU, whose
            kernels take 16-bit operands; on a CPU it is activations of 15 bits in integer dots where these
            run (``kernels``), else float32.
          cache_dtype: of the KV cache: float32, float16, bfloat16 or int8 (with a float32 scale for
            each head's vector); None is float32 on the CPU and float16 on a GPU.
          kernels: "hopper", "portable", "native" or "xla"; "auto" takes the fastest that the device has.
          mesh: how the model is split over several devices; "auto" uses as many as it can, None one.
          progress: told how far loading is.
          first_prompt: about how many tokens will be read first: the programs for that are made while the
            weights are loaded. None is not known: those on disk are loaded, and no others made.
          first_forward: of the first ``forward``, the tokens, the stages that it captures and its layers: its
            program is made at the same time, unless it is on disk.
          others_follow: whether prompts of other sizes may come, whose programs are made after the load.
          prompt_lookup: whether streams will have a ``lookup``, whose programs belong to the session then.

        Raises:
          BackendUnavailableError: JAX does not start, or the device does not run these kernels, or drafts
            could change an answer's bits here.
          MemoryPlanError: weights and cache do not fit the device.
          OptionError: the model cannot be split so, or the devices are too few.
        """
        if not programs.use_default_store():
            enable_compilation_cache()
        compile_clock()
        self.config = source.config
        self.max_context = source.config.max_position_embeddings if max_context is None else max_context
        self.placement = place = Placement.of(source, mesh, all_devices())
        self.device = place.device
        self.kernels = place.kernels(kernels)
        self.compute_dtype, self.cache_dtype = dtypes_on(self.device, compute_dtype, cache_dtype)
        self._types, self._mesh = dict(source.types), place.describe(source)
        self.plan = place.plan(source, cache_length(self.max_context), self.cache_dtype.itemsize)
        self._weights = describe_mapped(source, self.plan)
        has_spares = first_prompt is not None and self._take_spare_workers()
        is_split = place.shards is not None
        native = Native.begin(self.device, kernels, compute_dtype is not None, is_split=is_split)
        self.is_closed, self._batches, self._has_drafts = False, Batches(), prompt_lookup
        self.kernels = native.kernels(self.kernels)
        self.params = load_beside(
            partial(self._get_ready, first_prompt, first_forward, has_spares, others_follow),
            lambda stored: self.preparation.begin(stored, compiles=False),
            partial(place.load, source, self.plan),
            progress,
            undo=lambda: self.preparation.close(),
            is_beside=place.is_gpu,
        )
        if has_spares and others_follow:
            self.preparation.begin_elsewhere(long_of(missing_of(self.preparation.wanted)))
        self._record = Record()

    def _take_spare_workers(self) -> bool:
        """Lets spares start their device while this process finds out what is missing; returns whether."""
        programs.start_compilers(count := spare_workers.count(), self.plan.total, here=0)
        return count > 0 and farm().count > 0

    @own_settings()
    def _get_ready(
        self, prompt: int | None, check: FirstForward | None, aided: bool, others_follow: bool
    ) -> list[Wanted]:
        """Compiles what the first tokens and the check of a file need; returns what is on disk already."""
        kernels, shards = self.kernels.name, self.placement.shards
        model = Qwen3Moe(self.config, self.compute_dtype, kernels=kernels, shards=shards)
        own = self._types, self.device, self.max_context, self.cache_dtype
        self._session = Session.of(model, *own, drafts=self._has_drafts)
        self.decoder = self._session.decoder
        self.preparation = self._preparation_of(self._session)
        self.preparation.goes_on = others_follow
        first = self._session.first(prompt or 1)
        begun = [] if prompt is None else list(first)
        if check is not None and programs.keeps_on_disk():
            begun.insert(0, self._session.forward(*check))  # lowered soonest; its kernels are a prompt's
        missing = missing_of(begun)
        count = len(long_of(missing))
        if not aided:
            programs.start_compilers(count, self.plan.total)
        spare_workers.end()
        if farm().count:  # what takes longest first; ``describe`` traces it here, too
            missing.sort(key=lambda wanted: wanted.program is not generate.decode)
        self.preparation.begin(missing, compiles=True, may_be_here=farm().count < count)
        return [w for w in (self.preparation.wanted if self.platform == "gpu" else first) if w.is_stored]

    def _preparation_of(self, session: Session) -> Preparation:
        return Preparation(
            session.programs(),
            only_when_idle=self.platform == "cpu" or session.slots == 1,
            are_kept=self.placement.shards is None,
        )

    @property
    def platform(self) -> Platform:
        return "gpu" if self.device.platform == "gpu" else "cpu"

    @property
    def cache_nbytes(self) -> int:
        return self.plan.cache

    @property
    def token_nbytes(self) -> int:
        return cache_nbytes(self.config, 1, self.cache_dtype.itemsize)

    def free_nbytes(self) -> int | None:
        farm().end_idle()  # whose memory is free then
        return self.plan.beside(available_memory(self.device).nbytes)

    def set_max_context(self, tokens: int) -> None:
        self.max_context = tokens

    @property
    def model(self) -> Qwen3Moe:
        return self.decoder.model

    def describe(self) -> dict[str, object]:
        device, record = self.device, self._recorded()
        implementations = {t: record.of_type(t) for t in sorted(set(self._types.values()))}
        refused = dict(self.decoder.refused)
        return {
            "backend": self.name,
            "device": f"{device.device_kind} ({device.platform})",
            "kernels": self.kernels.name,
            "kernels_reason": self.kernels.reason,
            "compute_dtype": NATIVE_DTYPE if self.kernels.name == NATIVE else self.compute_dtype.name,
            "cache_dtype": self.cache_dtype.name,
            **({"mesh": self._mesh} if self._mesh else {}),
            **({"weights": self._weights} if self._weights else {}),
            "implementations": {t.name: found for t, found in implementations.items() if found},
            "refused": record.refusals(),
            "decode": self.decoder.describe(),
            "fallbacks": [
                f"decoding is not in {path.name}: {refused[path.name]}"
                for path in PATHS
                if self.platform == "gpu" and path.is_one_launch and path.name in refused
            ],
            "batch_invariant": self.decoder.is_batch_invariant,
        }

    @own_settings()
    def _recorded(self) -> Record:
        """What runs the ops: what has run; of types that have not, what the program of tokens says."""
        if not all(self._record.of_type(t) for t in set(self._types.values())):
            wanted = self._session.tokens(1)
            for ran in wanted.program.ran(**wanted.arguments):
                self._record.add(ran)
        return self._record

    def compilation(self) -> Compilation | None:
        clock, preparation = compile_clock(), self.preparation
        return Compilation(
            seconds=clock.seconds(),
            is_waiting=clock.wait() is not None,
            count_ready=lambda: preparation.made,
            wanted=len(preparation.wanted),
            trouble=tuple(programs.trouble()),
            are_kept=preparation.are_kept,
        )

    def close(self) -> None:
        """Deletes the arrays of weights and of every batch, whoever else still names them."""
        self.is_closed = True
        self.preparation.close()
        self._batches.close()
        params, self.params = self.params, {}
        for array in jax.tree.leaves(params):
            array.delete()

    @own_settings()
    def dequantized(self, path: str, tile: int, expert: int | None = None) -> np.ndarray:
        check_open(self)
        return self.placement.dequantized(self.params, path, tile, expert)

    def memory(self) -> dict[str, int] | None:
        check_open(self)
        if not (stats := self.device.memory_stats()):
            return None
        return {"peak": stats["peak_bytes_in_use"], "planned": self.plan.total, "cache": self.plan.cache}

    def forward(self, token_ids: TokenIds, **options: Unpack[ForwardOptions]) -> Forward:
        """As ``Runner.forward``; ``interventions`` change stages inside the jitted model."""
        request = checked_forward(self, token_ids, **options)
        with open_throughout(self):
            return self._forward(request)

    @own_settings()
    def expect(self, shapes: Sequence[ForwardShape]) -> None:
        """As ``Runner.expect``: other processes make the programs, where that helps."""
        wanted = [one for shape in shapes for one in self._session.forwards(shape)]
        self.preparation.begin_elsewhere(wanted)

    @own_settings()
    def _forward(self, r: ForwardRequest) -> Forward:
        with recording(self._record), self.preparation.working():
            return forward(self.decoder, self.params, r, self._new_cache)

    def log_likelihoods(self, token_ids: TokenIds, *, first: int = 1) -> np.ndarray:
        return self._scored(token_ids, first, 0)[0]

    def token_scores(self, token_ids: TokenIds, *, top: int, first: int = 1) -> list[TokenScore]:
        # One program whatever ``top`` is: the device finds MAX_TOP of them.
        scores = host_scores(*self._scored(token_ids, first, min(MAX_TOP, self.config.vocab_size)))
        return [score._replace(top=score.top[:top]) for score in scores]

    @own_settings()
    def _scored(self, token_ids: TokenIds, first: int, top: int) -> Scored:
        tokens = checked_text(self, token_ids, first)
        chunks = chunk_lengths(len(tokens) - 1)
        cache = self._new_cache(1, whole_tiles(sum(chunks)))
        with open_throughout(self):
            return token_scores(self.decoder.model, self.params, cache, tokens, chunks, first, top)

    def stream(
        self,
        token_ids: Sequence[int],
        *,
        max_tokens: int,
        sampling: Sampling,
        stop_ids: Collection[int] = (),
        reuse: bool = False,
        lookup: PromptLookup | None = None,
    ) -> Generator[int]:
        prompt = checked_prompt(self, token_ids, lookup).tolist()
        (request,) = agreed([Request(prompt, sampling, max_tokens, stop_ids)])
        if lookup is not None:
            self._session.check_drafts()
            lookup.begin(prompt)
        return self._stream(request, reuse, lookup)

    def _stream(self, request: Request, reuse: bool, lookup: PromptLookup | None) -> Generator[int]:
        with open_throughout(self):
            batch, held = self._take_spare()
            tokens = list(request.token_ids)
            self.reused_tokens = filled = shared_tokens(held, tokens) if reuse else 0
            try:
                slot = batch.admit(
                    tokens,
                    sampling=request.sampling,
                    max_tokens=request.max_tokens,
                    stop_ids=request.stop_ids,
                    filled=filled,
                )
                for progress in progress_of(batch, slot, self._record, lookup):
                    tokens += progress.tokens
                    yield from progress.tokens
                    if progress.finish_reason == "nonfinite":
                        raise self._nonfinite(len(tokens) - 1)
            finally:
                self._keep_spare(batch, tokens)

    def open_batch(self, slots: int, *, context: int | None = None, is_invariant: bool = False) -> Batch:
        check_open(self)
        context = context or self.max_context
        length, itemsize = cache_length(context), self.cache_dtype.itemsize
        farm().end_idle()
        check_slots(self.config, slots, length, itemsize, available_memory(self.device))
        batch = self._new_batch(slots, context)
        if is_invariant:
            try:
                batch.keep_invariant()
            except BackendUnavailableError:
                batch.close()
                raise
        return batch

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
            free = self.free_nbytes()
            maximum, itemsize = min(len(prompts), DEFAULT_SLOTS), self.cache_dtype.itemsize
            fitting = fitting_slots(self.config, maximum, cache_length(context), itemsize, free)
            slots = lowest(fitting)
        batch = self.open_batch(slots, context=context)
        pairs = zip(prompts, settings, strict=True)
        requests = agreed([Request(p, its, limit, frozenset(stop_ids)) for p, (limit, its) in pairs])
        try:
            with open_throughout(self):
                return run_all(batch, requests, is_over)
        finally:
            batch.preparation.close()  # nobody asks this batch for more

    def _nonfinite(self, position: int) -> NumericalError:
        return NumericalError(
            f"the jax backend's logits are not finite at position {position}: "
            "run `qwen3-moe trace` to find the first stage that is not"
        )

    def _take_spare(self) -> tuple[Batch, list[int]]:
        """A batch with one slot, the last request's unless another one has it; tokens that its row holds."""
        return self._batches.take_spare() or (self._new_batch(1, self.max_context, self.preparation), [])

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
            held = tokens[: batch.sound_length(0)]
            batch.free_all()
            self._batches.keep_spare(batch, held)

    def _new_cache(self, rows: int, length: int) -> KVCache:
        return self.placement.empty_cache(self.config, rows, length, self.cache_dtype)

    @own_settings()
    def _new_batch(self, slots: int, context: int, preparation: Preparation | None = None) -> Batch:
        session = replace(self._session, capacity=context, slots=slots, drafts=False)
        state = generate.empty_state(**session.empty)
        own = preparation or self._preparation_of(session)
        return self._batches.add(Batch(self.decoder, self.params, state, own))
