"""The tokens of a batch's only sequence, as they come: steps of as many as suit a stream, and drafts."""

import time
from collections.abc import Generator

from qwen3_moe_jax.core.batch import Progress
from qwen3_moe_jax.core.lookup import PromptLookup
from qwen3_moe_jax.jax_backend.batching import Batch
from qwen3_moe_jax.jax_backend.compile_clock import compile_clock
from qwen3_moe_jax.jax_backend.requests import next_count
from qwen3_moe_jax.kernels_pallas.implementations import Record, recording


def progress_of(batch: Batch, slot: int, record: Record, lookup: PromptLookup | None) -> Generator[Progress]:
    """What each step has written, until the sequence ends.

    Args:
      batch: all slots but ``slot`` are free.
      record: notes what runs the operations.
      lookup: drafts what comes next, having the prompt already; None: nobody does.
    """
    count, is_first, reason = 1, True, None
    while reason is None:
        draft = [] if lookup is None or is_first else lookup.draft(batch.left(slot) - 1)
        is_tried = bool(draft) and not batch.is_behind
        began = _now()
        with recording(record):
            if is_tried:
                made = batch.write_draft(slot, draft)
            else:  # where a draft waits for what the device writes meanwhile, it is asked for no more
                made = batch.step(count, ahead=0 if is_first or draft else count)
        seconds = _now() - began
        for progress in made:
            if lookup is not None:
                if is_tried:
                    lookup.tried(draft, progress.tokens, seconds)
                else:
                    lookup.wrote(progress.tokens, 0.0 if is_first else seconds)
            if not (is_first or is_tried):  # the first step's time is the prompt's
                count = next_count(count, seconds)
            reason, is_first = progress.finish_reason, False
            yield progress


def _now() -> float:
    """Seconds, without those of waiting for programs."""
    return time.perf_counter() - compile_clock().seconds()
