"""Between frames and the scheduler: requests as jobs, events as reports."""

from collections.abc import Sequence

from qwen3_moe_jax.serve.engine import frames
from qwen3_moe_jax.serve.engine.jobs import Began, Event, Failed, Job, Wrote


def job_of(m: frames.Submit) -> Job:
    """The job that a front asks for."""
    return Job(
        id=m.id,
        key=m.key,
        token_ids=m.token_ids,
        sampling=m.sampling,
        max_tokens=m.max_tokens,
        stop_ids=frozenset(m.stop_ids),
        scope=m.scope,
        is_resumed=m.is_resumed,
        first_mask=m.first_mask,
        top=m.top,
    )


def progress_of(events: Sequence[Event], counters: dict[str, float]) -> frames.Progress:
    """What has happened since the last report."""
    wrote = [e for e in events if isinstance(e, Wrote)]
    return frames.Progress(
        began=[(e.id, e.cached) for e in events if isinstance(e, Began)],
        wrote=[(e.id, e.tokens, e.finish_reason) for e in wrote],
        failed=[(e.id, e.code, e.message) for e in events if isinstance(e, Failed)],
        counters=counters,
        scored=[(e.id, [(s.logprob, s.top) for s in e.scores]) for e in wrote if e.scores],
    )
