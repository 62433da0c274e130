"""The decode kernels over the devices of a mesh, against the float32 reference.

Pallas' interpreter has no semaphores and no memory of other devices: a call of the host stands for both
(``emulated.exchange``). All else is the code that runs on the GPUs of a host. The model has four KV heads.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
if jax.__version_info__ < (0, 11):
    pytest.skip("the GPU kernels need JAX 0.11", allow_module_level=True)

from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.loader import make_runner
from qwen3_moe_jax.testing.random_models import SMALL, write_random_gguf

TOKEN = 3
CONFIG = replace(
    SMALL,
    vocab_size=288,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=128,
    num_experts=8,
    num_experts_per_tok=4,
)
"""Split over two devices: two heads and four experts each; every second row of the head."""


def test_every_device_has_the_references_logits(tmp_path):
    path, arrays = tmp_path / "model.gguf", tmp_path / "found.npz"
    write_random_gguf(path, CONFIG, seed=7)
    script = Path(__file__).with_name("run_decode_on_mesh.py")
    command = [sys.executable, script, path, "ep=2", str(TOKEN), arrays]
    # its program runs once: it is compiled quickly, not well
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    subprocess.run(command, check=True, env=environment, timeout=900)
    with open_model(path) as source:
        expected = make_runner(source, "reference", max_context=64).forward([TOKEN])
    with np.load(arrays) as found:
        first, *others = logits = found["logits"]
        np.testing.assert_array_equal(
            found["experts"].reshape(-1), np.asarray(expected.expert_ids).reshape(-1)
        )
        assert found["keys"].any(-1).all(), "each device writes the keys of its heads"
    assert len(logits) == 2
    for other in others:
        np.testing.assert_array_equal(other, first)
    a, b = first.astype(np.float64), expected.logits[-1].astype(np.float64)
    assert a @ b / np.sqrt((a @ a) * (b @ b)) > 0.99999


TOKENS = (3, 5, 9, 11)
"""Of as many sequences."""


JOINED = {"hidden_size": 512, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 64}
"""Sizes for which there are kernels between the products, too."""


@pytest.mark.parametrize("sizes", [{}, JOINED], ids=["products", "all"])
def test_few_launches_have_the_references_logits_on_every_device(tmp_path, sizes):
    """Of the pairs of a token and an expert, each device computes those of its own experts."""
    path, arrays = tmp_path / "model.gguf", tmp_path / "found.npz"
    write_random_gguf(path, replace(CONFIG, num_hidden_layers=2, **sizes), seed=7)
    script = Path(__file__).with_name("run_layers_on_mesh.py")
    command = [sys.executable, script, path, "ep=2", arrays, *map(str, TOKENS)]
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    subprocess.run(command, check=True, env=environment, timeout=900)
    with open_model(path) as source:
        runner = make_runner(source, "reference", max_context=64)
        expected = [runner.forward([token]) for token in TOKENS]
    with np.load(arrays) as found:
        logits, experts = found["logits"], found["experts"]
        assert found["joined"] == bool(sizes)
    np.testing.assert_array_equal(logits[0], logits[1])
    for b, one in enumerate(expected):
        np.testing.assert_array_equal(experts[:, b].reshape(-1), np.asarray(one.expert_ids).reshape(-1))
        x, y = logits[0, b].astype(np.float64), one.logits[-1].astype(np.float64)
        assert x @ y / np.sqrt((x @ x) * (y @ y)) > 0.99999
