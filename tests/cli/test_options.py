"""What can be known to be wrong before a model is loaded is refused before it is loaded, with exit code 2."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import qwen3_moe_jax as q3
from qwen3_moe_jax import api, cli, loader
from qwen3_moe_jax.cli import COMMANDS, main
from qwen3_moe_jax.commands import common, generate
from qwen3_moe_jax.core.errors import OutputFileError
from qwen3_moe_jax.core.exit_codes import MEANINGS, ExitCode
from qwen3_moe_jax.core.output_file import open_output, save_arrays
from qwen3_moe_jax.inspection.experts import ExpertUsage
from qwen3_moe_jax.text.chat_template import RenderedChat

QUICK = ("--backend", "reference", "--no-gate", "-q")


@pytest.fixture
def no_load(monkeypatch):
    """A load is a failure of the test."""

    def load(*args, **options):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(api, "load", load)
    monkeypatch.setattr("qwen3_moe_jax.loader.make_runner", load)


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


# Files


def test_a_payload_has_the_name_that_was_given(tmp_path, capsys):
    path = tmp_path / "foo"
    assert main(["trace", "x = 1", "--stage", "l_out", "--payload", str(path), *QUICK]) == 0
    assert capsys.readouterr().out.endswith(f"arrays: {path}\n")
    assert [p.name for p in tmp_path.iterdir()] == ["foo"]
    with np.load(path) as arrays:
        assert "l_out-0" in arrays


@pytest.mark.parametrize("content", ["file in it", "a file"])
def test_convert_to_what_is_there_has_its_own_exit_code(tmp_path, capsys, content):
    """And not the code that means memory elsewhere; what is there stays."""
    target = tmp_path / "out"
    kept = target / "kept" if content == "file in it" else target
    kept.parent.mkdir(exist_ok=True)
    kept.write_bytes(b"mine")
    assert main(["convert", str(loader.embedded_model()), str(target), "-q"]) == ExitCode.NOT_EMPTY == 5
    line = capsys.readouterr().err
    assert line.startswith("qwen3-moe: convert: E_EXISTS: ")
    assert line.count("\n") == 1
    assert kept.read_bytes() == b"mine"


def test_a_deleted_working_folder_is_refused_before_the_load(tmp_path, monkeypatch):
    from qwen3_moe_jax.core.output_file import check_output

    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(OSError, match="^x.npz cannot be written: No such file or directory"):
        check_output("x.npz")
    assert check_output(tmp_path / "x.npz")


def test_a_full_disk_is_reported_for_each_file(capsys):
    assert main(["trace", "x = 1", "--stage", "l_out", "--payload", "/dev/full", *QUICK]) == ExitCode.OUTPUT
    expected = "qwen3-moe: /dev/full cannot be written: No space left on device\n"
    assert capsys.readouterr().err == expected
    assert main(["experts", "x = 1", "--json", "--npz", "/dev/full", *QUICK]) == ExitCode.OUTPUT
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".pdf", b"%PDF"), (".PNG", b"\x89PNG")])
def test_a_picture_is_what_its_name_says(suffix, start, tmp_path):
    usage = ExpertUsage(np.ones((2, 8), np.int64), 4, 4, "a\nb\x1b", "\udcff")
    usage.save_picture(tmp_path / f"x{suffix}")
    assert (tmp_path / f"x{suffix}").read_bytes().startswith(start)
    with pytest.raises(OutputFileError, match="must end with"):
        usage.save_picture(tmp_path / "x.bmp")


def test_json_writes_no_picture_unasked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["experts", "x = 1", "--json", *QUICK]) == 0
    assert json.loads(capsys.readouterr().out)["picture"] is None
    assert list(tmp_path.iterdir()) == []


def test_what_was_there_survives_a_failed_write(tmp_path):
    path = tmp_path / "kept"
    path.write_text("old")

    def broken(path):
        with open_output(path) as file:
            file.write(b"new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        broken(path)
    assert path.read_text() == "old"
    link = tmp_path / "link"
    link.symlink_to(path)
    save_arrays(link, a=np.zeros(1))
    assert link.is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kept", "link"]


# Sampling and figures


def test_a_seed_is_drawn_and_shown(capsys):
    ask = ["generate", "x =", "-n", "3", "--json", *QUICK]
    seeds = []
    for options in ([], ["--seed", "-1"], ["--seed", "random"]):
        assert main(ask + options) == 0
        seeds.append(json.loads(capsys.readouterr().out)["seed"])
    assert len(set(seeds)) == 3
    assert main([*ask[:-1], "--seed", "7"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["seed"] == 7
    assert "seed 7 " in shown.err


@pytest.fixture(scope="module")
def model():
    with q3.load(backend="reference", gate=False) as loaded:
        yield loaded


def test_temperature_0_is_the_same_in_python_and_in_the_command(model, capsys):
    assert main(["generate", "def fib(n):", "-n", "8", "--temperature", "0", *QUICK]) == 0
    assert capsys.readouterr().out == model.generate("def fib(n):", max_tokens=8, temperature=0) + "\n"
    assert model.sampling(temperature=0).repetition_penalty == 1.05
    first = model.answer("x =", max_tokens=4)
    assert model.answer("x =", max_tokens=4, seed=first.seed) == first
    with pytest.raises(TypeError):
        model.generate("x", temprature=1)
    with pytest.raises(ValueError, match="stop string"):
        model.open_stream("x", stop=[""])


def test_notes_of_the_chat_are_shown_once(model, monkeypatch, capsys):
    note = "this model's chat template has no thinking switch: the setting has no effect"
    prompt = lambda self, *args, **options: ([1, 2], RenderedChat("x", notes=(note,)))
    monkeypatch.setattr(api.Model, "prompt", prompt)
    assert model.answer([{"role": "user", "content": "x"}], max_tokens=1).notes == (note,)
    assert main(["generate", "x", "--chat", "--thinking", "on", "-n", "1", *QUICK]) == 0
    assert capsys.readouterr().err == f"note: {note}\n"


def test_rates_leave_compilation_out(monkeypatch):
    class Runner:
        name = "none"
        reused_tokens = 0

    times = iter([0.0, 12.0, 20.0])
    compiled = iter([0.0, 11.0, 15.0])
    monkeypatch.setattr(generate.time, "perf_counter", lambda: next(times))
    monkeypatch.setattr(generate, "compile_seconds", lambda runner: next(compiled))
    clock = generate.Clock(Runner())
    stream = SimpleNamespace(prompt_tokens=100, new_tokens=1)
    clock.tick(stream)
    stream.new_tokens = 9
    clock.tick(stream)
    clock.stop()
    found = clock.figures(stream)
    assert (found.prompt_tokens_per_s, found.tokens_per_s, found.compile_s) == (100.0, 2.0, 15.0)
    assert found.first_text_s == 12.0
    assert "compiled 15.0 s" in found.in_words("length")


# What generate is asked for beside text

TOOL = {"name": "weather", "parameters": {"type": "object", "properties": {}}}


def test_escapes_in_a_text_are_read():
    read = common.options.escaped
    assert read(r"a\nb\t\x41\u00e9\\n\d") == "a\nb\tAé\\n\\d"
    assert read("\\ud800") == "\\ud800"
    assert read("\\") == "\\"


def test_a_stop_string_may_be_a_line_end(capsys):
    assert main(["generate", "def f(x):", "--stop", r"\n", "-n", "40", "--json", "--temp", "0", *QUICK]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "\n" not in found["text"]
    assert (found["finish_reason"], found["new_tokens"] < 40) == ("stop", True)


def test_json_has_tokens_and_their_probabilities(model, capsys):
    ask = ["generate", "def f(x):", "-n", "4", "--json", "--logprobs", "--temp", "0"]
    assert main([*ask, "--repetition-penalty", "1", *QUICK]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["prompt_token_ids"] == model.tokenizer.encode("def f(x):")
    assert model.tokenizer.decode(found["token_ids"]) == found["text"]
    ids = found["prompt_token_ids"] + found["token_ids"]
    logits = model.logits(ids[:-1])[-4:].astype(float)
    expected = (
        logits.max(-1) - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) - logits.max(-1)
    )
    np.testing.assert_allclose(found["logprobs"], expected, rtol=0, atol=1e-4)


def test_control_tokens_of_a_plain_prompt_count_only_if_asked(model, capsys):
    control = next(t for t in model.tokenizer.control_tokens if t.startswith("<|"))
    counts = []
    for options in ([], ["--special"]):
        assert main(["generate", f"{control}x", "-n", "1", "--json", *options, *QUICK]) == 0
        counts.append(json.loads(capsys.readouterr().out)["prompt_tokens"])
    assert counts[1] == 2 < counts[0]


def test_an_answer_begins_as_it_is_told_to(model, tmp_path, capsys):
    (tmp_path / "tools.json").write_text(json.dumps({"tools": [TOOL]}))
    (tmp_path / "chat.jinja").write_text("{{ tools | length }}|{{ messages[0].content }}|")
    ask = ["generate", "hi", "--chat", "--prefill", "<|im_end|>So", "--json", "-n", "1", *QUICK]
    files = ["--tools", str(tmp_path / "tools.json"), "--chat-template-file", str(tmp_path / "chat.jinja")]
    assert main([*ask, *files]) == 0
    ids = json.loads(capsys.readouterr().out)["prompt_token_ids"]
    assert model.tokenizer.decode(ids) == "1|hi|<|im_end|>So"  # as text: decoding leaves control tokens out


def test_a_prefill_may_hold_the_thinking():
    opened = RenderedChat("a<think>\n")
    assert opened.starts_in_reasoning
    assert opened.with_prefill("Well").starts_in_reasoning
    assert not opened.with_prefill("Well</think>").starts_in_reasoning
    assert RenderedChat("a").with_prefill("<think>\nWell").starts_in_reasoning
    assert not RenderedChat("a").with_prefill("Well").starts_in_reasoning
    assert RenderedChat("a", (0,)).with_prefill("bc").inert == (0, 1, 2)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (("x", "--tools", "/no/such"), "--tools /no/such cannot be read"),
        (("x", "--chat", "--tools", "FILE"), "FILE has no list of function definitions"),
        (("x", "--chat-template-file", "FILE"), "add --chat"),
        (("x", "--chat", "--special"), "--special is for plain prompts"),
        (("x", "--logprobs"), "add it"),
    ],
)
def test_options_that_cannot_be_are_refused_before_the_load(args, expected, no_load, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("{}")
    assert main(["generate", *(str(file) if a == "FILE" else a for a in args)]) == ExitCode.USAGE
    assert expected.replace("FILE", str(file)) in capsys.readouterr().err
