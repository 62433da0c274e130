"""``qwen3-moe generate``: sampling, figures, and all it is asked for beside text."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest

import qwen3_moe_jax as q3
from qwen3_moe_jax import api
from qwen3_moe_jax.cli import main
from qwen3_moe_jax.commands import common, generate
from qwen3_moe_jax.core.exit_codes import ExitCode
from qwen3_moe_jax.text.chat_template import RenderedChat
from qwen3_moe_jax.text.stream import TextStream

QUICK = ("--backend", "reference", "--no-gate", "-q")

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

    times = iter([0.0, 12.0, 13.0, 20.0])
    compiled = iter([0.0, 11.0, 11.0, 15.0])
    monkeypatch.setattr(generate.time, "perf_counter", lambda: next(times))
    monkeypatch.setattr(generate, "compile_seconds", lambda runner: next(compiled))
    clock = generate.Clock(Runner())
    stream = SimpleNamespace(prompt_tokens=100, new_tokens=9, drafts=None)
    clock.follow(stream)
    stream.on_first_token()
    clock.text()
    clock.text()
    clock.stop()
    found = clock.figures(stream)
    assert (found.prompt_tokens_per_s, found.tokens_per_s, found.compile_s) == (100.0, 2.0, 15.0)
    assert found.first_text_s == 13.0
    assert "compiled 15.0 s" in found.in_words("length")


def test_tokens_without_text_have_a_rate(monkeypatch, model):
    """Unused tokens of a vocabulary are written too: a file of random weights has thousands."""
    monkeypatch.setattr(model.tokenizer, "token_bytes", lambda token: b"")
    stream = TextStream(model.tokenizer, iter(range(5)), max_tokens=5, prompt_tokens=2)
    clock = generate.Clock(model.runner)
    assert not generate.written(stream, stream, clock, print, quiet=True)
    found = clock.figures(stream)
    assert (found.new_tokens, found.tokens_per_s is not None) == (5, True)


def test_prompt_lookup_gives_the_same_text_and_says_what_became_of_drafts(capsys, native):
    """In text and in JSON; without it nothing is said."""
    code = "def add(a, b):\n    return a + b\n\n" * 4
    asked = ["generate", code, "-n", "40", "--temperature", "0", "--no-gate"]
    assert main([*asked, "-q"]) == 0
    plain = capsys.readouterr().out
    assert main([*asked, "--prompt-lookup"]) == 0
    ours = capsys.readouterr()
    assert ours.out == plain
    assert re.search(r"; drafts: [1-9]\d* of [1-9]\d* tokens right; ", ours.err)
    assert main([*asked, "-q", "--json", "--prompt-lookup"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["text"] + "\n" == plain
    assert 0 < found["drafts"]["accepted"] <= found["drafts"]["drafted"]
    assert main([*asked, "-q", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["drafts"] is None


def test_prompt_lookup_is_refused_where_an_answer_could_change(capsys):
    asked = ["generate", "x", "--prompt-lookup", "--no-gate", "-q"]
    assert main([*asked, "--exact"]) == ExitCode.FAULT
    assert "prompt lookup cannot keep the answer's bits here" in capsys.readouterr().err
    assert main([*asked, "--backend", "reference"]) == ExitCode.FAULT
    assert "the reference backend has no prompt lookup" in capsys.readouterr().err
    assert main(["warm", "--prompt-lookup", "--slots", "2", "-q"]) == ExitCode.USAGE
    assert "leave out --slots" in capsys.readouterr().err


def test_many_prompts_take_no_prompt_lookup(model):
    with pytest.raises(ValueError, match="prompt_lookup is for one answer at a time"):
        model.generate_batch(["x"], prompt_lookup=True)
    assert model.generate_batch(["x"], max_tokens=1, temperature=0, prompt_lookup=False)


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
        (("x", "--chat", "--tools", "NAMELESS"), "NAMELESS: tools[0] needs a function with a name"),
        (("x", "--chat-template-file", "FILE"), "add --chat"),
        (("x", "--chat", "--special"), "--special is for plain prompts"),
        (("x", "--logprobs"), "add it"),
    ],
)
def test_options_that_cannot_be_are_refused_before_the_load(args, expected, no_load, tmp_path, capsys):
    files = {"FILE": tmp_path / "file", "NAMELESS": tmp_path / "nameless"}
    files["FILE"].write_text("{}")
    files["NAMELESS"].write_text('[{"type": "function"}]')
    assert main(["generate", *(str(files.get(a, a)) for a in args)]) == ExitCode.USAGE
    for name, file in files.items():
        expected = expected.replace(name, str(file))
    assert expected in capsys.readouterr().err
