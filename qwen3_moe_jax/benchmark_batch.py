"""Times a batch of sequences on the jax backend: their prompts, then what all of them write at once."""

import time
from dataclasses import replace

import numpy as np

from qwen3_moe_jax.batching import PREFILL_TOKENS, Batch
from qwen3_moe_jax.benchmark import batch_nbytes
from qwen3_moe_jax.errors import MemoryPlanError, NumericalError
from qwen3_moe_jax.generate import MOST_STEPS, PREFILL_CHUNKS, chunk_lengths
from qwen3_moe_jax.jax_runner import CACHE_UNIT, JaxRunner
from qwen3_moe_jax.kv_cache import KVCache
from qwen3_moe_jax.memory_plan import available_memory
from qwen3_moe_jax.sampling import Sampling


class BatchRun:
    """Runs a batch once a call; gives the seconds of its prompts and of its new tokens.

    Prompts end when every sequence has its first token; the first ones to have it go on writing
    meanwhile, as in every batch. From there each sequence writes the same number of tokens.
    """

    def __init__(self, runner: JaxRunner, prompts: np.ndarray, new_tokens: int, sampling: Sampling):
        """Checks the memory.

        Args:
          runner: the backend.
          prompts: int32 [B, T].
          new_tokens: of each sequence; 0 times prompts alone.
          sampling: of every sequence, but for its seed.

        Raises:
          MemoryPlanError: the batch does not fit the memory that is free.
        """
        self._runner, self._prompts, self._new_tokens = runner, prompts, new_tokens
        self._samplings = [replace(sampling, seed=i) for i in range(len(prompts))]
        batch, length = prompts.shape
        meanwhile = batch * len(chunk_lengths(length))
        self._capacity = length + meanwhile + new_tokens + 2
        room = self._capacity + PREFILL_CHUNKS[-1]
        self._cache_length = -(-room // CACHE_UNIT) * CACHE_UNIT
        self._check_memory(min(batch * length, PREFILL_TOKENS))

    def _check_memory(self, tokens: int) -> None:
        runner = self._runner
        itemsize = runner.cache_dtype.itemsize
        needed = batch_nbytes(runner.config, len(self._prompts), self._cache_length, tokens, itemsize)
        free, where = available_memory(runner.device)
        if free is not None and needed > free:
            raise MemoryPlanError(
                f"{needed / 1e9:.1f} GB for cache and activations, {free / 1e9:.1f} GB free in {where}"
            )

    def __call__(self) -> tuple[float, ...]:
        runner = self._runner
        cache = KVCache.create(runner.config, len(self._prompts), self._cache_length, runner.cache_dtype)
        batch = Batch(runner.model, runner.params, cache, self._capacity)
        for prompt, sampling in zip(self._prompts, self._samplings, strict=True):
            batch.admit(prompt, sampling=sampling)
        began = time.perf_counter()
        written: set[int] = set()
        while len(written) < len(self._prompts):
            written |= set(self._step(batch, 1))
        seconds = [time.perf_counter() - began]
        if self._new_tokens:
            began = time.perf_counter()
            for start in range(0, self._new_tokens, MOST_STEPS):
                self._step(batch, min(MOST_STEPS, self._new_tokens - start))
            seconds.append(time.perf_counter() - began)
        return tuple(seconds)

    @staticmethod
    def _step(batch: Batch, tokens: int) -> list[int]:
        """The slots that wrote something."""
        progress = batch.step(tokens)
        if any(p.finish_reason == "nonfinite" for p in progress):
            raise NumericalError("logits of the batch are not finite: `qwen3-moe bisect jax` says where")
        return [p.slot for p in progress if p.tokens]
