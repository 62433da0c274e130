"""Pictures of expert use, one row per layer and one column per expert: of one text, or of two.

The scale is logarithmic and has the same ends in each picture of a model, so that any two can be compared:
from a 32nd of an even share to every token. An expert that no token chose is grey.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from qwen3_moe_jax.core.pictures import INK, PALE, words
from qwen3_moe_jax.inspection.experts import ExpertUsage, difference

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RANGE = 32
"""The scale begins at the even share divided by this."""

OCTAVES = 3
"""The difference of two texts is shown up to a factor of 2 to the power of this."""

UNUSED = "#dcdce0"
TEXT_CHARACTERS = 96


def draw(usage: ExpertUsage, against: ExpertUsage | None = None, *, kind: str = "png") -> "Figure":
    """The figure of one text, or of two on one scale with their difference.

    Args:
      usage: of the text.
      against: of another text, by the same model.
      kind: the format, for the fonts (``pictures.words``).
    """
    from matplotlib.figure import Figure

    panels = 1 if against is None else 3
    layers, experts = usage.counts.shape
    row = float(np.clip(5.5 / layers, 0.085, 0.24))
    width = float(np.clip(experts * 0.085 + 2.4, 9.0, 14.0))
    height = row * layers
    heads = 1.1 if against is None else 0.62
    figure = Figure(figsize=(width, 0.95 + panels * (height + heads) + 0.1), layout="constrained")
    axes = figure.subplots(panels, 1, squeeze=False)[:, 0]
    model = words(usage.model, 80, kind)
    figure.suptitle(f"Experts used by {model[0]}" if usage.model else "Experts used", x=0.012, ha="left",
                    fontsize=14, fontfamily=model[1])  # fmt: skip
    _share_panel(figure, axes[0], usage, kind, letter="" if against is None else "A")
    if against is not None:
        _share_panel(figure, axes[1], against, kind, letter="B")
        _difference_panel(figure, axes[2], usage, against)
    axes[-1].set_xlabel("expert (grey: no token chose it)")
    return figure


def _share_panel(figure: "Figure", axes: "Axes", usage: ExpertUsage, kind: str, letter: str = "") -> None:
    from matplotlib.colors import LogNorm

    share = np.ma.masked_equal(usage.share, 0)
    norm = LogNorm(usage.even_share / RANGE, 1)
    image = _cells(axes, share, cmap=_colours("viridis"), norm=norm)
    text, fonts = words(usage.text, TEXT_CHARACTERS, kind)
    title = f"{letter}: {usage.facts()}" if letter else usage.facts()
    axes.set_title(title + (f"\n{text}" if text else ""), fontfamily=fonts, fontsize=9, color=PALE)
    bar = figure.colorbar(image, ax=axes, extend="min", pad=0.01, aspect=18)
    _ticks(bar, usage.even_share)
    bar.set_label("share of the tokens")


def _ticks(bar: Any, even: float) -> None:
    """Shares in factors of 4, and the even one by its name."""
    ticks = [even / RANGE * 4**i for i in range(12) if even / RANGE * 4**i <= 1.0001]
    ticks = sorted({*ticks, even, 1.0})
    ticks = [t for t in ticks if t in (even, 1.0) or min(abs(np.log2(t / x)) for x in (even, 1.0)) > 0.7]
    bar.set_ticks(ticks, labels=[_percent(t, even) for t in ticks])
    bar.minorticks_off()
    bar.ax.axhline(even, color=INK, linewidth=1.2)


def _percent(share: float, even: float) -> str:
    text = f"{share:.0%}" if share >= 0.1 else f"{share:.1%}" if share >= 0.01 else f"{share:.2%}"
    return f"{text} even" if share == even else text


def _difference_panel(figure: "Figure", axes: "Axes", a: ExpertUsage, b: ExpertUsage) -> None:
    from matplotlib.colors import Normalize

    octaves = np.ma.masked_invalid(difference(a, b))
    image = _cells(axes, octaves, cmap=_colours("RdBu_r"), norm=Normalize(-OCTAVES, OCTAVES))
    axes.set_title("B beside A: how many times more often (red) or less often (blue)", fontsize=9, color=PALE)
    bar = figure.colorbar(image, ax=axes, extend="both", pad=0.01, aspect=18)
    marks = range(-OCTAVES, OCTAVES + 1)
    bar.set_ticks(list(marks), labels=[f"{2**m}x" if m >= 0 else f"1/{2**-m}" for m in marks])
    bar.set_label("share in B over share in A")


def _colours(name: str) -> Any:
    import matplotlib as mpl

    return mpl.colormaps[name].with_extremes(bad=UNUSED)


def _cells(axes: "Axes", values: Any, **options: Any) -> Any:
    layers, experts = values.shape
    image = axes.imshow(values, aspect="auto", interpolation="nearest", rasterized=True, **options)
    axes.set_ylabel("layer")
    axes.set_yticks(_tick_indices(layers, 12))
    axes.set_xticks(_tick_indices(experts, 17))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=2)
    if experts <= 40:  # gaps between cells that are large enough for them
        axes.set_xticks(np.arange(experts + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(layers + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=1)
        axes.tick_params(which="minor", length=0)
    return image


def _tick_indices(count: int, maximum: int) -> range:
    """Numbers for an axis: every, or every 2nd, 4th, ... one."""
    stride = 1
    while count > maximum * stride:
        stride *= 2
    return range(0, count, stride)
