"""A hub on this machine, an empty cache, and huggingface_hub pointed at both."""

from pathlib import Path

import pytest
from huggingface_hub import constants

from qwen3_moe_jax.testing.random_models import SMALL, write_random_gguf
from tests.hub.hub_server import Hub, running

REPO = "Owner/Small-GGUF"


@pytest.fixture(scope="session")
def small_gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("hub") / "small.gguf"
    write_random_gguf(path, SMALL)
    return path.read_bytes()


@pytest.fixture
def hub(small_gguf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files = {
        "README.md": b"# Small",
        "Small-Q4_K_M.gguf": small_gguf,
        "Small-Q8_0.gguf": bytes(3_000_000),
        "Small-IQ4_XS.gguf": bytes(1_000),
        "Q6_K/Small-Q6_K-00001-of-00002.gguf": b"a" * 1_500_000,
        "Q6_K/Small-Q6_K-00002-of-00002.gguf": b"b" * 500_000,
        "Small-Q5_K_M-00001-of-00003.gguf": b"incomplete",
    }
    with running(Hub(repos={REPO: files, "Owner/Empty": {"model.safetensors": b"x"}})) as hub:
        for name, value in {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "DOWNLOAD_CHUNK_SIZE": 1 << 16,
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub
