"""Log-probabilities that come with the tokens; of a text that is there, see ``serve/test_clients``."""

import numpy as np
import pytest

from qwen3_moe_jax.core.sampling import Sampling
from tests.tolerances import TOKEN_SCORES


@pytest.fixture(scope="module")
def batch(exact_runner):
    return exact_runner.open_batch(1, context=256)


def written(batch, prompt, **options):
    """Tokens, scores and slot of a sequence of 6 tokens."""
    slot = batch.admit(prompt, max_tokens=6, **options)
    tokens, scores = [], []
    while batch.waiting or batch.running:
        for p in batch.step(4, prompt_tokens=2048):
            tokens += p.tokens
            scores += p.scores or []
    batch.free(slot)
    return tokens, scores


def log_softmax(logits):
    logits = logits.astype(np.float64)
    return (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )


def test_scores_are_those_of_the_models_own_logits(exact_runner, batch):
    sampling = Sampling(temperature=1.5, seed=3, presence_penalty=2.0)
    prompt = [(11 * i) % 300 for i in range(24)]
    plain, none = written(batch, prompt, sampling=sampling)
    tokens, scores = written(batch, prompt, sampling=sampling, top_logprobs=5)
    assert (tokens, none, len(scores)) == (plain, [], 6)
    wanted = log_softmax(exact_runner.forward([*prompt, *tokens]).logits[len(prompt) - 1 : -1])
    own = wanted[np.arange(6), tokens]
    np.testing.assert_allclose([s.logprob for s in scores], own, atol=TOKEN_SCORES)
    best = np.sort(wanted)[:, :-6:-1]
    np.testing.assert_allclose([[v for _, v in s.top] for s in scores], best, atol=TOKEN_SCORES)
    for row, score in zip(wanted, scores, strict=True):
        np.testing.assert_allclose(
            [row[i] for i, _ in score.top], [v for _, v in score.top], atol=TOKEN_SCORES
        )
