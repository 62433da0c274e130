"""The whole model on a graphics adapter: golden prompts, stages, replay, chunks, windows, mixed types."""

from dataclasses import replace

import numpy as np
import pytest

from qwen3_moe_jax.convert.config import PRESETS, RopeScaling
from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.core.sampling import Sampling
from qwen3_moe_jax.core.stages import STAGES
from qwen3_moe_jax.reference import ReferenceRunner
from qwen3_moe_jax.testing.random_models import write_random_gguf
from tests.tolerances import (
    SCORED_LOG_LIKELIHOOD,
    WGPU_COSINE,
    WGPU_DOTS_STAGE_NMSE,
    WGPU_FLOAT16_CACHE_COSINE,
    WGPU_LOGITS_NMSE,
    WGPU_STAGE_NMSE,
)
from tests.wgpu import gpu_work
from tests.wgpu.cases import nmse, rng_of

EMBEDDED = str(gpu_work.EMBEDDED)
GREEDY = Sampling()
DEVICES = pytest.mark.parametrize("on", list(gpu_work.DEVICES))


def cosines(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    a, b = found.astype(np.float64), truth.astype(np.float64)
    return (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))


@pytest.fixture(scope="module")
def long_prompt() -> np.ndarray:
    return rng_of("long prompt").integers(0, 4000, 270)


@pytest.fixture(scope="module")
def long_truth(reference_runner, long_prompt):
    return reference_runner.forward(long_prompt)


@DEVICES
@pytest.mark.parametrize("prompt", range(3))
def test_golden_prompts(gpu, golden, prompt, on):
    ids, truth = golden[f"ids{prompt}"], golden[f"float32_logits{prompt}"]
    found = gpu(gpu_work.forward, EMBEDDED, ids, on=on)
    assert cosines(found.logits, truth).min() >= WGPU_COSINE
    assert nmse(found.logits, truth) <= WGPU_LOGITS_NMSE
    assert (
        gpu(gpu_work.stream, EMBEDDED, ids, 32, GREEDY, on=on) == golden[f"float32_greedy{prompt}"].tolist()
    )


@pytest.mark.parametrize("first", [1, 200])
def test_log_likelihoods_of_a_text_are_the_references(gpu, reference_runner, long_prompt, first):
    found = gpu(gpu_work.log_likelihoods, EMBEDDED, long_prompt, first)
    truth = reference_runner.log_likelihoods(long_prompt, first=first)
    np.testing.assert_allclose(found, truth, atol=SCORED_LOG_LIKELIHOOD)


def test_every_stage(gpu, golden, reference_runner):
    found = gpu(gpu_work.forward, EMBEDDED, golden["ids0"], capture=list(STAGES))
    truth = reference_runner.forward(golden["ids0"], capture=list(STAGES))
    assert found.stages.keys() == truth.stages.keys()
    np.testing.assert_array_equal(found.expert_ids, truth.expert_ids)
    for key, value in truth.stages.items():
        assert found.stages[key].shape == value.shape, key
        assert nmse(found.stages[key], value) <= WGPU_STAGE_NMSE, key


@pytest.mark.parametrize("on", ["hardware", "subgroups", "plain"])
def test_every_stage_on_hardware(gpu, long_prompt, reference_runner, on):
    """A chunk of 96 tokens and one of 4; the first of them again, one at a time."""
    for tokens, chunk in ((long_prompt[:100], 96), (long_prompt[:70], 1)):
        found = gpu(gpu_work.forward, EMBEDDED, tokens, capture=list(STAGES), chunk_sizes=(chunk,), on=on)
        truth = reference_runner.forward(tokens, capture=list(STAGES))
        np.testing.assert_array_equal(found.expert_ids, truth.expert_ids)
        assert found.stages.keys() == truth.stages.keys()
        for key, value in truth.stages.items():
            assert found.stages[key].shape == value.shape, key
            assert nmse(found.stages[key], value) <= WGPU_STAGE_NMSE, (chunk, key)


