"""verify, trace, bisect and experts from the command line: output, files, exit codes."""

import json

import numpy as np
import pytest
from PIL import Image

from qwen3_moe_jax import cli, loader
from qwen3_moe_jax.api import load
from qwen3_moe_jax.core.code_version import code_version
from qwen3_moe_jax.inspection.experts import expert_usage
from qwen3_moe_jax.parity.contract import load_contract
from qwen3_moe_jax.parity.receipt import check_receipt
from qwen3_moe_jax.testing.fault_list import FAULTS
from qwen3_moe_jax.testing.faults import plant

QUICK = ["--tokens", "128"]


@pytest.fixture
def planted(monkeypatch):
    """Makes every backend that a command loads faulty."""

    def plant_fault(name):
        make = loader.make_runner

        def faulty(source, backend, **options):
            return plant(FAULTS[name], source, lambda lying: make(lying, backend, **options))

        monkeypatch.setattr(loader, "make_runner", faulty)

    return plant_fault


def test_verify_passes_and_writes_a_receipt(tmp_path, capsys):
    path = tmp_path / "receipt.json"
    code = cli.main(["verify", "--backend", "reference", "--backend", "jax", *QUICK, "--receipt", str(path)])
    shown = capsys.readouterr().out
    assert code == 0, shown
    assert "PASSED: reference float32, jax float32" in shown
    receipt = json.loads(path.read_text())
    check_receipt(receipt)
    assert receipt["verdict"] == "passed"
    assert receipt["code_version"] == code_version()
    assert [b["label"] for b in receipt["backends"]] == ["reference float32", "jax float32"]
    logits = [f["figures"] for f in receipt["findings"] if f["clause"] == "PARITY-001"]
    assert all({"replayed", "free_running"} <= figures.keys() for figures in logits)
    skipped = {f["clause"] for f in receipt["findings"] if f["verdict"] == "not applicable"}
    assert {"VRAM-001", "SPEED-001"} <= skipped  # a CPU has neither figure: never "passed"


@pytest.mark.parametrize("name", FAULTS)
def test_verify_fails_with_a_fault_in_the_reference(name, planted, capsys):
    planted(name)
    assert cli.main(["verify", "--backend", "reference", *QUICK]) == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["sub-scale", "swapped-experts", "last-chunk"])
def test_verify_fails_with_a_fault_in_jax(name, planted, capsys):
    planted(name)
    # For time one clause and three faults: bisect's tests see all ten, scripts.plant_faults runs it all.
    clauses = ["--clause", "STAGES-001"]
    assert cli.main(["verify", "--backend", "jax", *clauses, "--tokens", "64", "--json"]) == 1
    receipt = json.loads(capsys.readouterr().out)
    check_receipt(receipt)
    assert receipt["verdict"] == "failed"


