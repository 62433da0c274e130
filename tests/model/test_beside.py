"""A sequence in the middle of a batch: what ``forward(beside=...)`` returns is its own."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_moe_jax.jax_backend import runner as module
from qwen3_moe_jax.jax_backend.decode_path import LayerByLayer, OneKernel
from tests import tolerances


@pytest.fixture
def prompt(golden):
    return golden["ids0"][:20]


@pytest.fixture
def others(golden):
    """A longer sequence, which is cut, and shorter ones, which are padded."""
    return [np.concatenate([golden["ids1"], golden["ids2"]]), golden["ids1"][:3], golden["ids2"][:9]]


@pytest.mark.parametrize("chunk_sizes", [(16, 128), (1,)], ids=["prefill", "decode"])
def test_the_row_of_the_prompt_is_returned(exact_runner, prompt, others, chunk_sizes):
    alone = exact_runner.forward(prompt, capture=["l_out", "result_norm"], chunk_sizes=chunk_sizes)
    among = exact_runner.forward(
        prompt, beside=others, capture=["l_out", "result_norm"], chunk_sizes=chunk_sizes
    )
    np.testing.assert_allclose(among.logits, alone.logits, atol=tolerances.CHUNKED_LOGITS, rtol=0)
    np.testing.assert_array_equal(among.expert_ids, alone.expert_ids)
    assert among.stages.keys() == alone.stages.keys()
    for key, value in alone.stages.items():
        np.testing.assert_allclose(among.stages[key], value, atol=tolerances.CHUNKED_LOGITS, rtol=0)


def test_forced_experts_beside_others(jax_runner, prompt, others):
    forced = jax_runner.forward(prompt).expert_ids[..., ::-1] ^ 1
    alone = jax_runner.forward(prompt, expert_ids=forced)
    among = jax_runner.forward(prompt, expert_ids=forced, beside=others)
    np.testing.assert_array_equal(among.expert_ids, forced)
    np.testing.assert_allclose(among.logits, alone.logits, atol=tolerances.CHUNKED_LOGITS, rtol=0)


@pytest.mark.parametrize(("count", "is_forced"), [(0, True), (2, True), (2, False), (16, False)])
def test_decoding_takes_the_fused_step_up_to_its_largest_batch(
    jax_runner, prompt, others, monkeypatch, count, is_forced
):
    """The kernel itself needs a GPU: here the network itself stands in for it."""
    batches = []

    class Kernel(OneKernel):
        def reason_against(self, model, params, batch, cache, is_forced=False):
            return None if batch in self.batches else "too many"

        def step(self, model, params, token_ids, *args, **options):
            batches.append(len(token_ids))
            return LayerByLayer().step(model, params, token_ids, *args, **options)

    expected = jax_runner.forward(prompt)
    paths = (Kernel(), LayerByLayer())
    monkeypatch.setattr(jax_runner, "decoder", replace(jax_runner.decoder, paths=paths))
    beside = (others * 6)[:count]
    forced = expected.expert_ids if is_forced else None
    actual = jax_runner.forward(prompt, beside=beside, expert_ids=forced, chunk_sizes=(1,))
    assert set(batches) == ({count + 1} if count < 16 else set())
    np.testing.assert_allclose(actual.logits, expected.logits, atol=tolerances.CHUNKED_LOGITS, rtol=0)
    np.testing.assert_array_equal(actual.expert_ids, expected.expert_ids)


def test_the_runner_says_whether_a_batch_changes_bits(jax_runner, reference_runner):
    assert jax_runner.describe()["batch_invariant"] is False  # a CPU's products depend on their shapes
    assert reference_runner.describe()["batch_invariant"] is True
    assert jax_runner.capabilities.beside


def test_the_prompt_alone_is_checked_against_the_context(source, prompt):
    runner = module.JaxRunner(source, max_context=len(prompt))
    longer = np.concatenate([prompt, prompt])
    logits = runner.forward(prompt, beside=[longer]).logits
    assert jnp.isfinite(logits).all()
