"""The embedded model against logits that other programs recorded for the same file."""

import numpy as np
import pytest

from qwen3_moe_jax.convert.checkpoint_writer import write_checkpoint
from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.core.sampling import Sampling
from qwen3_moe_jax.jax_backend.runner import JaxRunner
from qwen3_moe_jax.reference import ReferenceRunner
from tests import tolerances

PROMPTS = (0, 1, 2)


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of each row, in float64."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


@pytest.fixture(params=["reference_runner", "exact_runner"])
def runner(request):
    return request.getfixturevalue(request.param)


@pytest.mark.smoke
@pytest.mark.parametrize("prompt", PROMPTS)
def test_logits_equal_transformers_float32_at_every_position(runner, golden, prompt):
    logits = runner.forward(golden[f"ids{prompt}"]).logits
    assert cosine(logits, golden[f"float32_logits{prompt}"]).min() >= tolerances.GOLDEN_FLOAT32_COSINE


@pytest.mark.smoke
@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_same_32_greedy_tokens(runner, golden, prompt):
    tokens = list(runner.stream(golden[f"ids{prompt}"], max_tokens=32, sampling=Sampling()))
    assert tokens == golden[f"float32_greedy{prompt}"].tolist()


@pytest.mark.parametrize("prompt", PROMPTS)
def test_bfloat16_with_the_references_experts(source, reference_runner, golden, prompt):
    runner = JaxRunner(source, compute_dtype="bfloat16")
    truth = reference_runner.forward(golden[f"ids{prompt}"])
    replayed = runner.forward(golden[f"ids{prompt}"], expert_ids=truth.expert_ids)
    np.testing.assert_array_equal(replayed.expert_ids, truth.expert_ids)
    assert cosine(replayed.logits, truth.logits).min() >= tolerances.GOLDEN_BFLOAT16_COSINE


@pytest.mark.parametrize("prompt", PROMPTS)
def test_as_near_to_llamacpp_as_float32_itself_is(runner, golden, prompt):
    llamacpp, float32 = golden[f"llamacpp_logits{prompt}"], golden[f"float32_logits{prompt}"]
    ours = cosine(runner.forward(golden[f"ids{prompt}"]).logits, llamacpp).mean()
    assert ours == pytest.approx(cosine(float32, llamacpp).mean(), abs=tolerances.GOLDEN_LLAMACPP_DIFFERENCE)


def test_float64_reference_confirms_float32(source, reference_runner, golden):
    exact = ReferenceRunner(source, dtype=np.float64).forward(golden["ids0"])
    single = reference_runner.forward(golden["ids0"])
    np.testing.assert_array_equal(exact.expert_ids, single.expert_ids)
    assert cosine(exact.logits, single.logits).min() >= tolerances.GOLDEN_FLOAT32_COSINE


def test_a_checkpoint_gives_the_logits_of_the_file_bit_for_bit(
    source, jax_runner, reference_runner, golden, tmp_path
):
    write_checkpoint(source, tmp_path / "packed")
    with open_model(tmp_path / "packed") as checkpoint:
        pairs = ((jax_runner, JaxRunner(checkpoint)), (reference_runner, ReferenceRunner(checkpoint)))
        for from_file, from_checkpoint in pairs:
            logits = from_checkpoint.forward(golden["ids0"]).logits
            np.testing.assert_array_equal(logits, from_file.forward(golden["ids0"]).logits)