@pytest.mark.parametrize("tokens", ["0", "-1", "63", "many", "1.5", ""])
def test_verify_refuses_a_text_that_is_too_short(tokens, capsys):
    assert cli.main(["verify", "--tokens", tokens]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("qwen3-moe: --tokens ")
    assert shown.count("\n") == 1


def test_verify_lists_the_contract(capsys):
    clauses = load_contract().clauses
    assert cli.main(["verify", "--contract"]) == 0
    shown = capsys.readouterr().out
    assert cli.main(["verify", "--contract", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["clauses"]
    assert [row["id"] for row in rows] == list(clauses)
    for row in rows:
        clause = clauses[row["id"]]
        assert (row["statement"], row["test"]) == (clause.statement, clause.test)
        assert row.get("at_least", row.get("at_most")) is not None
        assert f"{clause.id}  {clause.statement}\n" in shown
        assert f"falsified by {clause.test}\n" in shown
        assert all(f"{bound:g}" in shown for bound in clause.bounds.values())
    assert "share of the bandwidth limit: at least 0.3 (NVIDIA GPU), 0.12 (CPU)" in shown


def test_an_unknown_clause_is_one_line(capsys):
    assert cli.main(["verify", "--backend", "reference", "--clause", "NONE-001"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("backend", ["reference", "jax"])
def test_trace_and_bisect_of_its_payload(backend, tmp_path, capsys):
    payload = tmp_path / "trace.npz"
    options = ["--backend", backend, "--no-gate", "-q", "--context", "64"]
    assert cli.main(["trace", "def f(x):", "--json", "--payload", str(payload), *options]) == 0
    data = json.loads(capsys.readouterr().out)
    names = [row["name"] for row in data["stages"]]
    assert names[0] == "inp_embd"
    assert "ffn_moe_down-5" in names
    assert len(names) == 3 + 6 * 22
    assert len(data["experts"]) == 6 * len(data["tokens"])
    assert all(abs(sum(row["weights"]) - 1) < 1e-5 for row in data["experts"])
    with np.load(payload) as arrays:
        assert arrays["ffn_moe_down-5"].shape == (len(data["tokens"]), 4, 256)
    assert cli.main(["bisect", str(payload), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["departures"] == {str(payload): None}


def test_bisect_names_a_fault_and_fails(planted, capsys):
    planted("rope-theta")
    assert cli.main(["bisect", "reference"]) == 1
    assert "rope_theta is 10000, not 1000000" in capsys.readouterr().out


def test_bisect_refuses_a_file_that_is_no_trace(tmp_path, capsys):
    path = tmp_path / "not.npz"
    path.write_bytes(b"nothing")
    assert cli.main(["bisect", str(path)]) == 1
    assert "is no recorded trace" in capsys.readouterr().err


def test_experts_writes_picture_and_arrays(tmp_path, capsys):
    png, npz = tmp_path / "e.png", tmp_path / "e.npz"
    options = ["--backend", "reference", "--no-gate", "-q", "--context", "64", "--npz", str(npz)]
    assert cli.main(["experts", "def f(x):\n    return x\n", "-o", str(png), "--json", *options]) == 0
    data = json.loads(capsys.readouterr().out)
    counts = np.asarray(data["counts"])
    assert counts.shape == (6, 16)
    assert (counts.sum(axis=1) == 4 * data["tokens"]).all()
    with np.load(npz) as arrays:
        assert (arrays["counts"] == counts).all()
    with Image.open(png) as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("RGB").getcolors(1 << 16)) > 20


def test_the_model_object_has_what_the_commands_do(tmp_path, planted):
    with load(backend="reference", max_context=64, gate=False) as model:
        seen = model.trace("def f(x):", ["l_out"])
        assert seen.forward.stages["l_out", 2].shape == (len(seen.token_ids), model.config.hidden_size)
        assert {f.where for f in model.trace("def f(x):").figures()} >= {"inp_embd", "ffn_moe_down-5"}
        usage = model.experts("def f(x):")
        assert usage.tokens == len(seen.token_ids)
        assert usage.model == "Tiny-Coder Qwen3-MoE 23M"
        usage.save_picture(tmp_path / "e.png")
        assert model.bisect("def f(x):") is None
        with pytest.raises(ValueError, match="prompt is empty"):
            model.trace("")
        with pytest.raises(ValueError, match="reference backend has no gradients"):
            model.logit_gradient("def f(x):", token=1, stage="l_out", layer=2)
    planted("gqa-map")
    with load(backend="reference", max_context=64, gate=False) as model:
        assert model.bisect("def f(x):").judgement.where == "kqv_out-0"


def test_expert_counts_are_those_of_the_forward_pass(reference, text_ids):
    ids = text_ids[:50]
    usage = expert_usage(reference, ids)
    chosen = reference.forward(ids).expert_ids
    assert usage.counts[3, 5] == (chosen[3] == 5).sum()
    windows = expert_usage(reference, ids, window=20)
    assert windows.counts.sum() == usage.counts.sum()
    assert usage.share.sum(axis=1) == pytest.approx(np.full(6, 4.0))
    assert (usage.balance() <= 1).all()
