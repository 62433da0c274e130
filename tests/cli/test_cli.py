"""The command line as a person meets it: real processes, right and wrong input."""

import json
import os
import signal
import subprocess
import sys

import pytest

from qwen3_moe_jax import loader
from qwen3_moe_jax.cli import COMMANDS

SECONDS = 600  # for hangs alone


def run(*args: str, text: str | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "qwen3_moe_jax.cli", *args],
        input=text,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


def fault(*args: str, code: int = 1) -> str:
    """The one line on standard error of a command that must fail."""
    done = run(*args)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("qwen3-moe: ") or code == 2
    return last


@pytest.mark.smoke
def test_generate_writes_text_with_the_embedded_model():
    prompt = 'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n'
    greedy = ("--temperature", "0", "--repetition-penalty", "1")
    done = run("generate", prompt, "-n", "16", *greedy, "--backend", "jax")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("    return FiedLess(self.n")  # what Transformers writes, tests/data
    assert "16 new tokens" in done.stderr
    assert "Tiny-Coder" in done.stderr
    assert "jax on cpu" in done.stderr.lower()
    assert "sampling: temperature 0" in done.stderr


def test_generate_json_is_the_only_output():
    done = run("generate", "-", "-n", "4", "--json", "--backend", "reference", "-q", text="import os\n")
    answer = json.loads(done.stdout)
    assert answer["new_tokens"] <= 4
    assert answer["finish_reason"] in ("stop", "length")
    assert done.stderr == ""


def test_chat_answers_each_line_and_ends_with_the_input():
    done = run(
        "chat",
        "-n",
        "8",
        "--backend",
        "reference",
        "--no-gate",
        "--thinking",
        "off",
        text="hi\n/reset\nagain\n",
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip().splitlines()) >= 1


def test_inspect_shows_config_types_and_metadata():
    report = json.loads(run("inspect", "--json").stdout)
    assert report["config"]["num_experts"] == 16
    assert report["types"] == {"Q4_K": 39, "F32": 31, "Q6_K": 5}
    assert report["metadata"]["general.architecture"] == "qwen3moe"
    listed = run("inspect", "--tensors").stdout
    assert "layers.5.mlp.experts.down_proj" in listed


def test_doctor_says_what_auto_means():
    done = run("doctor")
    assert "backend: auto is" in done.stdout
    assert "tensors (F32, Q4_K, Q6_K)" in done.stdout


def test_doctor_names_a_damaged_file(tmp_path):
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(loader.embedded_model().read_bytes()[:-1000])
    done = run("doctor", "-m", str(damaged))
    assert done.returncode == 1
    assert "PROBLEM  model" in done.stdout
    assert "-> download the file again" in done.stdout


def test_convert_then_generate_gives_the_same_text(tmp_path):
    out = tmp_path / "packed"
    converted = run("convert", str(loader.embedded_model()), str(out))
    assert converted.returncode == 0, converted.stderr
    ask = (
        "generate",
        "def fib(n):",
        "-n",
        "8",
        "--temperature",
        "0",
        "--backend",
        "reference",
        "--no-gate",
        "-q",
    )
    assert run(*ask, "-m", str(out)).stdout == run(*ask).stdout != ""


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (("generate", "x", "-m", "no-such-file.gguf"), "no-such-file.gguf"),
        (("generate", "x", "-m", __file__), "GGUF"),
        (("inspect", "no-such-file.gguf"), "no-such-file.gguf"),
        (
            ("generate", "x" * 400, "--context", "16", "--backend", "reference", "--no-gate"),
            "the context holds 16",
        ),
        (("generate", "x", "--backend", "reference", "--dtype", "bfloat16"), "float32 only"),
    ],
)
def test_bad_input_ends_in_one_clear_line(args, expected):
    assert expected in fault(*args)


def test_a_wrong_option_is_exit_code_2():
    assert "unrecognized arguments: --temprature" in fault("generate", "x", "--temprature", "1", code=2)
    assert run().returncode == 2


def test_ctrl_c_keeps_the_text_so_far():
    # a suite that runs in the background of a shell has SIGINT ignored, and children inherit that
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from qwen3_moe_jax.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    greedy = ("--temperature", "0", "--repetition-penalty", "1")
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", program, "generate", "import os\nimport sys\n", "-n", "3000", *greedy]
        + ["--backend", "reference", "--no-gate"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    first = process.stdout.read(4)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 130
    assert first
    assert rest.endswith("\n")
    assert "Traceback" not in errors


def test_help_of_every_command():
    for command in COMMANDS:
        shown = run(command, "--help")
        assert shown.returncode == 0, f"{command}: {shown.stderr}"
        assert "usage: qwen3-moe" in shown.stdout


def test_help_does_not_import_jax():
    code = "import sys; from qwen3_moe_jax.cli import main; main(['doctor', '--help'])"
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, env=dict(os.environ)
    )
    assert "jax._src" not in done.stderr
