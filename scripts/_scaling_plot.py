"""The picture of ``docs/reference/scaling.md``: tokens per second over GPUs, a panel per work, as SVG."""

import math
from collections.abc import Iterable, Iterator
from html import escape

WIDTH, HEIGHT = 960, 400
LEFT, TOP, BOTTOM, GAP = 60, 62, 76, 58
GPUS = (1, 2, 4, 8, 16, 32)
COLOURS = ("#2563eb", "#c2410c", "#15803d")
"""Of the models, dark enough for text on white."""
TITLES = {
    "decode 1": "decode, 1 sequence",
    "decode 64": "decode, 64 sequences",
    "prompt": "prompt of 2,048 tokens",
}


def svg(cells: Iterable[dict], works: list[str], measured: Iterable[dict]) -> str:
    """The picture.

    Args:
      cells: rows of the model: "model", "link", "hosts", "gpus" of each, and a rate for each work.
      works: the panels.
      measured: points that were measured: "model", "work", "gpus", "rate".
    """
    rows = [cell for cell in cells if cell["link"] == "NVLink 4"]
    models = list(dict.fromkeys(cell["model"] for cell in rows))
    points, parts = list(measured), list(_frame(models))
    width = (WIDTH - LEFT - 20 - GAP * (len(works) - 1)) / len(works)
    for i, work in enumerate(works):
        rates = [cell[work] for cell in rows if work in cell]
        rates += [point["rate"] for point in points if point["work"] == work]
        panel = _Panel(LEFT + i * (width + GAP), width, min(rates), max(rates))
        parts += panel.axes(TITLES[work])
        for model, colour in zip(models, COLOURS, strict=True):
            for hosts in (1, 4):
                at = [
                    (hosts * c["gpus"], c[work])
                    for c in rows
                    if (c["model"], c["hosts"]) == (model, hosts) and work in c
                ]
                parts.append(panel.line(at, colour, dashed=hosts > 1))
            own = [p for p in points if (p["model"], p["work"]) == (model, work)]
            parts += [panel.ring(p["gpus"], p["rate"], colour) for p in own]
    return "\n".join([*parts, "</svg>\n"])


def _frame(models: list[str]) -> Iterator[str]:
    """What comes before the panels: the background, and what lines and rings mean."""
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="12">'
    )
    yield "<title>Tokens per second over GPUs: a model, with what was measured</title>"
    yield f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>'
    x = LEFT
    for model, colour in zip(models, COLOURS, strict=True):
        yield f'<rect x="{x}" y="14" width="18" height="4" fill="{colour}"/>'
        yield _text(x + 24, 20, model, colour, "start")
        x += 190
    yield _text(x + 14, 20, "line: one host; dashes: four hosts; ring: measured", "#374151", "start")
    yield _text(WIDTH / 2, HEIGHT - 12, "GPUs (a model, no measurement but for the rings)", "#374151")


def _text(
    x: float, y: float, words: str, colour: str = "#374151", anchor: str = "middle", more: str = ""
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}"{more}>{escape(words)}</text>'
    )


class _Panel:
    """One kind of work, both axes by powers."""

    def __init__(self, left: float, width: float, smallest: float, largest: float):
        self.left, self.width = left, width
        self.low, self.high = math.log10(smallest) - 0.1, math.log10(largest) + 0.1

    def x(self, gpus: float) -> float:
        return self.left + self.width * (math.log2(gpus) / math.log2(GPUS[-1]))

    def y(self, rate: float) -> float:
        share = (math.log10(rate) - self.low) / (self.high - self.low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def axes(self, title: str) -> Iterator[str]:
        bottom = HEIGHT - BOTTOM
        yield _text(
            self.left + self.width / 2, TOP - 12, f"{title}, tokens/s", "#111827", more=' font-weight="600"'
        )
        for gpus in GPUS:
            x = self.x(gpus)
            yield f'<line x1="{x:.1f}" y1="{bottom}" x2="{x:.1f}" y2="{bottom + 5}" stroke="#374151"/>'
            yield _text(x, bottom + 19, str(gpus))
        for rate in self.ticks():
            y = self.y(rate)
            yield (
                f'<line x1="{self.left:.1f}" y1="{y:.1f}" x2="{self.left + self.width:.1f}" y2="{y:.1f}" '
                f'stroke="#e5e7eb"/>'
            )
            yield _text(self.left - 6, y + 4, f"{rate:,.0f}", anchor="end")
        yield (
            f'<line x1="{self.left:.1f}" y1="{bottom}" x2="{self.left + self.width:.1f}" y2="{bottom}" '
            f'stroke="#374151"/>'
        )

    def ticks(self) -> list[float]:
        """1, 2 and 5 of each power of ten inside."""
        powers = range(math.floor(self.low), math.ceil(self.high) + 1)
        found = [step * 10.0**power for power in powers for step in (1, 2, 5)]
        return [rate for rate in found if self.low <= math.log10(rate) <= self.high]

    def line(self, at: list[tuple[int, float]], colour: str, *, dashed: bool) -> str:
        places = [(self.x(gpus), self.y(rate)) for gpus, rate in at]
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in places)
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>{dots}'

    def ring(self, gpus: int, rate: float, colour: str) -> str:
        place = f'cx="{self.x(gpus):.1f}" cy="{self.y(rate):.1f}"'
        return f'<circle {place} r="6" fill="none" stroke="{colour}" stroke-width="2"/>'
