"""The embedded model and its runners, loaded once a worker."""

import sys

import numpy as np
import pytest

from qwen3_moe_jax.parity.recorded import parity_text
from qwen3_moe_jax.reference import ReferenceRunner
from qwen3_moe_jax.text.tokenizer import Tokenizer


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Frees the programs that planted faults made: a process has room for a few thousand memory maps only."""
    yield
    if "qwen3_moe_jax.jax_backend.programs" in sys.modules:
        sys.modules["qwen3_moe_jax.jax_backend.programs"].forget()


@pytest.fixture(scope="session")
def text_ids(source):
    return np.asarray(Tokenizer(source.metadata, vocab_size=source.config.vocab_size).encode(parity_text()))


@pytest.fixture(scope="session")
def reference(source):
    return ReferenceRunner(source, max_context=512)


@pytest.fixture(scope="session")
def makers():
    """Loads a backend from a source, by the backend's name."""

    def make_reference(source):
        return ReferenceRunner(source, max_context=512)

    def make_jax(source):
        from qwen3_moe_jax.jax_backend.runner import JaxRunner

        return JaxRunner(source, max_context=512)

    return {"reference": make_reference, "jax": make_jax}
