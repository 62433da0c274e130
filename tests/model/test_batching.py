"""Many sequences in one batch: whatever runs beside a sequence, its text is the one it has alone."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_moe_jax.api import Model
from qwen3_moe_jax.core.errors import BatchFullError, ContextOverflowError, MemoryPlanError
from qwen3_moe_jax.core.sampling import Sampling
from qwen3_moe_jax.jax_backend import generate, slots, step_sizes
from qwen3_moe_jax.jax_backend.generate import COMPILER_OPTIONS
from qwen3_moe_jax.jax_backend.kv_cache import KVCache, Span
from qwen3_moe_jax.jax_backend.preparation import Preparation
from qwen3_moe_jax.jax_backend.requests import Request, run_all
from qwen3_moe_jax.jax_backend.runner import JaxRunner
from tests import tolerances

NEW = 32
SLOTS, CONTEXT = 4, 256
"""Of every batch here, and what ``generate_batch`` takes for four short prompts: few programs to compile."""


@pytest.fixture(autouse=True)
def one_length_of_chunks(monkeypatch):
    """Prompts take several steps, and fewer programs are compiled."""
    monkeypatch.setattr("qwen3_moe_jax.jax_backend.reading.PREFILL_CHUNKS", (16,))


@pytest.fixture
def batch(jax_runner):
    return jax_runner.open_batch(SLOTS, context=CONTEXT)


@pytest.fixture
def greedy(golden):
    return [golden[f"float32_greedy{i}"].tolist() for i in range(3)]


def admit(batch, golden, number, **options):
    options.setdefault("max_tokens", NEW)
    return batch.admit(golden[f"ids{number}"], **options)


def finish(batch, texts=None, tokens=8):
    """Steps until every sequence has ended: new tokens and the reason, by slot."""
    texts, reasons = texts or {}, {}
    while progress := batch.step(tokens) or batch.waiting:
        for p in progress if isinstance(progress, list) else ():
            texts.setdefault(p.slot, []).extend(p.tokens)
            reasons[p.slot] = p.finish_reason
    assert None not in reasons.values()
    return texts, reasons


# The same text


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 1, 0, 2)], ids=str)
def test_any_order_of_slots_gives_the_text_of_each_alone(batch, golden, greedy, order):
    for slot, number in enumerate(order):
        assert admit(batch, golden, number) == slot
    texts, reasons = finish(batch)
    assert texts == {slot: greedy[number] for slot, number in enumerate(order)}
    assert set(reasons.values()) == {"length"}


def test_a_sequence_that_comes_while_others_are_written(batch, golden, greedy, monkeypatch):
    """Its prompt takes several steps, in which the others go on: one forward pass does both."""
    rows = []
    real = generate.prefill

    def spy(*args, **options):
        rows.append((options["chunk"], options["rows"]))
        return real(*args, **options)

    monkeypatch.setattr(generate, "prefill", spy)
    texts = {admit(batch, golden, 2): [], admit(batch, golden, 0): []}

    def step(times=1):
        for _ in range(times):
            for p in batch.step():
                texts[p.slot].extend(p.tokens)

    while batch.waiting:
        step()
    step(3)
    before = {slot: len(text) for slot, text in texts.items()}
    rows.clear()
    texts[admit(batch, golden, 1)] = []
    while batch.waiting:
        step()
    assert len(rows) >= 2
    assert set(rows) == {(16, SLOTS)}
    assert {slot: len(texts[slot]) - n for slot, n in before.items()} == dict.fromkeys(before, len(rows))
    texts, _ = finish(batch, texts)
    assert [texts[slot] for slot in range(3)] == [greedy[2], greedy[0], greedy[1]]
    held = [np.array(x[:, 2, : len(golden["ids1"])]) for x in (batch._state.cache.k, batch._state.cache.v)]
    batch.free_all()
    admit(batch, golden, 1)
    finish(batch)
    for there, alone in zip(held, (batch._state.cache.k, batch._state.cache.v), strict=True):
        alone = alone[:, 0, : len(golden["ids1"])]
        np.testing.assert_allclose(there, alone, atol=tolerances.CHUNKED_LOGITS, rtol=0)


@pytest.mark.parametrize(
    ("budget", "chunk", "together"), [(2048, 128, 1), (128, 128, 1), (127, 16, 1), (31, 16, 1), (1, 16, 1)]
)
def test_a_step_reads_no_more_than_it_is_asked_to(batch, golden, monkeypatch, budget, chunk, together):
    monkeypatch.setattr("qwen3_moe_jax.jax_backend.reading.PREFILL_CHUNKS", generate.PREFILL_CHUNKS)
    asked = []

    def spy(model, params, state, slots, **options):
        asked.append((options["chunk"], len(slots)))
        nothing = generate.StepResult(jnp.zeros((SLOTS, 1)), state.length, state.finished, state.nonfinite)
        return state, nothing

    monkeypatch.setattr(generate, "prefill", spy)
    for number in (0, 1, 2):
        admit(batch, golden, number)
    batch.step(prompt_tokens=budget)
    assert asked == [(chunk, together)]


@pytest.mark.parametrize(("has_kernel", "counts"), [(True, [1, 2, 4, 8, 16]), (False, [1, 4, 16])])
def test_few_numbers_of_prompts_are_read_together(has_kernel, counts):
    assert step_sizes.prompt_counts(20, 128, 2048, has_kernel=has_kernel) == counts
    assert step_sizes.prompt_counts(20, 512, 2048, has_kernel=has_kernel) == [n for n in counts if n <= 4]
    assert step_sizes.prompt_counts(3, 16, 2048, has_kernel=has_kernel) == [n for n in counts if n <= 3]
    assert step_sizes.prompt_counts(1, 512, 16, has_kernel=has_kernel) == [1]


@pytest.mark.parametrize("is_made_beside", [True, False])
def test_no_step_waits_for_a_program_that_others_can_do_without(
    batch, golden, greedy, monkeypatch, is_made_beside
):
    """Prompts are read one by one until the program for four is there; together where nobody makes it."""
    monkeypatch.setattr(Preparation, "makes_the_rest", is_made_beside)
    asked, ready = [], set()
    real = generate.prefill

    class Spy:
        def __call__(self, *args, **options):
            asked.append(len(args[3]))
            return real(*args, **options)

        def is_ready(self, *args, **options):
            return len(args[3]) in ready

    monkeypatch.setattr(generate, "prefill", Spy())
    batch.use_ready_programs()
    order = (0, 1, 2, 0)
    for number in order:
        admit(batch, golden, number)
    texts: dict[int, list[int]] = {}
    for count in (1, 4):
        ready.add(count)
        for p in batch.step(prompt_tokens=2048):
            texts.setdefault(p.slot, []).extend(p.tokens)
    assert asked == ([1, 4] if is_made_beside else [4, 4])
    texts, _ = finish(batch, texts)
    assert texts == {slot: greedy[number] for slot, number in enumerate(order)}


def test_a_seed_gives_the_same_text_alone_and_beside_other_settings(jax_runner, batch, golden):
    settings = [
        Sampling(temperature=1.0, top_k=40, top_p=0.95, seed=7, repetition_penalty=1.2),
        Sampling(),
        Sampling(temperature=0.8, top_p=0.9, seed=8, presence_penalty=0.5),
    ]
    alone = [
        list(jax_runner.stream(golden[f"ids{i}"], max_tokens=24, sampling=s)) for i, s in enumerate(settings)
    ]
    for i in (1, 2, 0):
        admit(batch, golden, i, sampling=settings[i], max_tokens=24)
    texts, _ = finish(batch)
    assert [texts[2], texts[0], texts[1]] == alone


def test_a_cancelled_slot_is_taken_again_at_once(jax_runner, batch, golden, greedy):
    """With nothing left of what the one before had written: a penalty would show it."""
    penalty = Sampling(presence_penalty=2.0, repetition_penalty=1.3)
    for number in (0, 2, 1):
        admit(batch, golden, number)
    while batch.waiting:
        batch.step()
    batch.step(8)
    batch.free(1)
    assert admit(batch, golden, 1) == 1
    batch.step()
    assert batch.waiting, "a prompt that has not been read to its end"
    batch.free(1)
    assert admit(batch, golden, 2, sampling=penalty) == 1
    batch.free(0)
    assert admit(batch, golden, 0, max_tokens=5) == 0
    texts, _ = finish(batch)
    assert texts[1] == list(jax_runner.stream(golden["ids2"], max_tokens=NEW, sampling=penalty))
    assert texts[1] != greedy[2]
    assert texts[0] == greedy[0][:5]


def test_more_requests_than_slots_run_as_slots_get_free(batch, golden, greedy):
    numbers = [0, 1, 2, 2, 1, 0, 1]
    stop = greedy[1][9]
    requests = [Request(golden[f"ids{n}"], max_tokens=4 + i, stop_ids={stop}) for i, n in enumerate(numbers)]
    results = run_all(batch, requests)
    for i, (number, result) in enumerate(zip(numbers, results, strict=True)):
        expected = greedy[number][: 4 + i]
        reason = "stop" if stop in expected else "length"
        expected = expected[: expected.index(stop)] if stop in expected else expected
        assert (result.tokens, result.finish_reason) == (expected, reason), i
    assert batch.free_slots == SLOTS


def test_prompts_that_end_beside_the_end_of_a_chunk(batch, reference_runner, golden):
    """Of n tokens n - 1 are read before the last one is decoded, or all in one chunk."""
    lengths = (1, 2, 15, 16, 17, 18, 31, 32, 33)
    prompts = [golden["ids1"][:n] for n in lengths]
    results = run_all(batch, [Request(prompt, max_tokens=6) for prompt in prompts])
    for prompt, result in zip(prompts, results, strict=True):
        alone = list(reference_runner.stream(prompt, max_tokens=6, sampling=Sampling()))
        assert result.tokens == alone, f"{len(prompt)} tokens"


def test_a_request_is_over_when_its_owner_says_so(batch, golden, greedy):
    heard = {0: [], 1: []}

    def is_over(number, tokens):
        heard[number] += tokens
        return number == 0 and len(heard[0]) >= 3

    requests = [Request(golden[f"ids{n}"], max_tokens=20) for n in (0, 1)]
    first, second = run_all(batch, requests, is_over)
    assert (second.tokens, second.finish_reason) == (greedy[1][:20], "length")
    assert first.finish_reason == "stop"
    assert first.tokens == heard[0] == greedy[0][: len(first.tokens)]
    assert 3 <= len(first.tokens) < 20


def test_the_context_ends_a_sequence_at_its_last_token(jax_runner, batch, golden):
    prompt = np.resize(np.concatenate([golden[f"ids{i}"] for i in range(3)]), CONTEXT - 5)
    batch.admit(prompt)
    batch.admit(prompt[:1], max_tokens=3)
    texts, reasons = finish(batch)
    assert texts[0] == list(jax_runner.stream(prompt, max_tokens=5, sampling=Sampling()))
    assert len(texts[1]) == 3
    assert reasons == {0: "length", 1: "length"}


# The same numbers


def spans_forward(runner, token_ids, cache, spans):
    """Logits of every row of some spans, and the cache."""

    def run(model, params, ids, cache, spans):
        network = model.bind(params)
        output = network(ids, cache, spans)
        return network.logits(output.hidden)[0], output.cache

    jitted = jax.jit(run, static_argnums=0, compiler_options=COMPILER_OPTIONS)
    return jitted(runner.model, runner.params, jnp.asarray(token_ids, jnp.int32)[None], cache, spans)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_logits_of_mixed_spans_are_those_of_each_sequence_alone(source, golden, dtype):
    """A chunk of two prompts and one token of two other sequences, in rows of the cache out of order."""
    runner = JaxRunner(source, max_context=64, cache_dtype=dtype, compute_dtype="float32")
    prompts = [golden["ids0"][:20], golden["ids1"][:20], golden["ids2"][:20], golden["ids0"][5:25]]
    cache = KVCache.create(runner.config, 5, 64, runner.cache_dtype)
    places = jnp.asarray([3, 0, 4, 1], jnp.int32)
    first = Span(jnp.zeros(4, jnp.int32), 12, places)
    _, cache = spans_forward(runner, np.concatenate([p[:12] for p in prompts]), cache, [first])
    at = jnp.full(2, 12, jnp.int32)
    ids = np.concatenate([prompts[0][12:], prompts[1][12:], prompts[2][12:13], prompts[3][12:13]])
    logits, _ = spans_forward(runner, ids, cache, [Span(at, 8, places[:2]), Span(at, 1, places[2:])])
    for number, rows in enumerate((slice(0, 8), slice(8, 16), slice(16, 17), slice(17, 18))):
        alone = runner.forward(prompts[number]).logits[12 : 12 + rows.stop - rows.start]
        bound = tolerances.CHUNKED_LOGITS if dtype == "float32" else tolerances.INT8_STEP_LOGITS
        np.testing.assert_allclose(logits[rows], alone, atol=bound, rtol=0, err_msg=f"{number=}")


def cache_bits(batch, slot):
    return [np.asarray(x[:, slot]) for x in jax.tree.leaves(batch._state.cache)]


@pytest.mark.parametrize("chunk", [False, True], ids=["decode", "mixed"])
def test_nan_in_one_slot_leaves_the_bits_of_the_others(jax_runner, golden, chunk):
    """And its slot serves the next sequence as if nothing had been."""
    results = []
    for is_poisoned in (False, True):
        batch = jax_runner.open_batch(SLOTS, context=CONTEXT)
        for number in (0, 1, 2):
            admit(batch, golden, number)
        while batch.waiting:
            batch.step()
        if is_poisoned:
            cache = batch._state.cache
            spoilt = replace(cache, k=cache.k.at[:, 1, 0].set(jnp.nan))
            batch._state = replace(batch._state, cache=spoilt)
        if chunk:
            admit(batch, golden, 0)
        progress = [p for _ in range(4) for p in batch.step()]
        results.append(([p for p in progress if p.slot != 1], [cache_bits(batch, s) for s in (0, 2, 3)]))
    assert results[0][0] == results[1][0]
    jax.tree.map(np.testing.assert_array_equal, results[0][1], results[1][1])
    assert [p.finish_reason for p in progress if p.slot == 1] == ["nonfinite"]
    batch.free(1)
    assert batch.admit(golden["ids0"], max_tokens=4) == 1
    texts, reasons = finish(batch)
    assert reasons[1] == "length"
    assert texts[1] == golden["float32_greedy0"][:4].tolist()


def test_settings_and_slots_are_no_new_programs(batch, golden):
    programs = (slots.admit, slots.release, generate.decode, generate.prefill)

    def serve(sampling, stop_ids, number, max_tokens):
        for _ in range(2):
            admit(batch, golden, number, sampling=sampling, stop_ids=stop_ids, max_tokens=max_tokens)
        finish(batch)
        batch.free_all()

    serve(Sampling(), {1}, 0, 5)
    before = [program.count() for program in programs]
    serve(Sampling(temperature=0.5, top_p=0.5), {1, 2, 3}, 0, 9)
    serve(Sampling(temperature=0.5, top_k=3, repetition_penalty=1.3), (), 0, 3)
    assert [program.count() for program in programs] == before


# What it says when it cannot


def test_errors_name_what_is_wrong(batch, golden):
    with pytest.raises(ContextOverflowError, match=f"{CONTEXT} tokens.*holds {CONTEXT}"):
        batch.admit([1] * CONTEXT)
    with pytest.raises(ValueError, match="prompt is empty"):
        batch.admit([])
    with pytest.raises(ValueError, match="max_tokens is 0"):
        batch.admit([1], max_tokens=0)
    with pytest.raises(ValueError, match="token id -3 is not in 0"):
        batch.admit([1, -3])
    with pytest.raises(ValueError, match="token id 999999 is not in 0"):
        batch.admit([1], stop_ids=[999999])
    with pytest.raises(ValueError, match="1 to 32 tokens, not 33"):
        batch.step(33)
    with pytest.raises(KeyError):
        batch.free(0)
    assert batch.free_slots == SLOTS
    for _ in range(SLOTS):
        batch.admit([1, 2, 3])
    with pytest.raises(BatchFullError, match="all 4 slots.*free one first"):
        batch.admit([1])
    assert batch.is_whole


def test_slots_that_do_not_fit_say_what_they_cost_and_what_would(jax_runner, monkeypatch):
    from qwen3_moe_jax.machine import headroom

    monkeypatch.setattr(headroom, "main_memory", lambda **_: headroom.Headroom(500 << 20))
    with pytest.raises(
        MemoryPlanError,
        match=r"64 slots x 4608 positions takes .* GB .*main memory, 0\.52 GB free: \d+ slots .*would fit",
    ):
        jax_runner.open_batch(64, context=4096)


# Texts


def test_answers_to_many_prompts_are_those_of_each(source, jax_runner):
    model = Model(source, jax_runner)
    prompts = [
        "def fib(n):",
        "import os\n",
        "class A:",
        [{"role": "user", "content": "hi"}],
    ]
    options = {
        "max_tokens": 20,
        "sampling": Sampling(temperature=0.7, top_k=20, seed=5),
        "stop": ["\n\n", "self"],
    }
    answers = model.generate_batch(prompts, **options)
    assert answers == [model.answer(prompt, **options) for prompt in prompts]
    assert {a.finish_reason for a in answers} == {"stop", "length"}
    assert model.generate_batch([]) == []


def test_other_backends_answer_one_after_the_other(source, reference_runner):
    model = Model(source, reference_runner)
    prompts, options = ["def f", "x ="], {"max_tokens": 3, "sampling": Sampling()}
    assert model.generate_batch(prompts, **options) == [model.answer(p, **options) for p in prompts]
