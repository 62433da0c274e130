"""Times a batch of sequences on the jax backend: their prompts, then what all of them write at once."""

import time
from dataclasses import replace

import numpy as np

from qwen3_moe_jax.core.errors import NumericalError
from qwen3_moe_jax.core.sampling import Sampling
from qwen3_moe_jax.jax_backend.generate import MAX_STEPS, chunk_lengths
from qwen3_moe_jax.jax_backend.runner import JaxRunner


class BatchRun:
    """Runs a batch once per call; gives the seconds of its prompts and of its new tokens.

    Prompts end when every sequence has its first token; the first ones to have it go on writing
    meanwhile, as in every batch. From there each sequence writes the same number of tokens.
    """

    def __init__(self, runner: JaxRunner, prompts: np.ndarray, new_tokens: int, sampling: Sampling):
        """Opens the batch.

        Args:
          runner: the backend.
          prompts: int32 [B, T].
          new_tokens: of each sequence; 0 times prompts alone.
          sampling: of every sequence, but for its seed.

        Raises:
          MemoryPlanError: its KV cache does not fit the memory that is free.
        """
        self._prompts, self._new_tokens = prompts, new_tokens
        self._samplings = [replace(sampling, seed=i) for i in range(len(prompts))]
        slots, length = prompts.shape
        meanwhile = slots * len(chunk_lengths(length))  # no step reads less than a chunk
        self._batch = runner.open_batch(slots, context=length + meanwhile + new_tokens + 2)

    def __call__(self) -> tuple[float, ...]:
        self._batch.free_all()
        for prompt, sampling in zip(self._prompts, self._samplings, strict=True):
            self._batch.admit(prompt, sampling=sampling)
        began = time.perf_counter()
        written: set[int] = set()
        while len(written) < len(self._prompts):
            written |= set(self._step(1))
        seconds = [time.perf_counter() - began]
        if self._new_tokens:
            began = time.perf_counter()
            for start in range(0, self._new_tokens, MAX_STEPS):
                self._step(min(MAX_STEPS, self._new_tokens - start))
            seconds.append(time.perf_counter() - began)
        return tuple(seconds)

    def _step(self, tokens: int) -> list[int]:
        """The slots that wrote something."""
        progress = self._batch.step(tokens)
        if any(p.finish_reason == "nonfinite" for p in progress):
            raise NumericalError("logits of the batch are not finite: `qwen3-moe bisect jax` says where")
        return [p.slot for p in progress if p.tokens]
