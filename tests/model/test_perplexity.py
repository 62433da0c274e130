"""Perplexity: the two definitions window by window, and every backend against the recorded reference."""

import hashlib
import math
from pathlib import Path

import numpy as np
import pytest

from qwen3_moe_jax.api import Model
from qwen3_moe_jax.core.errors import ContextOverflowError, NumericalError
from qwen3_moe_jax.jax_backend.runner import JaxRunner
from qwen3_moe_jax.measure.perplexity import Window, check_windows, estimates, measure_perplexity, windows
from qwen3_moe_jax.parity.recorded import fingerprint
from qwen3_moe_jax.text.tokenizer import Tokenizer
from tests.tolerances import PERPLEXITY_PROMISE, RECORDED_LOG_LIKELIHOOD, SCORED_LOG_LIKELIHOOD

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def text() -> str:
    return (DATA / "perplexity-text.txt").read_text()


@pytest.fixture(scope="module")
def recorded():
    with np.load(DATA / "perplexity-reference.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def tokenizer(source):
    return Tokenizer(source.metadata, vocab_size=source.config.vocab_size)


def scored_as_llama_cpp(num_tokens: int, n_ctx: int) -> list[tuple[int, int]]:
    """(first token seen, token scored), from the loops of tools/perplexity/perplexity.cpp."""
    found = []
    for i in range(num_tokens // n_ctx):
        for row in range(n_ctx // 2, n_ctx - 1):  # rows of logits that are kept, but for the last
            found.append((i * n_ctx, i * n_ctx + row + 1))
    return found


def scored_as_hugging_face(num_tokens: int, max_length: int, stride: int) -> list[tuple[int, int]]:
    """(first token seen, token scored): labels that are not -100, shifted by one within the window."""
    found, prev_end = [], 0
    for begin in range(0, num_tokens, stride):
        end = min(begin + max_length, num_tokens)
        labels = list(range(begin, end))
        kept = labels[-(end - prev_end) :]
        found += [(begin, token) for token in labels[1:] if token in kept]
        prev_end = end
        if end == num_tokens:
            break
    return found


def scored(cut: list[Window]) -> list[tuple[int, int]]:
    return [(w.start, token) for w in cut for token in range(w.first, w.end)]


@pytest.mark.parametrize("num_tokens", [1, 7, 8, 9, 16, 17, 41])
@pytest.mark.parametrize("context", [4, 5, 8])
def test_windows_are_those_of_llama_perplexity(num_tokens, context):
    assert scored(windows(num_tokens, context)) == scored_as_llama_cpp(num_tokens, context)


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 8, 9, 16, 17, 41])
@pytest.mark.parametrize(("context", "stride"), [(8, 8), (8, 4), (8, 3), (8, 1), (5, 2)])
def test_windows_are_those_of_the_strided_recipe(num_tokens, context, stride):
    found = scored(windows(num_tokens, context, stride))
    assert found == scored_as_hugging_face(num_tokens, context, stride)
    if stride < context:
        assert [token for _, token in found] == list(range(1, num_tokens))


class FakeRunner:
    """Gives token t the probability 1 / (t + 2), whatever precedes it."""

    name = "fake"
    max_context = 8

    def __init__(self):
        self.seen = []

    def log_likelihoods(self, token_ids, *, first=1):
        self.seen.append(list(token_ids))
        return -np.log(np.asarray(token_ids[first:]) + 2.0)


class FakeTokenizer:
    """A token a letter, a to z; a BOS token where asked for."""

    def __init__(self, bos_id=None):
        self.bos_id = bos_id

    def encode(self, text):
        return ([] if self.bos_id is None else [self.bos_id]) + [ord(c) - ord("a") for c in text]

    def token_bytes(self, token_id, *, show_control=False):
        return b"x" * (token_id + 1)


def test_figures_of_probabilities_known_by_hand():
    found = measure_perplexity(FakeRunner(), FakeTokenizer(), "abcdabcd", context=8, stride=8)
    surprise = np.log([3, 4, 5, 2, 3, 4, 5])
    assert found.tokens_scored == 7
    assert found.perplexity == pytest.approx(math.exp(surprise.mean()))
    error = surprise.std() / math.sqrt(7 - 1)
    assert found.standard_error == pytest.approx(found.perplexity * error)
    assert found.bits_per_byte == pytest.approx(surprise.sum() / math.log(2) / (2 + 3 + 4 + 1 + 2 + 3 + 4))
    assert found.is_complete
    assert found.seconds_left == 0


def test_estimates_grow_window_by_window():
    found = list(estimates(FakeRunner(), FakeTokenizer(), "abcdefgh" * 3, context=8))
    assert [e.windows for e in found] == [1, 2, 3]
    assert [e.tokens_scored for e in found] == [3, 6, 9]
    assert [e.is_complete for e in found] == [False, False, True]
    assert {e.windows_in_all for e in found} == {3}
    assert found[0].perplexity == pytest.approx(found[2].perplexity)


def test_a_begin_token_takes_the_first_place_of_each_window_as_in_llama_perplexity():
    runner = FakeRunner()
    measure_perplexity(runner, FakeTokenizer(bos_id=25), "a" * 15, context=8)
    assert runner.seen == [[25] + [0] * 7] * 2
    strided = FakeRunner()
    measure_perplexity(strided, FakeTokenizer(bos_id=25), "a" * 15, context=8, stride=8)
    assert strided.seen == [[25] + [0] * 7, [0] * 8]


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("abc", {"context": 8}, "3 tokens and at least 8 are needed"),
        ("a", {"context": 8, "stride": 4}, "1 tokens and at least 2"),
        ("", {"context": 8, "stride": 4}, "0 tokens"),
        ("abc", {"context": 9}, "loaded for 8"),
        ("abc", {"context": 3}, "at least 4"),
        ("abc", {"context": 8, "stride": 0}, "from 1 to the context, 8"),
        ("abc", {"context": 8, "stride": 9}, "from 1 to the context, 8"),
    ],
)
def test_what_cannot_be_measured_is_said(text, options, expected):
    with pytest.raises(ValueError, match=expected):
        measure_perplexity(FakeRunner(), FakeTokenizer(), text, **options)


