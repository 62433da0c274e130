"""A sequence in the middle of a batch: what ``forward(beside=...)`` returns is its own."""

import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_moe_jax.jax_backend import runner as module
from qwen3_moe_jax.jax_backend.model import Qwen3Moe
from tests import tolerances


@pytest.fixture
def prompt(golden):
    return golden["ids0"][:20]


@pytest.fixture
def others(golden):
    """A longer sequence, which is cut, and shorter ones, which are padded."""
    return [np.concatenate([golden["ids1"], golden["ids2"]]), golden["ids1"][:3], golden["ids2"][:9]]


@pytest.mark.parametrize("chunk_sizes", [(16, 128), (1,)], ids=["prefill", "decode"])
def test_the_row_of_the_prompt_is_returned(jax_runner, prompt, others, chunk_sizes):
    alone = jax_runner.forward(prompt, capture=["l_out", "result_norm"], chunk_sizes=chunk_sizes)
    among = jax_runner.forward(
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
    """The kernel itself needs a GPU: here its signature is served by the ordinary operations."""
    pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
    from qwen3_moe_jax.jax_backend import gpu_decode
    from qwen3_moe_jax.kernels_pallas.decode_step import api as decode_step

    assert module.FUSED_BATCH == decode_step.MAX_BATCH
    batches = []

    def step(params, config, types, token_ids, start, cache, expert_ids=None):
        batches.append(len(token_ids))
        variables, model = {"params": params}, Qwen3Moe(config, types=jax_runner.model.types)
        forced = None if expert_ids is None else expert_ids[:, :, None]
        out = model.apply(variables, token_ids[:, None], cache, start, forced)
        logits = model.apply(variables, out.hidden[:, 0], method="logits")
        return decode_step.StepOutput(logits, (out.cache.k, out.cache.v), out.expert_ids[:, :, 0])

    monkeypatch.setattr(gpu_decode, "decode_step", step)
    expected = jax_runner.forward(prompt)
    monkeypatch.setattr(jax_runner, "model", jax_runner.model.clone(fused_decode=module.FUSED_BATCH))
    beside = (others * 6)[:count]
    forced = expected.expert_ids if is_forced else None
    actual = jax_runner.forward(prompt, beside=beside, expert_ids=forced, chunk_sizes=(1,))
    assert set(batches) == ({count + 1} if count < module.FUSED_BATCH else set())
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
