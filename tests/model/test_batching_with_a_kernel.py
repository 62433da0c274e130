"""Batches where a GPU's decode kernel runs: what is asked for ahead or apart from prompts changes no text."""

from dataclasses import replace
from functools import partial

import jax.numpy as jnp
import pytest

from qwen3_moe_jax.core.errors import BackendUnavailableError
from qwen3_moe_jax.core.sampling import Sampling
from qwen3_moe_jax.jax_backend import generate
from qwen3_moe_jax.jax_backend.decode_path import LayerByLayer, OneKernel
from tests.model.test_batching import CONTEXT, SLOTS, admit, finish


@pytest.fixture(autouse=True)
def one_length_of_chunks(monkeypatch):
    """Prompts take several steps, and fewer programs are compiled."""
    monkeypatch.setattr("qwen3_moe_jax.jax_backend.reading.PREFILL_CHUNKS", (16,))


@pytest.fixture
def greedy(golden):
    return [golden[f"float32_greedy{i}"].tolist() for i in range(3)]


@pytest.fixture
def fused_steps(jax_runner, monkeypatch):
    """The runner with a decode kernel, and the (sequences, rows of the cache) of each that is compiled.

    The kernel itself needs a GPU: here the network itself stands in for it.
    """
    batches = []

    class Kernel(OneKernel):
        def reason_against(self, model, params, batch, cache, is_forced=False):
            return None

        def step(self, model, params, token_ids, start, cache, expert_ids=None, active=None):
            batches.append((len(token_ids), cache.k.shape[1]))
            step = LayerByLayer().step(model, params, token_ids, start, cache)
            logits = jnp.where(active.any(), step.logits, jnp.nan)  # the kernel promises nothing then
            return replace(step, logits=logits)

    monkeypatch.setattr(generate, "LAUNCHES", (32,))
    paths = (Kernel(), LayerByLayer())
    monkeypatch.setattr(jax_runner, "decoder", replace(jax_runner.decoder, paths=paths))
    return batches


def test_decoding_takes_the_fused_step_with_few_rows_of_the_cache(
    jax_runner, golden, greedy, fused_steps, monkeypatch
):
    batch = jax_runner.open_batch(SLOTS, context=CONTEXT)
    admit(batch, golden, 1, max_tokens=9)
    texts, _ = finish(batch)
    assert texts[0] == greedy[1][:9]
    admit(batch, golden, 0, max_tokens=9)
    texts, _ = finish(batch)
    assert texts[1] == greedy[0][:9]
    assert fused_steps == [(1, SLOTS), (2, SLOTS)]
    check_ahead(batch, golden, greedy)
    check_company(batch, golden, greedy, monkeypatch)
    batch.free_all()
    monkeypatch.setattr(jax_runner, "_take_spare", lambda: (batch, []))
    dispatches = "qwen3_moe_jax.jax_backend.requests.SECONDS_PER_DISPATCH"
    monkeypatch.setattr(dispatches, 0.0)  # which never grow
    stream = partial(jax_runner.stream, golden["ids1"], sampling=Sampling())
    assert list(stream(max_tokens=12)) == greedy[1][:12]
    stop = greedy[1][7]
    assert list(stream(max_tokens=12, stop_ids={stop})) == greedy[1][: greedy[1].index(stop)]


def takes_one_sequence(runner, monkeypatch):
    """The kernel says so, when it is asked and in what is known of it."""
    few = lambda self, model, params, batch, cache, is_forced=False: None if batch == 1 else "too many"
    monkeypatch.setattr(type(runner.decoder.paths[0]), "reason_against", few)
    monkeypatch.setattr(type(runner.decoder.paths[0]), "batches", range(1, 2))


def test_one_token_of_more_sequences_than_the_kernel_takes(jax_runner, golden, fused_steps, monkeypatch):
    """It is written without a loop, several are in one: the same tokens, chosen or drawn."""
    takes_one_sequence(jax_runner, monkeypatch)
    batch = jax_runner.open_batch(2, context=64)
    found = []
    for sampling in (Sampling(), Sampling(temperature=0.8, top_k=20, seed=5)):
        for tokens in (1, 5):
            for number in (0, 1):
                batch.admit(golden[f"ids{number}"][:12], max_tokens=9, sampling=sampling)
            found.append(finish(batch, tokens=tokens)[0])
            batch.free_all()
    assert fused_steps == []
    assert found[0] == found[1]
    assert found[2] == found[3]
    assert found[0] != found[2]


