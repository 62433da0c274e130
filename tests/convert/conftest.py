"""Small random models for the tests of reading, converting and checkpoints."""

from dataclasses import replace
from pathlib import Path

import pytest

from convert.checkpoint_writer import write_checkpoint
from convert.config import PRESETS, Qwen3MoeConfig
from convert.model_source import open_model
from scripts.make_random_gguf import write_random_gguf

SMALL = replace(
    PRESETS["Qwen3-30B-A3B"],
    vocab_size=272,
    hidden_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    num_experts=3,
    num_experts_per_tok=2,
    moe_intermediate_size=256,
)


@pytest.fixture(scope="session")
def small_config() -> Qwen3MoeConfig:
    """Two layers, every matrix row one superblock."""
    return SMALL


@pytest.fixture(scope="session")
def small_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that mixes all seven types. Not to be changed."""
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    write_random_gguf(path, SMALL, mix="all", seed=1)
    return path


@pytest.fixture(scope="session")
def small_checkpoint(small_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packed checkpoint of ``small_gguf``. Not to be changed: copy it first."""
    path = tmp_path_factory.mktemp("checkpoint") / "small"
    with open_model(small_gguf) as source:
        write_checkpoint(source, path)
    return path
