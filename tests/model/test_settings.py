"""JAX's settings are the user's: under each, a process of its own gives the same text and logits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

CHILD = """
import hashlib, json, sys
from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.core.sampling import Sampling
from qwen3_moe_jax.jax_backend.runner import JaxRunner

prompt = list(range(40, 52))
with open_model(sys.argv[1]) as source:
    runner = JaxRunner(source, max_context=64)
    write = lambda **settings: list(runner.stream(prompt, max_tokens=6, sampling=Sampling(**settings)))
    print(json.dumps({
        "greedy": write(),
        "narrow": write(temperature=1.0, top_k=20, top_p=0.9, seed=5, repetition_penalty=1.1),
        "wide": write(temperature=1.5, seed=5),
        "logits": hashlib.sha256(runner.forward(prompt).logits.tobytes()).hexdigest(),
    }))
"""

SETTINGS = {
    "wide, strict, other random bits": {
        "JAX_ENABLE_X64": "1",
        "JAX_DEFAULT_PRNG_IMPL": "unsafe_rbg",
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "JAX_NUMPY_RANK_PROMOTION": "raise",
        "JAX_DEFAULT_MATMUL_PRECISION": "bfloat16",
    },
    "debugging": {"JAX_DEBUG_NANS": "1", "JAX_DEFAULT_PRNG_IMPL": "rbg", "JAX_THREEFRY_PARTITIONABLE": "0"},
    "four devices": {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
}
"""Several at once, for each process compiles everything; ``.ci/run`` runs the smoke set under them too."""


@pytest.fixture(scope="module")
def small_model(tmp_path_factory) -> str:
    from qwen3_moe_jax.testing.random_models import SMALL, write_random_gguf

    path = tmp_path_factory.mktemp("settings") / "small.gguf"
    write_random_gguf(path, SMALL, mix="Q8_0")
    return str(path)


def results(model: str, environment: dict[str, str]) -> dict[str, object]:
    """What the model gives in a process with these variables, and none of JAX's other settings."""
    named = {name for setting in SETTINGS.values() for name in setting}
    inherited = {name: value for name, value in os.environ.items() if name not in named}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, model],
        cwd=ROOT,
        env={**inherited, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def plain(small_model) -> dict[str, object]:
    return results(small_model, {})


@pytest.mark.smoke
@pytest.mark.parametrize("name", SETTINGS)
def test_the_same_text_and_logits(small_model, plain, name):
    assert results(small_model, SETTINGS[name]) == plain
