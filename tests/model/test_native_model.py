"""The whole model by the CPU's integer dots: recorded logits, the contract's stages, batches, refusals."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.core.errors import BackendUnavailableError
from qwen3_moe_jax.core.sampling import Sampling
from qwen3_moe_jax.jax_backend.kv_cache import KVCache, Span
from qwen3_moe_jax.jax_backend.native import NATIVE_DTYPE, Native
from qwen3_moe_jax.jax_backend.runner import JaxRunner
from qwen3_moe_jax.machine.kernels import AUTO, NATIVE
from qwen3_moe_jax.parity import gate
from qwen3_moe_jax.reference import ReferenceRunner
from qwen3_moe_jax.testing.random_models import SMALL, write_random_gguf
from tests import tolerances
from tests.model.test_golden import PROMPTS, cosine


@pytest.fixture(scope="module")
def runner(source, native) -> JaxRunner:
    return JaxRunner(source, max_context=1024, kernels=NATIVE)


def test_it_says_what_it_computes_with(runner, native):
    facts = runner.describe()
    assert (facts["kernels"], facts["compute_dtype"]) == (NATIVE, NATIVE_DTYPE)
    assert str(facts["kernels_reason"]).startswith(native.form)
    assert facts["implementations"] == {"F32": NATIVE, "Q4_K": NATIVE, "Q6_K": NATIVE}
    assert facts["refused"] == []


@pytest.mark.smoke
@pytest.mark.parametrize("prompt", PROMPTS)
def test_recorded_logits_and_greedy_tokens(runner, golden, prompt):
    logits = runner.forward(golden[f"ids{prompt}"]).logits
    assert cosine(logits, golden[f"float32_logits{prompt}"]).min() >= tolerances.NATIVE_COSINE
    tokens = list(runner.stream(golden[f"ids{prompt}"], max_tokens=32, sampling=Sampling()))
    assert tokens == golden[f"float32_greedy{prompt}"].tolist()


def test_every_stage_is_within_the_rounding_of_15_bits(runner, source):
    assert gate.inspect(runner, source).departures == ()


def test_one_call_for_all_layers_is_what_its_operations_are(runner, golden):
    """Captured stages run one operation after the other, attention and router in XLA."""
    ids = golden["ids0"]
    in_one = runner.forward(ids)
    apart = runner.forward(ids, capture=frozenset({"l_out"}), expert_ids=in_one.expert_ids)
    assert cosine(in_one.logits, apart.logits).min() >= tolerances.NATIVE_COSINE


def test_long_contexts_are_attended_to_in_sections(source, native, golden):
    """Over 1,024 keys: sections of one row by several threads, or one after the other beside other rows."""
    ids = np.resize(np.concatenate([golden[f"ids{n}"] for n in PROMPTS]), 1030)
    runner = JaxRunner(source, max_context=1664, kernels=NATIVE)
    in_rows = runner.forward(ids, chunk_sizes=(512, 1))  # its last 6 tokens are rows of their own
    np.testing.assert_array_equal(in_rows.logits, runner.forward(ids).logits)


@pytest.mark.parametrize("forced", [False, True])
def test_padding_is_not_computed(runner, source, golden, forced):
    """Rows beside padding are what they are without it, and padding writes nothing to the cache."""
    network = runner.decoder.model.bind(runner.params)
    ids, slots = jnp.asarray([golden["ids0"][:15]]), jnp.array([1, 0])
    chosen = np.random.default_rng(3).integers(0, 16, (6, 1, 15, 4)).astype(np.int32) if forced else None
    mark = KVCache.create(source.config, 2, 64)
    cache = lambda: replace(mark, k=mark.k + 7.0, v=mark.v - 7.0)  # a call gives the cache up
    places = lambda ends: [
        Span(jnp.array([4]), 1, ends=ends[:1]),
        Span(jnp.array([0, 2]), 7, slots, ends[1:]),
    ]
    ends = jnp.array([4, 5, 9])  # none of the first, five of the second, all of the third
    padded, whole = (network(ids, cache(), places(e), chosen) for e in (ends, jnp.array([5, 7, 9])))
    real = np.array([False, *[True] * 5, *[False] * 2, *[True] * 7])
    np.testing.assert_array_equal(padded.hidden[0, real], whole.hidden[0, real])
    np.testing.assert_array_equal(padded.expert_ids[:, 0, real], whole.expert_ids[:, 0, real])
    assert not np.asarray(padded.hidden)[0, ~real].any()
    assert not np.asarray(padded.expert_ids)[:, 0, ~real].any()
    assert not np.asarray(network(ids, cache(), places(jnp.array([4, 0, 2])), chosen).hidden).any()
    for name, empty in (("k", 7.0), ("v", -7.0)):
        found, expected = (np.asarray(getattr(one.cache, name)) for one in (padded, whole))
        np.testing.assert_array_equal(found[:, 1, :5], expected[:, 1, :5])
        np.testing.assert_array_equal(found[:, 0, 2:9], expected[:, 0, 2:9])
        assert (found[:, 1, 5:] == empty).all()
        assert (found[:, 0, :2] == empty).all()
        assert (found[:, 0, 9:] == empty).all()


def test_a_forced_choice_of_experts_is_kept(runner, golden):
    ids = golden["ids0"][:20]
    free = runner.forward(ids)
    other = np.roll(free.expert_ids, 1, axis=1)
    forced = runner.forward(ids, expert_ids=other)
    np.testing.assert_array_equal(forced.expert_ids, other)
    assert not np.array_equal(forced.logits, free.logits)


def test_sequences_in_a_batch_write_what_each_writes_alone(runner, golden):
    prompts = [golden[f"ids{n}"][: 9 + 20 * n].tolist() for n in PROMPTS]
    together = runner.generate_batch(prompts, max_tokens=12, sampling=Sampling(), slots=3)
    for prompt, found in zip(prompts, together, strict=True):
        assert found.tokens == list(runner.stream(prompt, max_tokens=12, sampling=Sampling()))


def test_another_cache_leaves_the_products_native(source, native, golden):
    runner = JaxRunner(source, max_context=256, cache_dtype="int8", kernels=NATIVE)
    logits = runner.forward(golden["ids1"]).logits
    assert cosine(logits, golden["float32_logits1"]).min() >= tolerances.GOLDEN_BFLOAT16_COSINE
    assert runner.describe()["implementations"]["Q4_K"] == NATIVE


def test_a_named_dtype_means_xla(source):
    device = jax.devices()[0]
    assert "a dtype is asked for" in str(Native.begin(device, AUTO, has_dtype=True).reason())
    with pytest.raises(BackendUnavailableError, match="a dtype is asked for"):
        JaxRunner(source, max_context=64, compute_dtype="float32", kernels=NATIVE)


def test_it_can_be_turned_off(monkeypatch):
    monkeypatch.setenv("QWEN3_MOE_NATIVE", "off")
    assert Native.begin(jax.devices()[0], AUTO, has_dtype=False).reason() == "QWEN3_MOE_NATIVE is off"


@pytest.mark.parametrize("mix", ["Q2_K", "IQ4_XS", "MXFP4_MOE", "IQ4_NL"])
def test_models_of_other_types_run_natively(tmp_path: Path, native, mix: str):
    write_random_gguf(tmp_path / "model.gguf", SMALL, mix=mix, seed=3)
    tokens = np.random.default_rng(0).integers(0, 256, 12)
    with open_model(tmp_path / "model.gguf") as source:
        truth = ReferenceRunner(source).forward(tokens)
        runner = JaxRunner(source, max_context=32, kernels=NATIVE)
        found = runner.forward(tokens, expert_ids=truth.expert_ids)
    facts = runner.describe()
    assert (set(facts["implementations"].values()), facts["refused"]) == ({NATIVE}, [])
    assert cosine(found.logits, truth.logits).min() >= tolerances.NATIVE_COSINE