@pytest.mark.parametrize(
    ("on", "token", "prompt"),
    [
        ("own", set(), set()),
        ("hardware", {"vector", "attend", "join"}, {"tile", "attend_tile"}),
        ("subgroups", {"vector", "attend", "join"}, {"tile", "attend_tile"}),
        ("dots", {"vector", "attend", "join"}, {"rounded", "tile_bytes", "attend_tile"}),
        ("plain", set(), set()),
        ("small bindings", set(), set()),
    ],
)
def test_which_kernels_run(gpu, on, token, prompt):
    found = gpu(gpu_work.kernels_of, EMBEDDED, on)
    own = {"vector", "attend", "join", "tile", "rounded", "tile_bytes", "attend_tile"}
    assert (found[0] & own, found[1] & own) == (token, prompt)


def test_capture_changes_nothing(gpu, golden):
    plain = gpu(gpu_work.forward, EMBEDDED, golden["ids1"])
    captured = gpu(gpu_work.forward, EMBEDDED, golden["ids1"], capture=["l_out", "ffn_moe_gate"])
    np.testing.assert_array_equal(plain.logits, captured.logits)
    assert set(captured.stages) == {(n, i) for n in ("l_out", "ffn_moe_gate") for i in range(6)}


def test_some_layers_alone(gpu, golden, reference_runner):
    ids, layers = golden["ids2"], [4, 2]
    forced = reference_runner.forward(ids).expert_ids[:2]
    options = {"capture": list(STAGES), "layers": layers}
    for replay in (None, forced):
        found = gpu(gpu_work.forward, EMBEDDED, ids, expert_ids=replay, **options)
        truth = reference_runner.forward(ids, expert_ids=replay, **options)
        np.testing.assert_array_equal(found.expert_ids, truth.expert_ids)
        assert found.stages.keys() == truth.stages.keys()
        for key, value in truth.stages.items():
            assert nmse(found.stages[key], value) <= WGPU_STAGE_NMSE, key


def test_every_chunk_length_gives_the_same_bits(gpu, golden):
    """Among them one token at a time, which takes the kernels of decoding."""
    whole = gpu(gpu_work.forward, EMBEDDED, golden["ids2"], capture=["ffn_moe_down"])
    for chunk in (1, 3, 8, 17):
        cut = gpu(gpu_work.forward, EMBEDDED, golden["ids2"], capture=["ffn_moe_down"], chunk_sizes=(chunk,))
        np.testing.assert_array_equal(cut.logits, whole.logits)
        np.testing.assert_array_equal(cut.expert_ids, whole.expert_ids)
        for key, value in whole.stages.items():
            np.testing.assert_array_equal(cut.stages[key], value)


@pytest.mark.parametrize("on", ["own", "hardware"])
def test_router_replay(gpu, long_prompt, reference_runner, on):
    tokens = long_prompt[:70]
    rng = rng_of("replay")
    forced = np.stack([[rng.permutation(16)[:4] for _ in tokens] for _ in range(6)]).astype(np.int32)
    found = gpu(gpu_work.forward, EMBEDDED, tokens, expert_ids=forced, on=on)
    truth = reference_runner.forward(tokens, expert_ids=forced)
    np.testing.assert_array_equal(found.expert_ids, forced)
    assert nmse(found.logits, truth.logits) <= WGPU_LOGITS_NMSE


@DEVICES
def test_a_prompt_of_several_chunks(gpu, long_prompt, long_truth, on):
    found = gpu(gpu_work.forward, EMBEDDED, long_prompt, on=on)
    np.testing.assert_array_equal(found.expert_ids, long_truth.expert_ids)
    assert cosines(found.logits, long_truth.logits).min() >= WGPU_COSINE


@DEVICES
def test_decode_equals_prefill_bit_for_bit(gpu, long_prompt, on):
    """The logits that chose the tenth token after a prompt, from either set of kernels; spans are crossed."""
    prompt = long_prompt[:121].tolist()
    tokens, logits = gpu(gpu_work.decode_logits, EMBEDDED, prompt, 10, on=on)
    whole = gpu(gpu_work.forward, EMBEDDED, prompt + tokens[:-1], on=on)
    assert tokens[-1] == int(np.argmax(whole.logits[-1]))
    if on in ("own", "small bindings"):
        np.testing.assert_array_equal(logits, whole.logits[-1])
    bar = WGPU_DOTS_STAGE_NMSE if on == "dots" else WGPU_LOGITS_NMSE
    assert nmse(logits, whole.logits[-1]) <= bar


