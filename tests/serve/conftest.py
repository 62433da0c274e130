"""Servers of scripted models that many tests share."""

import pytest

from qwen3_moe_jax.serve.settings import Settings
from qwen3_moe_jax.testing.http_server import quick_start, running
from qwen3_moe_jax.testing.scripted_model import build_scripted_model


@pytest.fixture(scope="session")
def model_files(tmp_path_factory):
    """Call format to a scripted model's file."""
    folder = tmp_path_factory.mktemp("scripted")
    files = {name: folder / f"{name}.gguf" for name in ("hermes", "coder")}
    for name, path in files.items():
        path.write_bytes(build_scripted_model(call_format=name))
    return files


@pytest.fixture(scope="session")
def server(model_files):
    """A server of the scripted model that writes calls as JSON."""
    with running(
        Settings(port=0, name="scripted", metrics=True, canonical_tokens=False),
        quick_start(model_files["hermes"]),
    ) as found:
        yield found


@pytest.fixture(scope="session")
def coder_server(model_files):
    """The same, with calls as XML."""
    with running(Settings(port=0, name="scripted"), quick_start(model_files["coder"])) as found:
        yield found
