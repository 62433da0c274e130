"""Whole models of every type, in the mixtures of published files and in any place, give one answer."""

from pathlib import Path

import numpy as np
import pytest

from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.jax_backend.runner import JaxRunner
from qwen3_moe_jax.reference import ReferenceRunner
from qwen3_moe_jax.testing.random_models import SMALL, write_random_gguf
from tests.tolerances import GOLDEN_FLOAT32_COSINE


@pytest.mark.parametrize("mix", ["all", "q2_k", "q3_k_m", "iq4_xs"])
def test_a_mixture_agrees_with_the_reference(tmp_path: Path, mix: str):
    write_random_gguf(tmp_path / "model.gguf", SMALL, mix=mix, seed=3)
    tokens = np.random.default_rng(0).integers(0, 256, 12)
    with open_model(tmp_path / "model.gguf") as source:
        truth = np.asarray(ReferenceRunner(source).forward(tokens).logits, np.float64)
        runner = JaxRunner(source, max_context=32, compute_dtype="float32", cache_dtype="float32")
        found = np.asarray(runner.forward(tokens).logits, np.float64)
    norms = np.linalg.norm(truth, axis=-1) * np.linalg.norm(found, axis=-1)
    assert ((truth * found).sum(axis=-1) / norms).min() >= GOLDEN_FLOAT32_COSINE