@pytest.mark.usefixtures("fused_steps")
def test_an_invariant_batch_reads_prompts_one_at_a_time(jax_runner, golden, greedy, monkeypatch):
    asked, real = [], generate.prefill
    monkeypatch.setattr(
        generate, "prefill", lambda *a, **o: asked.append((len(a[3]), o["chunk"])) or real(*a, **o)
    )
    batch = jax_runner.open_batch(SLOTS, context=CONTEXT, is_invariant=True)
    for number in (0, 1):
        admit(batch, golden, number, max_tokens=3)
    texts, _ = finish(batch)
    assert texts == {0: greedy[0][:3], 1: greedy[1][:3]}
    chunks = [-(-len(golden[f"ids{number}"]) // 16) for number in (0, 1)]
    assert asked == [(1, 16)] * sum(chunks)


def test_where_bits_depend_on_company_no_batch_promises_them(jax_runner, fused_steps, monkeypatch):
    takes_one_sequence(jax_runner, monkeypatch)
    with pytest.raises(BackendUnavailableError, match="takes fewer than 2 sequences"):
        jax_runner.open_batch(2, context=64, is_invariant=True)
    monkeypatch.setattr(jax_runner, "decoder", replace(jax_runner.decoder, paths=(LayerByLayer(),)))
    with pytest.raises(BackendUnavailableError, match="NVIDIA GPU's decode kernel"):
        jax_runner.open_batch(2, context=64, is_invariant=True)
    assert fused_steps == []


def check_ahead(batch, golden, greedy):
    """Steps that are begun ahead: the same texts, whoever ends, goes and comes meanwhile."""
    batch.free_all()
    stop = greedy[0][10]
    first = batch.admit(golden["ids0"], stop_ids={stop}, max_tokens=32)
    second = admit(batch, golden, 1, max_tokens=30)
    texts, reasons = {first: [], second: []}, {}

    def step():
        for p in batch.step(3, ahead=3):
            assert len(p.tokens) <= 3
            texts[p.slot] += p.tokens
            reasons[p.slot] = p.finish_reason

    while len(texts[second]) < 15:
        step()
    assert batch._asked
    assert texts[first] == greedy[0][: greedy[0].index(stop)]
    assert reasons[first] == "stop"
    batch.free(first)
    assert batch.admit(golden["ids0"][:5], max_tokens=4) == first
    texts[first].clear()
    while batch.waiting or reasons[second] is None or reasons[first] != "length":
        step()
    assert texts[second] == greedy[1][:30]
    assert len(texts[first]) == 4
    assert batch.step(3, ahead=3) == []


def check_company(batch, golden, greedy, monkeypatch):
    """Prompts come while others are written: the kernel alone writes, and its last token is waited for while
    the next chunk is read."""
    asked, real = [], generate.prefill
    monkeypatch.setattr(generate, "prefill", lambda *a, **o: asked.append(o["rows"]) or real(*a, **o))
    batch.free_all()
    texts = {admit(batch, golden, number): [] for number in (2, 0)}
    while any(len(text) < 3 for text in texts.values()):
        found = batch.step(1, ahead=1)
        assert len({p.slot for p in found}) == len(found)
        for p in found:
            texts[p.slot] += p.tokens
    texts[admit(batch, golden, 1)] = []
    before = {slot: len(text) for slot, text in texts.items()}
    steps = 0
    while batch.waiting:
        for p in batch.step(1, ahead=1):
            texts[p.slot] += p.tokens
        steps += 1
        assert batch.read_tokens == 16
        assert [asked.is_decode for asked in batch._asked] == [True]
    assert steps >= 2
    assert {slot: len(texts[slot]) - n for slot, n in before.items()} == {0: steps, 1: steps, 2: 1}
    texts, _ = finish(batch, texts)
    assert [texts[slot] for slot in range(3)] == [greedy[2], greedy[0], greedy[1]]
    assert set(asked) == {0}
