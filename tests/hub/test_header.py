"""What is known of a model before its download: its header, read by ranges."""

import json
from pathlib import Path

import pytest
from huggingface_hub import constants

from qwen3_moe_jax import loader
from qwen3_moe_jax.cli import main
from qwen3_moe_jax.core.exit_codes import ExitCode
from qwen3_moe_jax.hub import header
from qwen3_moe_jax.hub import pull as pulling
from qwen3_moe_jax.hub.listing import ask
from qwen3_moe_jax.hub.names import parse
from qwen3_moe_jax.hub.pull import choose, pull
from qwen3_moe_jax.machine import estimate
from qwen3_moe_jax.machine.headroom import Headroom
from tests.hub.conftest import REPO

Q4 = f"hf:{REPO}:Q4_K_M"


@pytest.fixture
def far_larger(hub, small_gguf, monkeypatch):
    """The hub, and ranges so small that the header is a part of the file alone."""
    monkeypatch.setattr(header, "PIECE", 32 << 10)
    return hub


def test_inspect_reads_the_header_alone(far_larger, small_gguf, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(estimate, "_measured", lambda: 1e9)
    assert main(["inspect", Q4, "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert not far_larger.gets()
    assert sum(_length(r) for r in far_larger.parts()) < len(small_gguf)
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.gguf"))
    path = tmp_path / "small.gguf"
    path.write_bytes(small_gguf)
    assert main(["inspect", str(path), "--json"]) == 0
    here = json.loads(capsys.readouterr().out)
    assert "not downloaded" in seen["path"]
    for key in ("nbytes", "types", "config", "metadata", "tensors", "groups"):
        assert seen[key] == here[key]
    assert seen["here"]["contexts"] == here["here"]["contexts"]
    assert main(["inspect", Q4, "--sha256"]) == ExitCode.USAGE
    assert "pull` it first" in capsys.readouterr().err


def _length(asked: str) -> int:
    first, last = asked.removeprefix("bytes=").split("-")
    return int(last) - int(first) + 1


def test_a_model_that_is_here_is_read_here(hub, capsys):
    pull(parse(Q4), quiet=True)
    hub.log.clear()
    assert main(["inspect", Q4, "--no-estimates"]) == 0
    assert not hub.log


def test_types_and_memory_are_said_before_the_download(hub, capsys):
    loader.model_path(Q4)
    said = capsys.readouterr().err
    assert "F32, Q4_K, Q6_K; needs 0.4 GB with 4,096 tokens of context: fits main memory" in said
    loader.model_path(f"hf:{REPO}:Q8_0")
    assert "note: it will not run here: E_MAGIC: Small-Q8_0.gguf: " in capsys.readouterr().err


def test_the_choice_passes_over_what_the_header_refuses(hub, small_gguf, monkeypatch):
    """A name promises a type, the file has another architecture."""
    foreign = small_gguf.replace(b"qwen3moe", b"gemma4ab")
    hub.repos[REPO] = {"S-Q4_K_M.gguf": foreign, "S-Q5_K_M.gguf": small_gguf}
    assert pull(parse(f"hf:{REPO}"), quiet=True).name == "S-Q5_K_M.gguf"
    assert "gemma4ab" in header.look(ask(parse(Q4)), ask(parse(Q4)).variants[0]).fault


def test_the_choice_follows_the_memory_that_the_header_tells(hub):
    listing = ask(parse(f"hf:{REPO}"))
    look = lambda variant: header.look(listing, variant)
    seen = look(listing.named(parse(Q4)))
    assert choose(listing, Headroom(seen.plan.total), look).quant == "Q4_K_M"
    assert pulling.plan_of(listing.named(parse(Q4))).total < seen.plan.total
    with pytest.raises(Exception, match="does not fit"):
        choose(listing, Headroom(seen.plan.total - 1), look)


@pytest.mark.parametrize("fault", ["ignores_ranges", "cut", "refused"])
def test_a_header_that_cannot_be_read_stops_nothing(far_larger, small_gguf, fault, monkeypatch):
    listing = ask(parse(Q4))
    if fault == "cut":
        far_larger.cut_after = 1000
    elif fault == "refused":
        far_larger.status = (403, "GatedRepo")
    else:
        far_larger.ignores_ranges = True
    assert header.look(listing, listing.named(parse(Q4))) is None


def test_the_token_does_not_go_to_the_storage(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    listing = ask(parse(Q4))
    assert header.look(listing, listing.named(parse(Q4))).plan
    assert set(hub.tokens) == {None}
