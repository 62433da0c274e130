"""The list of models on this machine."""

import json
from pathlib import Path

from huggingface_hub import constants

from qwen3_moe_jax.cli import main
from qwen3_moe_jax.hub.names import parse
from qwen3_moe_jax.hub.pull import pull
from qwen3_moe_jax.machine import estimate
from qwen3_moe_jax.machine.headroom import Headroom
from tests.hub.conftest import REPO


def test_models_lists_what_is_here(hub, small_gguf, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(estimate, "_measured", lambda: 1e9)
    pull(parse(f"hf:{REPO}:Q4_K_M"), quiet=True)
    pull(parse(f"hf:{REPO}:IQ4_XS"), quiet=True)
    (Path(constants.HF_HUB_CACHE) / f"models--{REPO.replace('/', '--')}" / "blobs" / "x.part").write_bytes(
        bytes(9)
    )
    (tmp_path / "mine-Q4_K_M.gguf").write_bytes(small_gguf)
    assert main(["models", "--json", str(tmp_path)]) == 0
    report = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in report["models"]}
    good = rows[f"hf:{REPO}:Q4_K_M"]
    assert good["runs"]
    assert good["types"] == ["F32", "Q4_K", "Q6_K"]
    assert 0 < good["estimated_tokens_per_second"] <= estimate.MAX_TOKENS
    assert good["nbytes"] == len(small_gguf)
    assert not rows[f"hf:{REPO}:IQ4_XS"]["runs"]
    assert rows[str(tmp_path / "mine-Q4_K_M.gguf")]["runs"]
    assert report["unfinished"] == [{"repo": REPO, "nbytes": 9}]
    assert main(["models", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "estimates" in shown
    assert "unfinished download" in shown


def test_a_model_that_does_not_fit_says_what_it_needs(hub, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(estimate, "_measured", lambda: 1e9)
    monkeypatch.setattr(estimate, "main_memory", lambda: Headroom(1000))
    assert main(["models", str(tmp_path)]) == 0
    assert "does not run: needs 0." in capsys.readouterr().out


def test_the_estimate_is_the_measured_share_of_the_memorys_speed():
    """The figures that the shares come from: 1.92 GB per token, H100 and a CPU."""

    class Source:
        pass

    place = estimate.Place("jax", Headroom(None), 3.35e12, "", 2, "hopper")
    original = estimate.step_nbytes
    estimate.step_nbytes = lambda *_: 1.92e9
    try:
        assert 600 < place.rate(Source(), 0) < 700
        assert estimate.Place("reference", Headroom(None), None, "", 4).rate(Source(), 0) is None
    finally:
        estimate.step_nbytes = original
