"""Pictures: what they show, in every format, in any script, and without matplotlib."""

import json
import xml.etree.ElementTree as ET
from unittest.mock import Mock

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from qwen3_moe_jax.cli import main
from qwen3_moe_jax.commands import bench
from qwen3_moe_jax.core import pictures
from qwen3_moe_jax.core.errors import OutputFileError
from qwen3_moe_jax.core.exit_codes import ExitCode
from qwen3_moe_jax.inspection import heatmap
from qwen3_moe_jax.inspection.experts import ExpertUsage, difference
from qwen3_moe_jax.measure import plots
from qwen3_moe_jax.measure.benchmark import Row, Timing, Workload
from qwen3_moe_jax.measure.positions import Positions

QUICK = ("--backend", "reference", "--no-gate", "-q", "--context", "64")
MIXED = "def f(x): \u4f60\u597d, \u041f\u0440\u0438\u0432\u0435\u0442"


def usage(seed=0, text="def f(x):", shape=(4, 16), tokens=100) -> ExpertUsage:
    counts = np.random.default_rng(seed).multinomial(4 * tokens, np.full(shape[1], 1 / shape[1]), shape[0])
    return ExpertUsage(counts, tokens, 4, "Model", text)


@pytest.fixture
def without_matplotlib(monkeypatch):
    monkeypatch.setattr(pictures.importlib.util, "find_spec", lambda name: None)


def images(figure):
    return [axes.images[0] for axes in figure.axes if axes.images]


def test_every_picture_of_a_model_has_one_logarithmic_scale():
    one, two = usage(0, tokens=100), usage(1, tokens=3000)
    (alone,) = images(heatmap.draw(one))
    first, second, third = images(heatmap.draw(two, one))
    ends = [(image.norm.vmin, image.norm.vmax) for image in (alone, first, second)]
    assert ends == [(0.25 / heatmap.RANGE, 1)] * 3
    assert alone.norm(0.25) - alone.norm(0.125) == pytest.approx(alone.norm(0.5) - alone.norm(0.25))
    assert (third.norm.vmin, third.norm.vmax) == (-heatmap.OCTAVES, heatmap.OCTAVES)
    assert np.allclose(third.get_array(), difference(two, one))


def test_an_expert_that_was_never_used_is_grey():
    counts = usage().counts
    counts[1, 3] = 0
    (image,) = images(heatmap.draw(ExpertUsage(counts, 100, 4)))
    assert image.get_array().mask.sum() == 1
    assert image.get_array().mask[1, 3]
    assert image.cmap.get_bad() == pytest.approx(plt.matplotlib.colors.to_rgba(heatmap.UNUSED))


def test_the_difference_is_in_octaves_and_blank_where_neither_text_goes():
    a, b = (ExpertUsage(np.array([[40, 0, 0, 60]]) * k, 100 * k, 1) for k in (1, 10))
    b.counts[0] = [800, 200, 0, 0]
    found = difference(a, b)[0]
    assert found[0] == pytest.approx(1, abs=0.03)
    assert found[1] > 5
    assert np.isnan(found[2])
    assert found[3] < -9
    with pytest.raises(ValueError, match="compare texts of one model"):
        a.save_picture("x.png", usage())


def test_svg_keeps_text_of_any_script_as_text(tmp_path):
    path = tmp_path / "x.svg"
    usage(text=MIXED).save_picture(path)
    texts = "".join(ET.parse(path).getroot().itertext())
    assert MIXED in texts
    again = tmp_path / "y.svg"
    usage(text=MIXED).save_picture(again)
    assert path.read_bytes() == again.read_bytes()


def test_a_character_is_drawn_with_a_font_that_has_it_or_written_as_its_number(monkeypatch):
    """No boxes: fonts of this machine are asked for each character."""
    monkeypatch.setattr(pictures, "_others", lambda: (("Some Hanzi", frozenset({0x4F60})),))
    line, fonts = pictures.words(MIXED, 200)
    assert line == "def f(x): \u4f60<U+597D>, \u041f\u0440\u0438\u0432\u0435\u0442"
    assert fonts == ["DejaVu Sans", "Some Hanzi"]
    assert pictures.words("x" * 50, 10) == ("x" * 9 + "\u2026", ["DejaVu Sans"])


def test_fonts_of_boxes_are_no_fonts():
    assert not any(name.startswith("Last Resort") for name, _ in pictures._others())


def test_two_texts_by_the_command(tmp_path, capsys):
    png, npz = tmp_path / "e.png", tmp_path / "e.npz"
    assert (
        main(["experts", "x = 1", "--against", "def f(a):", "-o", str(png), "--npz", str(npz), *QUICK]) == 0
    )
    out = capsys.readouterr().out
    assert out.count("layer ") == 12
    assert "more than in the first text" in out
    with Image.open(png) as picture:
        assert picture.height > 1.5 * picture.width / 2
    with np.load(npz) as arrays:
        assert arrays["counts"].shape == arrays["against_counts"].shape
    assert main(["experts", "-", "--against", "-", *QUICK]) == ExitCode.USAGE
    assert "both texts are standard input" in capsys.readouterr().err