def test_a_stride_may_be_the_context():
    check_windows(8, 8)


def test_log_likelihoods_that_are_not_finite_are_an_error_that_names_the_token():
    class Broken(FakeRunner):
        def log_likelihoods(self, token_ids, *, first=1):
            found = super().log_likelihoods(token_ids, first=first)
            found[2] = np.nan
            return found

    with pytest.raises(NumericalError, match="at token 2 of the text"):
        measure_perplexity(Broken(), FakeTokenizer(), "abcdefgh", context=8, stride=8)


# The embedded model


def test_the_recording_is_of_this_text_and_these_weights(source, text, recorded):
    assert hashlib.sha256(text.encode()).hexdigest() == str(recorded["text_sha256"])
    assert fingerprint(source) == str(recorded["fingerprint"])
    assert len(recorded["log_likelihoods"]) >= 10_000


def test_the_reference_gives_what_was_recorded(reference_runner, tokenizer, text, recorded):
    context = int(recorded["context"])
    ids = tokenizer.encode(text)
    last = windows(len(ids), context, context)[-1]
    found = reference_runner.log_likelihoods(ids[last.start : last.end])
    np.testing.assert_allclose(
        found, recorded["log_likelihoods"][-len(found) :], atol=RECORDED_LOG_LIKELIHOOD
    )


def test_the_reference_scores_what_its_logits_say(reference_runner, tokenizer, text):
    ids = tokenizer.encode(text)[:300]  # two pieces
    logits = reference_runner.forward(ids).logits.astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    expected = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    for first in (1, 20, 270):
        truth = [expected[i - 1, ids[i]] for i in range(first, len(ids))]
        found = reference_runner.log_likelihoods(ids, first=first)
        np.testing.assert_allclose(found, truth, atol=SCORED_LOG_LIKELIHOOD)


def test_jax_gives_the_reference_perplexity_of_10000_tokens(source, jax_runner, text, recorded):
    model = Model(source, jax_runner)
    context = int(recorded["context"])
    found = model.perplexity(text, context=context, stride=context)
    truth = math.exp(-recorded["log_likelihoods"].astype(np.float64).mean())
    assert found.tokens_scored == len(recorded["log_likelihoods"])
    assert found.perplexity == pytest.approx(truth, rel=PERPLEXITY_PROMISE)


def test_jax_float32_gives_every_log_likelihood_of_a_window(exact_runner, tokenizer, text, recorded):
    context = int(recorded["context"])
    ids = tokenizer.encode(text)[:context]
    for first in (1, 257, 400):
        found = exact_runner.log_likelihoods(ids, first=first)
        truth = recorded["log_likelihoods"][first - 1 : context - 1]
        np.testing.assert_allclose(found, truth, atol=SCORED_LOG_LIKELIHOOD)


def test_jax_scores_across_pieces_what_the_reference_does(exact_runner, reference_runner, tokenizer, text):
    ids = tokenizer.encode(text)[:660]
    found = exact_runner.log_likelihoods(ids, first=600)
    truth = reference_runner.log_likelihoods(ids, first=600)
    assert found.shape == truth.shape == (60,)
    np.testing.assert_allclose(found, truth, atol=SCORED_LOG_LIKELIHOOD)


def test_jax_bfloat16_gives_the_reference_perplexity_of_10000_tokens(source, text, recorded):
    context = int(recorded["context"])
    runner = JaxRunner(source, max_context=context, compute_dtype="bfloat16")
    found = Model(source, runner).perplexity(text, context=context, stride=context)
    runner.close()
    truth = math.exp(-recorded["log_likelihoods"].astype(np.float64).mean())
    assert found.perplexity == pytest.approx(truth, rel=PERPLEXITY_PROMISE)


def test_a_text_longer_than_the_cache_is_refused(reference_runner, jax_runner):
    for runner in (reference_runner, jax_runner):
        with pytest.raises(ContextOverflowError):
            runner.log_likelihoods([1] * (runner.max_context + 1))
