"""What several commands are tested with."""

import pytest

from qwen3_moe_jax import api


@pytest.fixture
def no_load(monkeypatch):
    """A load is a failure of the test."""

    def load(*args, **options):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(api, "load", load)
    monkeypatch.setattr("qwen3_moe_jax.loader.make_runner", load)
