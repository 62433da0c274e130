"""The jax backend: the Flax model, jitted as a whole, behind the ``Runner`` protocol."""

import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict

from convert.model_source import ModelSource
from convert.packed import LANES
from convert.progress import ProgressCallback
from kernels_pallas import Matrices
from kernels_pallas import dequantize as dequantize_on_device
from qwen3_moe_jax.errors import ContextOverflowError, NumericalError
from qwen3_moe_jax.generate import (
    PREFILL_CHUNKS,
    DecodeState,
    Params,
    chunk_lengths,
    generate,
    prefill,
)
from qwen3_moe_jax.kv_cache import KVCache
from qwen3_moe_jax.memory_plan import MemoryPlan, available_main_memory
from qwen3_moe_jax.model import (
    STAGES_COLLECTION,
    Intervention,
    Qwen3Moe,
)
from qwen3_moe_jax.params import GPU_ROLES, load_params
from qwen3_moe_jax.runner import Forward
from qwen3_moe_jax.sampling import Sampling
from qwen3_moe_jax.stacks import stack_layers
from qwen3_moe_jax.stages import LAYER_STAGES, StageKey
from qwen3_moe_jax.token_choice import SamplingArrays

LAYER_STAGE_NAMES = frozenset(stage.name for stage in LAYER_STAGES)

CACHE_DTYPE = jnp.float32

SECONDS_A_DISPATCH = 0.05
"""Streaming asks the device for as many tokens at once as take about this long."""

MOST_TOKENS_A_DISPATCH = 32


