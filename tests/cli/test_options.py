"""What can be known to be wrong before a model is loaded is refused before it is loaded, with exit code 2."""

import subprocess
import sys
from pathlib import Path

import jax
import pytest

import qwen3_moe_jax as q3
from qwen3_moe_jax import cli
from qwen3_moe_jax.cli import COMMANDS, main
from qwen3_moe_jax.core.exit_codes import MEANINGS, ExitCode

QUICK = ("--backend", "reference", "--no-gate", "-q")

BAD = [
    ("generate", "x", "--top-p", "1.5"),
    ("generate", "x", "--top-p", "nan"),
    ("generate", "x", "--temperature", "-1"),
    ("generate", "x", "--temp", "warm"),
    ("generate", "x", "--top-k", "-3"),
    ("generate", "x", "--min-p", "2"),
    ("generate", "x", "--repetition-penalty", "0"),
    ("generate", "x", "--presence-penalty", "1000"),
    ("generate", "x", "--seed", "-2"),
    ("generate", "x", "--seed", "4294967296"),
    ("generate", "x", "--stop", ""),
    ("generate", "x", "-n", "0"),
    ("generate", "x", "-n", "1_0"),
    ("generate", "x", "-n", "１"),
    ("generate", "x", "-n", "-1"),
    ("generate", "x", "-c", "1"),
    ("generate", "x", "-m", ""),
    ("generate", "x", "--adapter", ""),
    ("generate", "x", "--mesh", "3"),
    ("serve", "--mesh", "tp=0"),
    ("doctor", "--mesh", "tp=2,tp=2"),
    ("generate", "x", "--dtype", "float8"),
    ("generate", "x", "--system", "y"),
    ("generate", "x", "--prompt", "y"),
    ("generate", ""),
    ("generate",),
    ("generate", "\udcff"),
    ("chat", "--top-p", "0"),
    ("chat", "-n", "0"),
    ("chat", "--system", ""),
    ("perplexity", "FILE", "--stride", "0"),
    ("perplexity", "FILE", "--context", "3"),
    ("perplexity", ""),
    ("bench", "-r", "0"),
    ("bench", "--max-seconds", "inf"),
    ("bench", "-p", "-d", "-b"),
    ("convert", "", "out"),
    ("convert", "model.gguf", ""),
    ("inspect", "-m", ""),
    ("inspect", "a", "-m", "b"),
    ("verify", "--tokens", "0"),
    ("verify", "--receipt", "/no/such/folder/r.json"),
    ("verify", "--receipt", ""),
    ("trace", ""),
    ("trace", "x", "--layer", "-1"),
    ("trace", "x", "--layer", "6"),
    ("trace", "x", "--payload", "/no/such/folder/x.npz"),
    ("trace", "x", "--payload", "/tmp"),
    ("bisect", "no-such-trace.npz"),
    ("bisect", "--prompt", ""),
    ("experts", "x", "-o", "/no/such/folder/x.png"),
    ("trace", "x", "--payload", "-"),
    ("experts", "x", "-o", "x.xyz"),
    ("experts", "x", "-o", "x"),
    ("experts", "x", "--npz", "/no/such/folder/x.npz"),
    ("experts", ""),
    ("doctor", "--context", "0"),
    ("generate", "x", "-n", "99999999999999999999"),
    ("generate", "x", "-c", "99999999999999999999"),
    ("verify", "--clause", "NONSENSE-001"),
    ("verify", "--receipt", "9" * 300),
    ("trace", "x", "--payload", "9" * 300 + ".npz"),
    ("experts", "x", "--npz", "a\0b"),
]

BAD_OF_SERVE = [
    ("--cache-ram", "nan"),
    ("--cache-ram", "inf"),
    ("--cache-ram", "-1"),
    ("--step-ms", "nan"),
    ("--step-ms", "0"),
    ("--drain-timeout", "-1"),
    ("--drain-timeout", "inf"),
    ("--max-queue", "-1"),
    ("--max-queue-tokens", "-1"),
    ("--max-queue-tokens", "99999999999999999999"),
    ("--slots", "0"),
    ("--replicas", "0"),
    ("--replicas", "-1"),
    ("--replicas", "1.5"),
    ("--replicas", "65"),
    ("--replicas", "2", "--backend", "wgpu"),
    ("--context", "100000"),
    ("--port", "65536"),
    ("--host", ""),
    ("--host", "0.0.0.0"),
    ("--host", "::"),
    ("--name", ""),
    ("--name", "\udcff"),
    ("--allow-host", ""),
    ("--allow-origin", ""),
    ("--api-key-file", ""),
    ("--api-key-file", "/no/such/file"),
    ("--api-key-file", "/dev/null"),
    ("--api-key-file", "a\0b"),
    ("--api-key-file", "NOT-UTF-8"),
    ("one.gguf", "--model", "other.gguf"),
]


