"""Small random models for the tests of reading, converting and checkpoints."""

from dataclasses import replace
from pathlib import Path

import pytest

from qwen3_moe_jax.convert.checkpoint_writer import write_checkpoint
from qwen3_moe_jax.convert.config import Qwen3MoeConfig
from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.testing.random_models import SMALL, write_random_gguf


@pytest.fixture(scope="session")
def small_config() -> Qwen3MoeConfig:
    """Three layers, so that no type is missing; every matrix row one superblock."""
    return replace(SMALL, num_hidden_layers=3)


@pytest.fixture(scope="session")
def small_gguf(small_config: Qwen3MoeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that mixes all types. Not to be changed."""
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    write_random_gguf(path, small_config, mix="all", seed=1)
    return path


@pytest.fixture(scope="session")
def small_checkpoint(small_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packed checkpoint of ``small_gguf``. Not to be changed: copy it first."""
    path = tmp_path_factory.mktemp("checkpoint") / "small"
    with open_model(small_gguf) as source:
        write_checkpoint(source, path)
    return path