def enable_compilation_cache() -> None:
    """Keeps compiled programs on disk between runs, unless the user has chosen a place already."""
    if jax.config.jax_compilation_cache_dir is None:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(root / "qwen3_moe_jax" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _available_memory(device: jax.Device) -> tuple[int | None, str]:
    """Bytes that are free where ``device`` keeps its arrays, and that place's name."""
    if device.platform == "cpu":
        return available_main_memory(), "main memory"
    stats = device.memory_stats() or {}
    limit = stats.get("bytes_limit")
    return limit and limit - stats.get("bytes_in_use", 0), device.device_kind


class JaxRunner:
    """The model on JAX's default device; see ``runner.Runner`` for the protocol.

    Attributes:
      model: the Flax module.
      params: its parameters, packed.
      plan: the memory that it is expected to take.
    """

    name = "jax"
    forward_options = frozenset({"layers", "chunk_sizes", "interventions"})

    def __init__(
        self,
        source: ModelSource,
        *,
        max_context: int | None = None,
        compute_dtype: Any = jnp.float32,
        progress: ProgressCallback | None = None,
    ):
        """Args: source, an open model; compute_dtype, jnp.float32 or jnp.bfloat16, of matrix operands."""
        enable_compilation_cache()
        self.config = source.config
        self.max_context = max_context or source.config.max_position_embeddings
        self.compute_dtype = jnp.dtype(compute_dtype)
        self.device = jax.devices()[0]
        roles = {} if self.device.platform == "cpu" else GPU_ROLES
        self.model = Qwen3Moe(
            source.config, self.compute_dtype, types=FrozenDict(source.types), roles=FrozenDict(roles)
        )
        itemsize = jnp.dtype(CACHE_DTYPE).itemsize
        self.plan = MemoryPlan.of(source, self.max_context + PREFILL_CHUNKS[-1], itemsize)
        self.plan.check(*_available_memory(self.device))
        self.params = load_params(source, roles, self.device, progress)
        self._spare_cache: KVCache | None = None

    def describe(self) -> dict[str, object]:
        device = self.device
        types = sorted({t.name for t in self.model.types.values()})
        return {
            "backend": self.name,
            "device": f"{device.device_kind} ({device.platform})",
            "compute_dtype": self.compute_dtype.name,
            "implementations": dict.fromkeys(types, "xla"),
            "fallbacks": [],
        }

    def close(self) -> None:
        self.params = {}

    def dequantized(self, path: str, tile: int, expert: int | None = None) -> np.ndarray:
        """Sixteen rows of a matrix as this backend's own code unpacks them on the device: float32 [16, K].

        Args:
          path: of the parameter.
          tile: rows 16 tile to 16 tile + 15 are wanted.
          expert: which matrix of an expert stack.
        """
        place = stack_layers(self.config, self.model.types, self.model.roles)[0].get(path)
        value = self.params[path] if place is None else self.params["stacks"][place.stack]
        first = 0 if place is None else place.first
        if expert is not None:
            first += expert * (place.rows // self.config.num_experts)
        w = Matrices(value, jnp.int32(first + LANES * tile), (LANES, value.shape[1]))
        return np.asarray(jax.jit(lambda w: dequantize_on_device(w.slice(0, LANES)))(w))

    def memory(self) -> dict[str, int] | None:
        """Bytes of device memory at the peak and as planned; None where JAX cannot say."""
        stats = self.device.memory_stats()
        return stats and {"peak": stats["peak_bytes_in_use"], "planned": self.plan.total}

    def forward(
        self,
        token_ids: Sequence[int],
        *,
        capture: Collection[str] = (),
        expert_ids: np.ndarray | None = None,
        layers: Sequence[int] | None = None,
        chunk_sizes: Sequence[int] = PREFILL_CHUNKS,
        interventions: Sequence[Intervention] = (),
    ) -> Forward:
        """As ``Runner.forward``; ``interventions`` change stages inside the jitted model."""
        tokens = np.asarray(token_ids, np.int32)
        if len(tokens) > self.max_context:
            raise ContextOverflowError(len(tokens), self.max_context)
        chosen = tuple(range(self.config.num_hidden_layers) if layers is None else layers)
        model = self.model.clone(
            capture=frozenset(capture),
            interventions=tuple(interventions),
            layers=None if layers is None else chosen,
        )
        chunks = chunk_lengths(len(tokens), chunk_sizes)
        cache = KVCache.create(model.config, 1, sum(chunks))  # prompts of nearby lengths share a program
        parts, start = [], 0
        for chunk in chunks:
            part = slice(start, start + chunk)
            forced = None if expert_ids is None else _padded(expert_ids[:, part], 1, chunk)[:, None]
            outputs = _forward_chunk(
                model,
                self.params,
                cache,
                _padded(tokens[part], 0, chunk)[None],
                jnp.full((1,), start),
                forced,
            )
            cache = outputs.pop("cache")
            real = min(chunk, len(tokens) - start)
            parts.append(jax.tree.map(lambda x, n=real: np.asarray(x)[:n], outputs))
            start += chunk
        whole = jax.tree.map(lambda *p: np.concatenate(p), *parts)
        stages = {
            (name, None if index is None else chosen[index]): value
            for (name, index), value in whole["stages"].items()
        }
        return Forward(whole["logits"], np.moveaxis(whole["expert_ids"], 0, 1), stages)

    def stream(
        self,
        token_ids: Sequence[int],
        *,
        max_tokens: int,
        sampling: Sampling,
        stop_ids: Collection[int] = (),
    ) -> Iterator[int]:
        num_prompt = len(token_ids)
        if not 0 < num_prompt < self.max_context:
            raise ContextOverflowError(num_prompt, self.max_context)
        arrays = SamplingArrays.of([sampling])
        stops = jnp.asarray(sorted(stop_ids), jnp.int32).reshape(-1)
        last = min(num_prompt + max_tokens, self.max_context)
        state = self._start([token_ids])
        try:
            state = prefill(self.model, self.params, state, arrays, stops, [num_prompt])
            seen, block = num_prompt, 1
            while True:
                length = int(state.length[0])
                for token in np.asarray(state.tokens[0, seen:length]).tolist()[: last - seen]:
                    if token in stop_ids:
                        return
                    yield token
                seen = length
                if state.nonfinite[0]:
                    raise NumericalError(
                        f"the jax backend's logits are not finite at position {length - 1}: "
                        "run `qwen3-moe trace` to find the first stage that is not"
                    )
                if state.finished[0] or seen >= last:
                    return
                began = time.perf_counter()
                limit = jnp.asarray([min(seen + block, last)], jnp.int32)
                state = jax.block_until_ready(generate(self.model, self.params, state, arrays, stops, limit))
                if time.perf_counter() - began < SECONDS_A_DISPATCH / 2:
                    block = min(2 * block, MOST_TOKENS_A_DISPATCH)
        finally:
            self._keep_cache(state)

    def _keep_cache(self, state: DecodeState) -> None:
        """Lets the next request use this one's buffers.

        What they hold is overwritten before it is seen; NaN would not be. After a
        failed step (out of memory, say) the buffers are gone and new ones are made.
        """
        is_whole = not any(x.is_deleted() for x in jax.tree.leaves(state))
        self._spare_cache = state.cache if is_whole and not state.nonfinite[0] else None

    def _start(self, prompts: Sequence[Sequence[int]]) -> DecodeState:
        """The state of a batch before its prefill."""
        tokens = np.zeros((len(prompts), self.max_context), np.int32)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = prompt
        cache, self._spare_cache = self._spare_cache, None
        if cache is None:
            length = self.max_context + PREFILL_CHUNKS[-1]
            cache = KVCache.create(self.config, len(prompts), length, CACHE_DTYPE)
        lengths = jnp.asarray([len(p) for p in prompts], jnp.int32)
        return DecodeState.start(cache, jnp.asarray(tokens), lengths, self.config.vocab_size)


@partial(jax.jit, static_argnames="model", donate_argnames="cache")
def _forward_chunk(
    model: Qwen3Moe,
    params: Params,
    cache: KVCache,
    token_ids: jax.Array,
    start: jax.Array,
    expert_ids: jax.Array | None,
) -> dict[str, Any]:
    """One chunk of a prompt: logits [T, V], expert_ids [T, L, X], stages with T first, and the cache."""

    def whole(model: Qwen3Moe, *args: Any) -> dict[str, Any]:
        output = model(*args)
        logits = model.logits(output.hidden)
        chosen = jnp.moveaxis(output.expert_ids[:, 0], 0, 1)
        return {"logits": logits[0], "expert_ids": chosen, "cache": output.cache}

    outputs, variables = model.apply(
        {"params": params}, token_ids, cache, start, expert_ids, method=whole, mutable=[STAGES_COLLECTION]
    )
    return {**outputs, "stages": dict(_sown(variables.get(STAGES_COLLECTION, {})))}


def _sown(stages: Mapping[str, jax.Array]) -> Iterator[tuple[StageKey, jax.Array]]:
    """Stages of one sequence out of Flax's collection: ((name, index of the layer), value [T, ...])."""
    for name, value in stages.items():
        if name in LAYER_STAGE_NAMES:
            yield from (((name, i), layer[0]) for i, layer in enumerate(value))
        else:
            yield (name, None), value[0]


def _padded(values: np.ndarray, axis: int, length: int) -> np.ndarray:
    """``values`` with zeros after them up to ``length`` along ``axis``."""
    widths = [(0, 0)] * values.ndim
    widths[axis] = (0, length - values.shape[axis])
    return np.pad(values, widths)