@pytest.mark.parametrize("args", BAD, ids=" ".join)
def test_a_bad_value_is_refused_before_the_load(args, no_load, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("word " * 2000)
    assert main([str(text) if word == "FILE" else word for word in args]) == ExitCode.USAGE
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("qwen3-moe: ")
    assert shown.err.count("\n") == 1


@pytest.mark.parametrize("args", BAD_OF_SERVE, ids=ascii)
def test_a_bad_value_of_serve_is_refused_before_the_load(args, monkeypatch, tmp_path, capsys):
    pytest.importorskip("llguidance", reason="an optional part")
    run = pytest.importorskip("qwen3_moe_jax.serve.run", reason="an optional part")
    monkeypatch.setattr(run.Server, "run", lambda self: pytest.fail("the model was loaded"))
    keys = tmp_path / "keys"
    keys.write_bytes(b"\xff\n")
    args = [str(keys) if word == "NOT-UTF-8" else word for word in args]
    assert main(["serve", "--port", "0", *args]) == ExitCode.USAGE
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("qwen3-moe: ")
    assert shown.err.count("\n") == 1


def test_a_context_that_the_model_does_not_have_is_a_wrong_option(capsys):
    for context in ("100000", "4097"):
        assert main(["generate", "x", "--context", context, *QUICK]) == ExitCode.USAGE
        assert "from 2 to 4096" in capsys.readouterr().err


def test_an_empty_name_is_refused_from_python_too():
    with pytest.raises(ValueError, match="empty"):
        q3.load("")


@pytest.mark.parametrize("number", ["-1", "-.5", "-1e-1", "-2E+0", "-2."])
def test_a_negative_number_is_a_value(number):
    """argparse itself takes -1e-1 for an option."""
    args = cli._parse(["generate", "x", "--presence-penalty", number])
    assert args.presence_penalty == float(number)


# Grammar


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (("genrate", "x"), "there is no command 'genrate'; did you mean generate?"),
        (("run",), "did you mean chat?"),
        (("qqqq",), "generate, chat, "),
        (("generate", "x", "--temprature", "1"), "--temprature 1; did you mean --temperature"),
        (("inspect", "--tensor"), "did you mean --tensors?"),
        (("generate", "x", "--max-tokens"), "--max-tokens expected one argument"),
        (
            ("generate", "-p", "-x"),
            "--prompt expected one argument; one that begins with - is given as --prompt=-",
        ),
        (("help",), "did you mean --help?"),
        (("version",), "did you mean --version?"),
        (("ls",), "did you mean models?"),
        (("--verson",), "did you mean --version?"),
    ],
)
def test_a_misspelt_word_gets_the_usage_of_its_command_and_a_guess(args, expected, capsys):
    assert main(list(args)) == ExitCode.USAGE
    usage, _, last = capsys.readouterr().err.splitlines()
    name = f"qwen3-moe {args[0]}" if args[0] in COMMANDS else "qwen3-moe"
    assert usage.startswith(f"usage: {name} [OPTIONS]")
    assert expected in last


def test_other_programs_names_of_options_are_known():
    parser, _ = cli._parser(["generate"])
    args = parser.parse_args(["generate", "-p", "x", "--temp", "0", "--ctx-size", "64", "-s", "3"])
    assert (args.prompt_option, args.temperature, args.context, args.seed) == ("x", 0, 64, 3)


def test_version_and_module():
    done = subprocess.run(
        [sys.executable, "-m", "qwen3_moe_jax", "--version"], capture_output=True, text=True, timeout=600
    )
    assert (done.returncode, done.stdout) == (0, f"qwen3-moe {q3.__version__}\n")


def test_help_has_each_exit_code(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for code, meaning in MEANINGS.items():
        assert f"{code.value}  {meaning}" in shown


def test_the_documents_have_each_exit_code():
    page = (Path(__file__).parents[2] / "docs/reference/exit-codes.md").read_text()
    assert "{{ exit_codes }}" in page  # a table of all meanings, made with the pages
    assert list(ExitCode) == list(MEANINGS)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("qwen3-moe gen", "generate"),
        ("qwen3-moe inspect --ten", "--tensors"),
        ("qwen3-moe generate --dt", "--dtype"),
    ],
)
def test_the_shell_is_told_what_may_follow(line, expected, tmp_path):
    """As argcomplete's own shell code asks."""
    answer = tmp_path / "answer"
    environment = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": ":".join(filter(None, sys.path)),
    }
    command = [sys.executable, "-m", "qwen3_moe_jax"]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=600)
    assert expected in answer.read_text().replace("\x0b", " ").split()


def test_transfers_that_jax_is_told_to_forbid_are_one_line(capsys):
    with jax.transfer_guard("disallow"):
        assert main(["generate", "--backend", "jax", "-n", "1", "x"]) == ExitCode.USAGE
    last = capsys.readouterr().err.splitlines()[-1]
    assert "JAX_TRANSFER_GUARD" in last
    assert "host-to-device" in last
