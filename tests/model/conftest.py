"""What tests of compiled programs share: a store of their own, and a model whose programs compile soon."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from qwen3_moe_jax.jax_backend import programs
from qwen3_moe_jax.jax_backend.program_store import ProgramStore
from qwen3_moe_jax.testing.random_models import SMALL, write_random_gguf


@pytest.fixture
def without_jaxs_own_cache():
    """What JAX's cache has is not written again: here every program is compiled."""
    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", enabled)
    compilation_cache.reset_cache()


@pytest.fixture
def store(tmp_path, without_jaxs_own_cache):
    """Programs on disk, where there are none at the beginning, as there are none in memory."""
    programs.forget()
    store = ProgramStore(tmp_path / "programs")
    programs.use_store(store)
    yield store
    programs.use_store(None)  # as tests/conftest.py has it
    programs.forget()


@pytest.fixture(scope="module")
def f16_file(tmp_path_factory):
    """A small model of F16 matrices, whose programs compile soonest."""
    path = tmp_path_factory.mktemp("small") / "small.gguf"
    write_random_gguf(path, SMALL, mix="f16")
    return path
