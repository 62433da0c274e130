"""Whole models of every type, in the mixtures of published files and in any place, give one answer."""

from pathlib import Path

import numpy as np
import pytest

from qwen3_moe_jax.convert.config import PRESETS
from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.jax_backend.runner import JaxRunner
from qwen3_moe_jax.reference import ReferenceRunner
from qwen3_moe_jax.testing.mixes import mix_types
from qwen3_moe_jax.testing.random_models import SMALL, write_random_gguf
from tests.tolerances import GOLDEN_FLOAT32_COSINE


@pytest.mark.parametrize("mix", ["all", "few_bits", "q3_k_m"])
def test_a_mixture_agrees_with_the_reference(tmp_path: Path, mix: str):
    write_random_gguf(tmp_path / "model.gguf", SMALL, mix=mix, seed=3)
    tokens = np.random.default_rng(0).integers(0, 256, 12)
    with open_model(tmp_path / "model.gguf") as source:
        truth = np.asarray(ReferenceRunner(source).forward(tokens).logits, np.float64)
        runner = JaxRunner(source, max_context=32, compute_dtype="float32", cache_dtype="float32")
        found = np.asarray(runner.forward(tokens).logits, np.float64)
    norms = np.linalg.norm(truth, axis=-1) * np.linalg.norm(found, axis=-1)
    assert ((truth * found).sum(axis=-1) / norms).min() >= GOLDEN_FLOAT32_COSINE


def names_of(mix: str, part: str) -> list[str]:
    """The types of one tensor of all 48 layers of the 30B model, without repeats of neighbours."""
    types = mix_types(mix, PRESETS["Qwen3-30B-A3B"])
    names = [types[f"layers.{layer}.{part}"].name for layer in range(48)]
    return [name for i, name in enumerate(names) if i == 0 or names[i - 1] != name]


def test_recipes_are_those_of_published_files():
    """Spot checks against tensors that llama.cpp's quantizer gives other types than most."""
    assert names_of("Q2_K", "self_attn.v_proj") == ["Q4_K"]  # eight heads share a key
    assert names_of("Q2_K", "mlp.experts.down_proj") == ["Q3_K"]
    assert names_of("Q2_K", "mlp.experts.up_proj") == ["Q2_K"]
    assert names_of("Q3_K_M", "self_attn.v_proj") == ["Q5_K", "Q4_K"]
    assert names_of("Q3_K_M", "mlp.experts.down_proj") == ["Q5_K", "Q4_K"]
    assert names_of("IQ3_XS", "mlp.experts.gate_proj") == ["IQ3_S", "IQ3_XXS", "IQ3_S"]
    assert names_of("IQ2_M", "mlp.experts.down_proj") == ["IQ3_S", "IQ2_S"]
    assert mix_types("IQ4_XS", PRESETS["Qwen3-30B-A3B"])["lm_head"].name == "Q6_K"
    assert mix_types("MXFP4_MOE", SMALL)["layers.0.mlp.experts.up_proj"].name == "MXFP4"
