"""``qwen3-moe bench`` as a person meets it."""

import json

import pytest

from qwen3_moe_jax.cli import main
from qwen3_moe_jax.machine import limits
from qwen3_moe_jax.measure.benchmark import Benchmark

QUICK = ("--backend", "reference", "--no-gate", "-r", "1")
SMALL = ("-p", "8", "-n", "2", "-d", "0", "4", "-b", "2")


@pytest.fixture(autouse=True)
def quick_limits(monkeypatch):
    """Measuring the machine is not what is tested here."""
    monkeypatch.setattr(limits, "READ_NBYTES", 8 << 20)
    monkeypatch.setattr(limits, "PRODUCT_SIZE", 256)


def test_the_table_has_every_row_and_says_what_ran(capsys):
    assert main(["bench", *SMALL, *QUICK]) == 0
    out = capsys.readouterr().out
    rows = {line.split("|")[1].strip(): line for line in out.splitlines() if line.startswith("| ")}
    assert list(rows) == ["test", "-" * 12, "pp8", "tg2", "tg2 @ d4", "2 x pp8", "2 x tg2 @ d8"]
    assert "not offered: the reference backend runs one sequence at a time" in rows["2 x pp8"]
    for name in ("pp8", "tg2", "tg2 @ d4"):
        assert rows[name].rstrip(" |").endswith("%")
    assert "Tiny-Coder" in out
    assert "reference on CPU (NumPy)" in out
    assert "cores, load" in out
    assert "numpy " in out
    assert "limit of tg: " in out
    assert "measured with NumPy" in out
    assert "a row's first run, which compiles, does not count" in out


def test_json_has_every_figure_and_is_the_only_output(capsys):
    assert main(["bench", *SMALL, *QUICK, "--json", "-q"]) == 0
    shown = capsys.readouterr()
    report = json.loads(shown.out)
    assert shown.err == ""
    assert report["backend"]["backend"] == "reference"
    assert report["machine"]["versions"].keys() >= {"python", "numpy"}
    assert report["model"]["identity"]
    assert report["context"] == 9
    assert report["limits"]["memory_bytes_per_s"] > 0
    rows = {row["test"]: row for row in report["rows"]}
    assert len(rows) == 5
    assert rows["tg2 @ d4"]["depth"] == 4
    assert rows["tg2 @ d4"]["tokens_per_s_best"] == 2 / rows["tg2 @ d4"]["seconds"][0]
    assert rows["pp8"]["first_run_s"] > 0
    assert rows["2 x pp8"]["outcome"] == "not offered"
    assert rows["2 x pp8"]["tokens_per_s_best"] is None


def test_an_option_without_numbers_leaves_its_rows_out(capsys):
    assert main(["bench", "-p", "-d", "0", "-n", "2", "-b", *QUICK, "--json", "-q"]) == 0
    assert [row["test"] for row in json.loads(capsys.readouterr().out)["rows"]] == ["tg2"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("-p", "0"), "--prompt-tokens 0: it must be at least 1"),
        (("-p", "512", "-3"), "--prompt-tokens -3"),
        (("-n", "0"), "--new-tokens 0"),
        (("-d", "-1"), "--depth -1: it must be at least 0"),
        (("-b", "0"), "--batch 0"),
        (("-r", "0"), "--repeats 0"),
        (("--max-seconds", "0"), "--max-seconds 0: it must be above 0"),
        (("-p", "5000"), "pp5000 needs 5001 tokens of context, and the model takes 4096"),
        (("-d", "4000"), "tg128 @ d4000 needs 4129 tokens of context, and the model takes 4096"),
        (("-p", "100", "--context", "50"), "pp100 needs 101 tokens of context, and --context is 50"),
        (("-p", "-d", "-b"), "no row is left"),
        (("-m", "no-such.gguf"), "no-such.gguf"),
        (("-m", __file__), "not a GGUF file"),
    ],
)
def test_wrong_numbers_and_files_end_in_one_clear_line(capsys, options, expected):
    code = 1 if "-m" in options else 2
    assert main(["bench", "--backend", "reference", "--no-gate", *options]) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.strip().splitlines()) == 1
    assert shown.err.startswith("qwen3-moe: ")
    assert expected in shown.err


def test_a_row_that_failed_is_exit_code_1_after_the_others(capsys, monkeypatch):
    run_of = Benchmark._run_of

    def broken(self, together):
        if together[-1].kind == "pp":
            raise ArithmeticError("logits are not finite")
        return run_of(self, together)

    monkeypatch.setattr(Benchmark, "_run_of", broken)
    assert main(["bench", "-p", "8", "-n", "2", "-d", "0", "-b", *QUICK]) == 1
    out = capsys.readouterr().out
    assert "| pp8 | failed: logits are not finite |" in out
    assert "| tg2 " in out


def test_ctrl_c_keeps_the_rows_so_far(capsys, monkeypatch):
    run_of = Benchmark._run_of

    def interrupted(self, together):
        if together[-1].kind == "tg":
            raise KeyboardInterrupt
        return run_of(self, together)

    monkeypatch.setattr(Benchmark, "_run_of", interrupted)
    assert main(["bench", "-p", "8", "-n", "2", "-d", "0", "-b", *QUICK, "--json"]) == 130
    shown = capsys.readouterr()
    assert [row["test"] for row in json.loads(shown.out)["rows"]] == ["pp8"]
    assert "interrupted: the rows so far" in shown.err


def test_depths_of_the_default_rows_fit_a_short_context(capsys):
    assert main(["bench", "-p", "-b", "-n", "2", "--context", "20", *QUICK, "--json", "-q"]) == 0
    assert [row["test"] for row in json.loads(capsys.readouterr().out)["rows"]] == ["tg2", "tg2 @ d16"]
