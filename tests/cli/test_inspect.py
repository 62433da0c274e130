"""``inspect`` of files that run and of files that do not."""

import json

import pytest

from qwen3_moe_jax.cli import main
from qwen3_moe_jax.core.exit_codes import ExitCode
from qwen3_moe_jax.inspection.file_report import implementation
from qwen3_moe_jax.loader import native_kernels_against
from qwen3_moe_jax.machine import estimate
from qwen3_moe_jax.machine.estimate import Place
from qwen3_moe_jax.machine.headroom import Headroom
from qwen3_moe_jax.testing.gguf_builder import GGUFBuilder, Tensor, entry, model_builder, text

IQ4_XS = 23


@pytest.fixture(autouse=True)
def speed(monkeypatch):
    monkeypatch.setattr(estimate, "_measured", lambda: 1e10)


def test_memory_and_rate_by_context(capsys):
    assert main(["inspect", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    rows = report["here"]["contexts"]
    assert [row["context"] for row in rows] == sorted(
        {min(c, report["config"]["max_position_embeddings"]) for c in (4096, 32768, 1 << 40)}
    )
    rates = [row["estimated_tokens_per_second"] for row in rows]
    assert rates == sorted(rates, reverse=True)
    assert all(row["total"] > row["weights"] + row["cache"] for row in rows)
    assert set(report["here"]["implementations"]) == set(report["types"])
    groups = {group["name"]: group for group in report["groups"]}
    assert sum(group["nbytes"] for group in groups.values()) == sum(t["nbytes"] for t in report["tensors"])
    assert (
        sum(groups["blk.*.ffn_down_exps.weight"]["types"].values()) == report["config"]["num_hidden_layers"]
    )
    assert main(["inspect", "--tensors"]) == 0
    shown = capsys.readouterr().out
    assert "blk.5.ffn_down_exps.weight" in shown
    assert "estimates" in shown
    assert main(["inspect", "--no-estimates"]) == 0
    assert "will run" not in capsys.readouterr().out


def test_a_foreign_file_is_shown_with_its_fault(tmp_path, capsys):
    path = tmp_path / "llama.gguf"
    tensors = [Tensor("token_embd.weight", (4, 256), IQ4_XS), Tensor("blk.0.attn_qkv.weight", (2, 32))]
    path.write_bytes(GGUFBuilder({"general.architecture": "llama", "x.y": 7}, tensors).build())
    assert main(["inspect", "-m", str(path), "--tensors"]) == ExitCode.FAULT
    out, err = capsys.readouterr()
    assert "does not run here: E_ARCH" in out
    assert "x.y = 7" in out
    assert "IQ4_XS" in out
    assert "blk.0.attn_qkv.weight" in out
    assert "E_ARCH" in err
    assert main(["inspect", str(path), "--json"]) == ExitCode.FAULT
    report = json.loads(capsys.readouterr().out)
    assert report["fault_code"] == "E_ARCH"
    assert report["types"] == {"IQ4_XS": 1, "F32": 1}


def test_an_unsupported_type_is_marked(tmp_path, capsys):
    builder = model_builder()
    tensor = next(t for t in builder.tensors if t.name == "blk.0.attn_q.weight")
    tensor.type, tensor.data = 9, None  # Q8_1, which is never stored
    path = tmp_path / "q8_1.gguf"
    path.write_bytes(builder.build())
    assert main(["inspect", str(path)]) == ExitCode.FAULT
    out = capsys.readouterr().out
    assert "1 Q8_1 (NOT SUPPORTED)" in out
    assert "E_QTYPE" in out


def test_text_in_another_encoding_is_a_warning(tmp_path, capsys):
    builder = model_builder()
    builder.raw_metadata = [entry("general.author", 8, text(b"\xff"))]
    (tmp_path / "odd.gguf").write_bytes(builder.build())
    assert main(["inspect", "--no-estimates", str(tmp_path / "odd.gguf")]) == 0
    assert "\nwarning: 'general.author' holds text that is not UTF-8" in capsys.readouterr().out


def test_what_is_no_gguf_file_is_one_line(tmp_path, capsys):
    (tmp_path / "x.gguf").write_text("hello, this is not a model")
    assert main(["inspect", str(tmp_path / "x.gguf")]) == ExitCode.FAULT
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1


def test_what_runs_on_a_gpu():
    gpu = Place("jax", Headroom(None), None, "", 2, "portable")
    cpu = Place("jax", Headroom(None), None, "", 4)
    assert implementation(gpu, "Q4_K") == "portable"
    assert implementation(gpu, "F16") == implementation(cpu, "Q4_K") == "xla"
    assert implementation(Place("wgpu", Headroom(None), None, "", 2), "Q4_K") == "wgsl"
    native = Place("jax", Headroom(None), None, "", 4, "native")
    assert [implementation(native, name) for name in ("Q4_K", "F32", "IQ1_S")] == ["native", "native", "xla"]


@pytest.mark.parametrize("setting", ["", "off"])
def test_a_cpu_runs_its_own_kernels_unless_they_are_off(setting, monkeypatch, capsys):
    monkeypatch.setenv("QWEN3_MOE_NATIVE", setting)
    expected = "xla" if setting or native_kernels_against() else "native"
    assert main(["inspect"]) == 0
    assert f"will run with jax (F32: {expected}, Q4_K: {expected}" in capsys.readouterr().out


def test_a_file_of_a_near_name_is_offered(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("Tiny-Coder-Q4_K_M.gguf", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "tiny-coder").mkdir()
    assert main(["inspect", "tiny-coder-q4_k_m.guf"]) == ExitCode.USAGE
    assert capsys.readouterr().err == (
        "qwen3-moe: there is no file tiny-coder-q4_k_m.guf; did you mean Tiny-Coder-Q4_K_M.gguf?\n"
    )
    assert main(["inspect", "other.gguf"]) == ExitCode.FAULT
    assert "E_OPEN" in capsys.readouterr().err
