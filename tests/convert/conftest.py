"""Small random models for the tests of reading, converting and checkpoints."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from qwen3_moe_jax.convert.checkpoint_source import array_files
from qwen3_moe_jax.convert.checkpoint_writer import write_checkpoint
from qwen3_moe_jax.convert.config import Qwen3MoeConfig
from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.testing.gguf_builder import GGUFBuilder
from qwen3_moe_jax.testing.random_models import SMALL, write_random_gguf
from tests.convert.checkpoints import DOWN


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


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(content: bytes | GGUFBuilder, name: str = "model.gguf") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.build())
        return path

    return write


@pytest.fixture
def copy(small_checkpoint, tmp_path) -> Path:
    """A checkpoint of the test's own, to be damaged."""
    return Path(shutil.copytree(small_checkpoint, tmp_path / "copy"))


@pytest.fixture
def data_file(copy) -> Path:
    """The file of the largest array of one tensor."""
    with open_model(copy) as source:
        return copy / next(iter(array_files(DOWN, source.types[DOWN], source.specs[DOWN].shape).values()))
