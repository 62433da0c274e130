"""What the header of a model file tells is refused before its weights are read: prompts, templates, texts."""

import json
import time

import pytest

import qwen3_moe_jax as q3
from qwen3_moe_jax import loader
from qwen3_moe_jax.cli import main
from qwen3_moe_jax.convert.errors import ModelFileError
from qwen3_moe_jax.core.errors import ContextOverflowError
from qwen3_moe_jax.core.exit_codes import ExitCode
from qwen3_moe_jax.testing.random_models import SMALL as RANDOM
from qwen3_moe_jax.testing.random_models import write_random_gguf

QUICK = ("--backend", "reference", "--no-gate", "-q")
LONG = "def f(x): return x\n" * 40
"""More tokens than SMALL."""
SMALL = ("-c", "64")

BROKEN = "{% for m in messages %}{{ m.content }"
REFUSES = "{{ raise_exception('no users') }}"
ENDLESS = "{% for i in range(99999999) %}{% for j in range(99999999) %}{% endfor %}{% endfor %}"
HUGE = "{{ 'x' * 2000000 }}"


@pytest.fixture
def no_weights(monkeypatch):
    """A backend that is made is a failure of the test."""

    def make(*args):
        raise AssertionError("the weights were read")

    monkeypatch.setattr(loader, "_MAKERS", dict.fromkeys(loader.BACKENDS, make))


def said(capsys, *args: str) -> str:
    """The one line of a command that ends with a fault."""
    assert main(list(args)) not in (ExitCode.DONE, ExitCode.INTERRUPTED)
    shown = capsys.readouterr()
    assert not shown.out
    (line,) = shown.err.splitlines()
    return line


@pytest.mark.parametrize(
    "args",
    [
        ("generate", LONG),
        ("generate", LONG, "--chat"),
        ("generate", "x", "--prefill", LONG),
        ("generate", "x", "--chat", "--system", LONG),
        ("chat", "--system", LONG),
        ("trace", LONG),
    ],
)
def test_a_prompt_longer_than_the_context(no_weights, capsys, args):
    line = said(capsys, *args, *SMALL, *QUICK)
    assert "tokens" in line
    assert "64" in line


@pytest.mark.parametrize("template", [BROKEN, REFUSES, ENDLESS, HUGE])
@pytest.mark.parametrize("args", [("generate", "x", "--chat"), ("chat",)])
def test_a_template_that_cannot_be_rendered(no_weights, capsys, tmp_path, args, template):
    file = tmp_path / "t.jinja"
    file.write_text(template)
    assert "chat template" in said(capsys, *args, "--chat-template-file", str(file), *QUICK)


def test_a_saved_conversation_that_the_template_refuses(no_weights, capsys, tmp_path):
    template, saved = tmp_path / "t.jinja", tmp_path / "c.json"
    template.write_text("{% if messages | length > 1 %}{{ raise_exception('one only') }}{% endif %}x")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    saved.write_text(json.dumps(turns))
    line = said(capsys, "chat", "--load", str(saved), "--chat-template-file", str(template), *QUICK)
    assert "one only" in line


@pytest.mark.parametrize("options", [(), ("--context", "64"), ("--against", "EMBEDDED")])
def test_a_text_that_is_too_short(no_weights, capsys, tmp_path, options):
    file = tmp_path / "t.txt"
    file.write_text("import" if not options else "import " * 20)
    options = [str(loader.embedded_model()) if o == "EMBEDDED" else o for o in options]
    assert "tokens" in said(capsys, "perplexity", str(file), *options, *QUICK)


def test_another_vocabulary(no_weights, capsys, tmp_path):
    write_random_gguf(tmp_path / "other.gguf", RANDOM, mix="only_q8_0")
    (tmp_path / "t.txt").write_text("import os\n" * 80)
    against = ("--against", str(tmp_path / "other.gguf"), "--context", "64")
    assert "other.gguf has another vocabulary" in said(
        capsys, "perplexity", str(tmp_path / "t.txt"), *against, *QUICK
    )


def test_from_python_what_is_raised_ends_the_load(no_weights):
    lengths = []

    def check(opened):
        lengths.append((opened.max_context, len(opened.tokenizer.encode("def")), opened.source.nbytes > 0))
        opened.check("short")
        opened.check(LONG)

    with pytest.raises(ContextOverflowError, match="64"):
        q3.load(backend="reference", max_context=64, gate=False, before_weights=check)
    assert lengths == [(64, 1, True)]


def test_a_vocabulary_that_cannot_be_used_ends_the_load_while_it_runs(monkeypatch):
    def built(*args, **options):
        raise ModelFileError("E_TOKENIZER", "no token", name="tokenizer.ggml.tokens")

    def make(source, backend, *, progress, **options):
        for _ in range(6000):
            progress(1, 2)
            time.sleep(0.01)
        raise AssertionError("all of the weights were read")

    monkeypatch.setattr("qwen3_moe_jax.api.Tokenizer.built", built)
    monkeypatch.setattr(loader, "make_runner", make)
    with pytest.raises(ModelFileError, match="no token"):
        q3.load(backend="reference", gate=False)


def test_a_prompt_that_just_fits_is_loaded():
    with q3.load(backend="reference", gate=False) as model:
        tokens = len(model.tokenizer.encode("x = 1"))
    q3.load(
        backend="reference", gate=False, max_context=tokens + 1, before_weights=lambda o: o.check("x = 1")
    ).close()
    with pytest.raises(ContextOverflowError):
        q3.load(
            backend="reference", gate=False, max_context=tokens, before_weights=lambda o: o.check("x = 1")
        )
