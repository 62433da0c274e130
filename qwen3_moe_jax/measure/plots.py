"""Pictures of measurements: a benchmark's rates beside the machine's limit, perplexity by position."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from qwen3_moe_jax.core.pictures import ACCENT, PALE, words
from qwen3_moe_jax.measure.benchmark import MEASURED, Row
from qwen3_moe_jax.measure.perplexity import Perplexity
from qwen3_moe_jax.measure.positions import Positions

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LIMIT_COLOUR = "#b5532a"

Point = tuple[int, Row]


def panels_of(rows: Sequence[Row]) -> dict[str, list[Point]]:
    """The measured rows by the picture's parts: x and row, by x."""
    found: dict[str, list[Point]] = {"prompt": [], "depth": [], "batch": [], "batch prompt": []}
    for row in rows:
        w = row.workload
        if row.outcome != MEASURED:
            continue
        if w.sequences:
            found["batch" if w.kind == "tg" else "batch prompt"].append((w.sequences, row))
        elif w.kind == "tg":
            found["depth"].append((w.depth, row))
        else:
            found["prompt"].append((w.tokens, row))
    return {name: sorted(points, key=lambda p: p[0]) for name, points in found.items() if points}


TITLES = {
    "prompt": ("reading one prompt", "tokens of the prompt"),
    "depth": ("writing, one sequence", "tokens in the cache before"),
    "batch": ("writing, many sequences", "sequences"),
    "batch prompt": ("reading many prompts", "sequences"),
}


def draw_bench(rows: Sequence[Row], *, title: str, facts: str) -> "Figure":
    """Rates by length of the prompt, by depth and by batch; a dashed line is what the machine allows.

    Args:
      rows: those that were not measured are left out.
      title, facts: the model; machine and versions.
    """
    from matplotlib.figure import Figure

    panels = panels_of(rows)
    figure = Figure(figsize=(max(5.2, 3.9 * len(panels)), 4.1), layout="constrained")
    name, fonts = words(title, 90)
    figure.suptitle(name, x=0.012, ha="left", fontsize=13, fontfamily=fonts)
    for number, (kind, points) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), number + 1)
        _rates(axes, points)
        axes.set_title(TITLES[kind][0])
        axes.set_xlabel(TITLES[kind][1])
        if not number:
            axes.set_ylabel("tokens per second, all sequences")
    figure.supxlabel(words(facts, 160)[0], fontsize=8, color=PALE, x=0.012, ha="left")
    return figure


def _rates(axes: "Axes", points: list[Point]) -> None:
    """Best and median of every row at even distances, for depths begin at 0; limits where they are known."""
    xs = np.arange(len(points))
    best = [row.best or 0.0 for _, row in points]
    median = [row.median or 0.0 for _, row in points]
    limits = [row.limit for _, row in points]
    axes.vlines(xs, median, best, color=ACCENT, linewidth=4, alpha=0.35)
    axes.plot(xs, best, "o-", color=ACCENT, label="best run (bar: to the median)")
    for x, rate in zip(xs, best, strict=True):
        axes.annotate(_rate(rate), (x, rate), xytext=(0, -15), textcoords="offset points", ha="center",
                      fontsize=9)  # fmt: skip
    known = [limit for limit in limits if limit]
    if known:
        shown = [np.nan if limit is None else limit for limit in limits]
        axes.plot(xs, shown, "_--", color=LIMIT_COLOUR, markersize=16, label="what the machine allows")
    axes.set_yscale("log")
    low, high = min(best + median), max(best + known)
    axes.set_ylim(low / 2.2, high * 2.6)
    axes.set_xlim(-0.45, len(points) - 0.55)
    axes.set_xticks(xs, labels=[f"{x:,}" for x, _ in points])
    _plain_numbers(axes)
    axes.legend(loc="upper right", fontsize=8)


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def draw_perplexity(found: Perplexity, positions: Positions, *, title: str) -> "Figure":
    """Perplexity by position in the window with its standard error, and window by window along the text."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.4, 4.1), layout="constrained")
    name, fonts = words(title, 90)
    figure.suptitle(f"Perplexity {found.perplexity:.4g} \u00b1 {found.standard_error:.2g}: {name}", x=0.012,
                    ha="left", fontsize=13, fontfamily=fonts)  # fmt: skip
    left, right = figure.subplots(1, 2)
    _by_position(left, positions)
    _along(right, positions, found)
    return figure


def _by_position(axes: "Axes", positions: Positions) -> None:
    x, value, error = np.array(positions.bins()).reshape(-1, 3).T
    low = np.maximum(value - error, 1)
    axes.fill_between(x, low, value + error, color=ACCENT, alpha=0.2, linewidth=0, label="standard error")
    axes.plot(x, value, "o-", color=ACCENT, markersize=3.5)
    axes.set(title="by position in the window", xlabel="position", ylabel="perplexity", yscale="log")
    axes.set_xscale("log" if len(x) and x[-1] > 8 * max(x[0], 1) else "linear")
    _plain_numbers(axes)
    axes.legend(fontsize=8)


def _along(axes: "Axes", positions: Positions, found: Perplexity) -> None:
    starts, ends, loss = np.array(positions.along).reshape(-1, 3).T
    axes.hlines(np.exp(np.minimum(loss, 700)), starts, ends, color=ACCENT, linewidth=2.5)
    axes.axhline(found.perplexity, color=LIMIT_COLOUR, linestyle="--", label="of the whole text")
    axes.set(title="along the text, by window", xlabel="token of the text", yscale="log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    _plain_numbers(axes)
    axes.legend(fontsize=8)


def _plain_numbers(axes: "Axes") -> None:
    from matplotlib.ticker import LogLocator

    show = lambda value, _: f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
    axes.yaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
    axes.yaxis.set_major_formatter(show)
    axes.yaxis.set_minor_formatter(lambda value, _: "")
    axes.grid(axis="y", which="major")
    if axes.get_xscale() == "log":
        axes.xaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
        axes.xaxis.set_major_formatter(show)
        axes.xaxis.set_minor_formatter(lambda value, _: "")