def test_without_matplotlib_each_command_says_so_before_it_loads(
    without_matplotlib, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qwen3_moe_jax.api.load", None)
    for command in (["experts", "x = 1"], ["bench"], ["perplexity", __file__]):
        assert main([*command, "-o", "x.png", *QUICK]) == ExitCode.FAULT
        assert capsys.readouterr().err == f"qwen3-moe: {pictures.INSTALL}\n"
    monkeypatch.undo()


def test_without_matplotlib_experts_still_tells(without_matplotlib, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["experts", "x = 1", *QUICK]) == 0
    assert pictures.INSTALL in capsys.readouterr().out
    assert usage()._repr_png_() is None
    assert not list(tmp_path.iterdir())


def row(kind, tokens, rate, depth=0, sequences=None, limit=None) -> Row:
    w = Workload(kind, tokens, depth, sequences)
    return Row(w, timing=Timing(1.0, (w.count * tokens / rate,)), limit=limit)


def test_a_benchmark_is_drawn_by_depth_and_by_batch_beside_the_limit():
    rows = [row("tg", 128, 90, 4096, limit=200), row("tg", 128, 100, limit=250), row("pp", 512, 1000)]
    rows += [row("tg", 128, 100.0 * b, 512, b, limit=150.0 * b) for b in (8, 1)]
    rows.append(Row(Workload("tg", 128, 512, 64), "does not fit", "no memory"))
    figure = plots.draw_bench(rows, title="Model", facts="2 cores")
    titles = {axes.get_title(loc="left") or axes.get_title(): axes for axes in figure.axes}
    assert list(titles) == ["reading one prompt", "writing, one sequence", "writing, many sequences"]
    rates, limit = titles["writing, one sequence"].lines
    assert np.allclose(rates.get_ydata(), [100, 90])
    assert np.allclose(limit.get_ydata(), [250, 200])
    assert len(titles["reading one prompt"].lines) == 1  # its limit is not known
    labels = [t.get_text() for t in titles["writing, many sequences"].get_xticklabels()]
    assert labels == ["1", "8"]


def test_perplexity_by_position_is_that_of_its_sums():
    positions = Positions.empty(64)
    loss = np.linspace(3, 1, 32)
    for start in (0, 64):
        positions.add(start + 32, start, -loss)
    found = positions.bins(maximum=4)
    assert [value for _, value, _ in found] == sorted((v for _, v, _ in found), reverse=True)
    total = sum(np.log(value) * width for (_, value, _), width in zip(found, _widths(found), strict=True))
    assert total == pytest.approx(loss.sum())
    assert positions.along == [(32, 64, pytest.approx(2)), (96, 128, pytest.approx(2))]
    assert Positions.empty(8).bins() == []


def _widths(found):
    """Of bins beside each other from 32 to 64, by their middles."""
    start, widths = 32, []
    for middle, _, _ in found:
        widths.append(round(2 * (middle - start) + 1))
        start += widths[-1]
    return widths


@pytest.mark.parametrize("options", [(), ("--stride", "16")])
def test_perplexity_draws(options, tmp_path, capsys):
    text, png = tmp_path / "t.txt", tmp_path / "p.png"
    text.write_text("def f(x):\n    return x + 1\n\n\n" * 12)
    options = (*QUICK[:-1], "32", *options)
    assert main(["perplexity", str(text), "-o", str(png), "--json", *options]) == 0
    assert json.loads(capsys.readouterr().out)["picture"] == str(png)
    assert png.read_bytes().startswith(b"\x89PNG")


def test_bench_draws_what_was_measured(tmp_path, monkeypatch, capsys):
    """Its rows are made up: measuring them is what ``test_bench_command`` does."""
    svg = tmp_path / "b.svg"
    rows = [row("tg", 2, 100.0), row("tg", 2, 90.0, 4)]
    monkeypatch.setattr(bench, "_measured", lambda *args, **options: [rows])
    monkeypatch.setattr(bench, "Benchmark", Mock())
    monkeypatch.setattr(bench, "_notes", lambda *args: [])
    assert main(["bench", "-p", "-d", "0", "4", "-n", "2", "-b", "-o", str(svg), *QUICK]) == 0
    assert f"picture: {svg}" in capsys.readouterr().out
    assert "writing, one sequence" in svg.read_text()


def test_a_picture_that_cannot_be_written_is_refused_first(tmp_path, capsys):
    assert main(["bench", "-o", f"{tmp_path}/missing/x.png"]) == ExitCode.USAGE
    assert f"no folder {tmp_path}/missing" in capsys.readouterr().err
    with pytest.raises(OutputFileError, match="must end with"):
        usage().save_picture("x.bmp")


def test_one_token_is_no_tokens_and_unused_experts_are_not_the_most_used(capsys):
    assert main(["experts", "x", "--backend", "reference", "--no-gate", "-q"]) == 0
    first, layer, *_ = capsys.readouterr().out.splitlines()
    assert first == "1 token, 4 of 16 experts per token"
    assert layer.count("(100%)") == 4
    assert "(0%)" not in layer
