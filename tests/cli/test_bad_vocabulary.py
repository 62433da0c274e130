"""A vocabulary that no tokenizer can be built of is told by all that look at a file before it is used."""

import json

import pytest

from qwen3_moe_jax.cli import main
from qwen3_moe_jax.core.exit_codes import ExitCode
from qwen3_moe_jax.testing.gguf_builder import model_builder


@pytest.fixture
def file(tmp_path):
    """A sound model but for a token that is there twice."""
    builder = model_builder()
    tokens = builder.metadata["tokenizer.ggml.tokens"]
    tokens[-1] = tokens[-2]
    path = tmp_path / "model.gguf"
    path.write_bytes(builder.build())
    return str(path)


def test_inspect_does_not_say_that_it_will_run(file, capsys):
    assert main(["inspect", file]) == ExitCode.FAULT
    shown = capsys.readouterr()
    assert "does not run here: E_TOKENIZER" in shown.out
    assert "will run" not in shown.out
    assert "twice" in shown.err
    assert main(["inspect", file, "--json", "--no-estimates"]) == ExitCode.FAULT
    assert json.loads(capsys.readouterr().out)["fault_code"] == "E_TOKENIZER"


def test_convert_writes_nothing(file, tmp_path, capsys):
    assert main(["convert", file, str(tmp_path / "out"), "-q"]) == ExitCode.FAULT
    assert "twice" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_doctor_names_it(file, capsys):
    assert main(["doctor", "-m", file, "--json"]) == ExitCode.FAULT
    (row,) = (row for row in json.loads(capsys.readouterr().out) if row["subject"] == "model")
    assert row["level"] == "problem"
    assert "twice" in row["text"]