def test_runs_are_equal_bit_for_bit(gpu, long_prompt):
    first, second = (gpu(gpu_work.forward, EMBEDDED, long_prompt) for _ in range(2))
    np.testing.assert_array_equal(first.logits, second.logits)


def test_chunks_are_equal_bit_for_bit(gpu, long_prompt):
    """Small bindings shrink the chunk to 64 tokens or fewer: nothing of the logits changes."""
    one = gpu(gpu_work.forward, EMBEDDED, long_prompt)
    many = gpu(gpu_work.forward, EMBEDDED, long_prompt, on="small bindings")
    np.testing.assert_array_equal(one.logits, many.logits)


@pytest.mark.parametrize(("on", "chunk"), [("own", 100), ("hardware", 1)])
def test_a_float16_cache(gpu, long_prompt, long_truth, on, chunk):
    tokens = long_prompt[:100]
    found = gpu(gpu_work.forward, EMBEDDED, tokens, f16_cache=True, chunk_sizes=(chunk,), on=on)
    low = cosines(found.logits, long_truth.logits[:100]).min()
    assert WGPU_FLOAT16_CACHE_COSINE <= low < 1 - 1e-9


def test_stop_ids_end_a_stream_exactly(gpu, golden):
    greedy = golden["float32_greedy0"].tolist()
    stop = greedy[10]
    expected = greedy[: greedy.index(stop)]
    assert gpu(gpu_work.stream, EMBEDDED, golden["ids0"], 32, GREEDY, [stop]) == expected
    assert gpu(gpu_work.stream, EMBEDDED, golden["ids0"], 7, GREEDY) == greedy[:7]
    assert gpu(gpu_work.stream, EMBEDDED, golden["ids0"], 0, GREEDY) == []


def test_a_stream_ends_with_the_context(gpu):
    prompt = np.ones(gpu_work.CONTEXT - 3, int)
    assert len(gpu(gpu_work.stream, EMBEDDED, prompt, 32, GREEDY)) == 3


def test_penalties_in_a_stream(gpu, golden, reference_runner):
    """What the stream itself wrote counts too: without that these penalties would change nothing later on."""
    sampling = Sampling(repetition_penalty=1.1, presence_penalty=2.5)
    expected = list(reference_runner.stream(golden["ids0"], max_tokens=40, sampling=sampling))
    assert gpu(gpu_work.stream, EMBEDDED, golden["ids0"], 40, sampling) == expected


SMALL = replace(
    PRESETS["Qwen3-30B-A3B"],
    vocab_size=320,
    hidden_size=256,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=32,
    num_experts=10,
    num_experts_per_tok=3,
    moe_intermediate_size=256,
    max_position_embeddings=512,
)

MODELS = {
    "all types": (SMALL, "all"),
    "few bits": (replace(SMALL, num_hidden_layers=1), "few_bits"),
    "tied output": (replace(SMALL, tie_word_embeddings=True), "q4_k_m"),
    "narrow": (replace(SMALL, hidden_size=96, moe_intermediate_size=64), "q4_k_m"),
    "yarn": (
        replace(SMALL, rope_scaling=RopeScaling("yarn", 4.0, 64, None)),
        "q4_k_m",
    ),
    "linear": (
        replace(SMALL, rope_scaling=RopeScaling("linear", 2.0, 256, None)),
        "F16",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_other_models(gpu, tmp_path, name):
    config, mix = MODELS[name]
    path = tmp_path / "model.gguf"
    write_random_gguf(path, config, mix=mix, seed=5)
    tokens = rng_of(name).integers(0, 320, 90)
    with open_model(path) as source:
        assert source.config.rope_scaling == config.rope_scaling or config.rope_scaling is None
        truth = ReferenceRunner(source).forward(tokens)
    for on in ("own", "small bindings", "hardware"):
        found = gpu(gpu_work.forward, str(path), tokens, on=on)
        assert cosines(found.logits, truth.logits).min() >= WGPU_COSINE, on
        chosen = gpu(gpu_work.stream, str(path), tokens[:20], 5, GREEDY, on=on)
        with open_model(path) as source:
            expected = list(ReferenceRunner(source).stream(tokens[:20], max_tokens=5, sampling=GREEDY))
        assert chosen == expected, on


def test_jax_is_never_loaded(gpu):
    gpu(gpu_work.forward, EMBEDDED, [1])
    assert not gpu(gpu_work.jax_is_loaded)
