"""Generation of one sequence: a jitted loop, chunked prefill, stops, and what must not change the text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.convert.packed import PackedTensor
from qwen3_moe_jax.core.errors import ContextOverflowError, NumericalError
from qwen3_moe_jax.core.sampling import Sampling
from qwen3_moe_jax.jax_backend import generate, requests
from qwen3_moe_jax.jax_backend.batching import Batch
from qwen3_moe_jax.jax_backend.generate import PREFILL_CHUNKS, chunk_lengths
from qwen3_moe_jax.jax_backend.runner import JaxRunner
from qwen3_moe_jax.machine.threads import Workers
from qwen3_moe_jax.reference import ReferenceRunner
from tests import tolerances

GREEDY = Sampling(temperature=0)


@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 128, 129, 511, 512, 513, 1500])
def test_chunks_cover_the_prompt_with_few_shapes(num_tokens):
    lengths = chunk_lengths(num_tokens)
    assert set(lengths) <= set(PREFILL_CHUNKS)
    assert sum(lengths) >= num_tokens
    assert sum(lengths[:-1]) < num_tokens


def test_chunked_prefill_gives_the_logits_of_one_piece(exact_runner, golden):
    ids = np.concatenate([golden[f"ids{i}"] for i in range(3)])
    in_one = exact_runner.forward(ids).logits  # 107 tokens: one chunk of 128
    in_many = exact_runner.forward(ids, chunk_sizes=(16,)).logits
    np.testing.assert_allclose(in_many, in_one, atol=tolerances.CHUNKED_LOGITS, rtol=0)


def test_stop_ids_end_a_sequence_and_are_not_yielded(jax_runner, golden):
    greedy = golden["float32_greedy0"].tolist()
    stop = next(t for t in greedy if greedy.index(t) > 4)
    tokens = list(jax_runner.stream(golden["ids0"], max_tokens=32, sampling=GREEDY, stop_ids={stop}))
    assert tokens == greedy[: greedy.index(stop)]


@pytest.mark.parametrize("max_tokens", [1, 2, 7])
def test_max_tokens_is_exact(jax_runner, golden, max_tokens):
    tokens = list(jax_runner.stream(golden["ids0"], max_tokens=max_tokens, sampling=GREEDY))
    assert tokens == golden["float32_greedy0"][:max_tokens].tolist()


def test_the_context_fills_to_its_last_token_and_no_further(source, golden):
    prompt = golden["ids0"]
    runner = JaxRunner(source, max_context=len(prompt) + 5)
    tokens = list(runner.stream(prompt, max_tokens=100, sampling=GREEDY))
    assert tokens == golden["float32_greedy0"][:5].tolist()
    with pytest.raises(ContextOverflowError, match=f"{len(prompt) + 5} tokens.*holds {len(prompt) + 5}"):
        list(runner.stream([*prompt, *tokens], max_tokens=1, sampling=GREEDY))
    with pytest.raises(ContextOverflowError):
        runner.forward([1] * (len(prompt) + 6))


def test_the_same_seed_gives_the_same_text(jax_runner, golden):
    sampling = Sampling(temperature=1.0, top_k=40, top_p=0.95, seed=7)
    first = list(jax_runner.stream(golden["ids0"], max_tokens=24, sampling=sampling))
    again = list(jax_runner.stream(golden["ids0"], max_tokens=24, sampling=sampling))
    other = list(jax_runner.stream(golden["ids0"], max_tokens=24, sampling=Sampling(temperature=1.0, seed=8)))
    assert first == again
    assert first != other


def test_nonfinite_logits_are_a_named_error_that_points_to_trace(source, golden):
    runner = JaxRunner(source)
    runner.params["norm"] = runner.params["norm"].at[0].set(jnp.inf)
    with pytest.raises(NumericalError, match="jax backend.*not finite at position.*qwen3-moe trace"):
        list(runner.stream(golden["ids0"], max_tokens=4, sampling=GREEDY))


def test_the_reference_says_so_too(source, golden):
    runner = ReferenceRunner(source)
    runner.weights["norm"] = PackedTensor(
        {"w": np.full(source.config.hidden_size, np.nan, "f4")}, GGMLType.F32
    )
    with pytest.raises(NumericalError, match="reference backend.*not finite at position.*qwen3-moe trace"):
        list(runner.stream(golden["ids0"], max_tokens=4, sampling=GREEDY))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.filterwarnings("error")
def test_numpy_does_not_warn_of_what_overflows_in_any_thread(source, golden, threads):
    runner = ReferenceRunner(source, workers=Workers(threads))
    huge = np.full(source.config.hidden_size, np.finfo(np.float32).max)
    runner.weights["norm"] = PackedTensor({"w": huge}, GGMLType.F32)
    with pytest.raises(NumericalError):
        list(runner.stream(golden["ids0"][:4], max_tokens=1, sampling=GREEDY))


def test_decode_is_compiled_once_whatever_the_prompt_and_the_sampling(source, golden):
    runner = JaxRunner(source, max_context=200)
    sampled = Sampling(temperature=1.0, top_p=0.9, repetition_penalty=1.1)
    prompts = ((golden["ids0"], GREEDY), (golden["ids1"][:7], sampled), (golden["ids2"], Sampling(top_k=4)))
    for prompt, sampling in prompts:
        before = generate.decode.count()
        assert len(list(runner.stream(prompt, max_tokens=5, sampling=sampling))) == 5
    assert generate.decode.count() == before
    jax.block_until_ready(runner.params)


def test_two_streams_at_once_and_one_given_up_do_not_disturb_each_other(jax_runner, golden):
    first = jax_runner.stream(golden["ids0"], max_tokens=32, sampling=GREEDY)
    second = jax_runner.stream(golden["ids1"], max_tokens=32, sampling=GREEDY)
    given_up = jax_runner.stream(golden["ids2"], max_tokens=32, sampling=GREEDY)
    next(given_up)
    pairs = list(zip(first, second, strict=True))
    given_up.close()
    assert [a for a, _ in pairs] == golden["float32_greedy0"].tolist()
    assert [b for _, b in pairs] == golden["float32_greedy1"].tolist()
    assert list(jax_runner.stream(golden["ids2"], max_tokens=32, sampling=GREEDY)) == (
        golden["float32_greedy2"].tolist()
    )


def test_after_a_step_that_ran_out_of_memory_the_next_request_works(source, golden, monkeypatch):
    runner = JaxRunner(source)
    real = generate.decode

    def fail_after_donation(model, params, state, *rest, **options):
        jax.block_until_ready(real(model, params, state, *rest, **options))  # the state's buffers are gone
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")

    monkeypatch.setattr(generate, "decode", fail_after_donation)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        list(runner.stream(golden["ids0"], max_tokens=8, sampling=GREEDY))
    monkeypatch.setattr(generate, "decode", real)
    tokens = list(runner.stream(golden["ids0"], max_tokens=32, sampling=GREEDY))
    assert tokens == golden["float32_greedy0"].tolist()


def test_a_model_that_does_not_fit_says_the_plan_and_what_would(source, monkeypatch):
    from qwen3_moe_jax.core.errors import MemoryPlanError
    from qwen3_moe_jax.machine import headroom

    monkeypatch.setattr(headroom, "main_memory", lambda **_: headroom.Headroom(450 << 20))
    with pytest.raises(
        MemoryPlanError, match=r"weights 0\.01 GB .* main memory, 0\.47 GB free: max_context=\d+ would fit"
    ):
        JaxRunner(source, max_context=4096 * 4)
    monkeypatch.setattr(headroom, "main_memory", lambda **_: headroom.Headroom(1 << 20))
    with pytest.raises(MemoryPlanError, match="use a machine with more memory"):
        JaxRunner(source)


def test_a_stream_asks_for_more_tokens_at_once_however_long_its_prompt_took(source, monkeypatch):
    asked, step = [], Batch.step

    def slow_then_fast(batch, tokens, **options):
        asked.append(tokens)
        monkeypatch.setattr(requests, "SECONDS_PER_DISPATCH", 0.0 if len(asked) == 1 else 1e9)
        return step(batch, tokens, **options)

    monkeypatch.setattr(Batch, "step", slow_then_fast)
    runner = JaxRunner(source, max_context=96)
    assert len(list(runner.stream([1, 2, 3], max_tokens=70, sampling=Sampling(temperature=0)))) == 70
    assert asked == [1, 1, 4, 16, 32, 32]
