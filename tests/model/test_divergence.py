"""KL divergence and agreement between two files of one model, by hand and through the command."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import qwen3_moe_jax as q3
from qwen3_moe_jax.cli import main
from qwen3_moe_jax.commands import against
from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.core.errors import MemoryPlanError, NumericalError
from qwen3_moe_jax.measure.divergence import StoredLogits, compare, divergences, runner_logits
from qwen3_moe_jax.measure.perplexity import cut_text
from qwen3_moe_jax.testing.random_models import SMALL, write_random_gguf

CONFIG = replace(SMALL, num_hidden_layers=1, max_position_embeddings=64)
TEXT = "the divergence of two files of one model, told token by token; " * 3
OPTIONS = ("--backend", "reference", "--no-gate", "--context", "32")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and one that differs in a matrix alone."""
    folder = tmp_path_factory.mktemp("two")
    for name, types in (("a", {}), ("b", {"layers.0.self_attn.o_proj": GGMLType.Q2_K})):
        write_random_gguf(folder / f"{name}.gguf", CONFIG, mix="only_q8_0", types=types, seed=2)
    return folder / "a.gguf", folder / "b.gguf"


def test_figures_are_those_of_the_definition():
    rng = np.random.default_rng(1)
    model, base = (rng.standard_normal((40, 50)).astype(np.float32) * 3 for _ in range(2))
    targets = rng.integers(0, 50, 40)
    powers = (np.exp(x.astype(np.float64)) for x in (base, model))
    p, q = (power / power.sum(-1, keepdims=True) for power in powers)
    kl, agrees, log_q, log_p = compare(model, base, targets)
    np.testing.assert_allclose(kl, (p * np.log(p / q)).sum(-1), rtol=1e-12)
    np.testing.assert_array_equal(agrees, p.argmax(-1) == q.argmax(-1))
    np.testing.assert_allclose(log_q, np.log(q[np.arange(40), targets]), rtol=1e-12)
    np.testing.assert_allclose(log_p, np.log(p[np.arange(40), targets]), rtol=1e-12)


def test_a_model_beside_itself_and_beside_another(files):
    with (
        q3.load(files[0], backend="reference", gate=False) as a,
        q3.load(files[1], backend="reference", gate=False) as b,
    ):
        same = a.divergence(a, TEXT, context=32)
        assert (same.kl, same.kl_max, same.top_1) == (0.0, 0.0, 1.0)
        plain = a.perplexity(TEXT, context=32)
        assert same.tokens_scored == plain.tokens_scored
        assert same.perplexity == pytest.approx(plain.perplexity, rel=1e-6)
        found = b.divergence(a, TEXT, context=32, stride=16)
        assert found.is_complete
        assert 0 < found.kl_median <= found.kl_99 <= found.kl_max
        assert math.isfinite(found.kl_error)
        assert found.perplexity != found.base_perplexity
        cut = cut_text(a.runner.max_context, a.tokenizer, TEXT, 32, 16)
        of_a, of_b = runner_logits(a.runner, cut), runner_logits(b.runner, cut)
        with StoredLogits(cut, a.config.vocab_size) as stored:
            for number, window in enumerate(cut.windows):
                stored.keep(number, of_a(number, window))
            *_, again = divergences(cut, of_b, stored.of)
        assert replace(again, seconds=found.seconds) == found


def test_logits_that_are_not_finite_are_an_error(files):
    with q3.load(files[0], backend="reference", gate=False) as a:
        cut = cut_text(a.runner.max_context, a.tokenizer, TEXT, 32, None)

        class Broken:
            name = "broken"

            def forward(self, ids):
                return type("F", (), {"logits": np.full((len(ids), 272), np.nan, np.float32)})

        with pytest.raises(NumericalError, match="broken backend's logits are not finite in the window"):
            runner_logits(Broken(), cut)(0, cut.windows[0])


@pytest.mark.parametrize("memory_has_room", [True, False])
def test_the_command(files, tmp_path, capsys, monkeypatch, memory_has_room):
    (tmp_path / "text.txt").write_text(TEXT)
    load, loaded = against.load_model, []

    def one_at_a_time(args, **options):
        loaded.append(Path(args.model).name)
        if loaded == ["a.gguf", "b.gguf"]:
            raise MemoryPlanError("no room for both")
        return load(args, **options)

    if not memory_has_room:
        monkeypatch.setattr(against, "load_model", one_at_a_time)
    command = ["perplexity", str(tmp_path / "text.txt"), "-m", str(files[1]), "--against", str(files[0])]
    assert main([*command, *OPTIONS, "--json", "-q"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["held_together"] is memory_has_room
    assert found["base"]["model"] == str(files[0])
    assert found["model"] == str(files[1])
    assert found["complete"]
    assert 0 < found["kl"] < 1


def test_the_command_in_words_and_what_it_refuses(files, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    command = ["perplexity", str(tmp_path / "text.txt"), "-m", str(files[1]), *OPTIONS]
    assert main([*command, "--against", str(files[1]), "-q"]) == 0
    out = capsys.readouterr().out
    assert "KL divergence 0.000000 +- 0.000000 nats per token\nthe likeliest token agrees in 100.00" in out
    write_random_gguf(tmp_path / "wide.gguf", replace(CONFIG, vocab_size=300), mix="only_q8_0")
    assert main([*command, "--against", str(tmp_path / "wide.gguf"), "-q"]) == 1
    assert "wide.gguf has another vocabulary" in capsys.readouterr().err
    assert main([*command, "--against", str(files[0]), "--picture", str(tmp_path / "p.png")]) == 2
    assert "leave out --against" in capsys.readouterr().err
