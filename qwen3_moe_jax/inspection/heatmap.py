"""A heatmap of shares: one row per layer, one column per expert, drawn with Pillow."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from qwen3_moe_jax.convert.errors import printable

# Viridis at nine points (matplotlib's colour map, CC0): dark is rare, yellow is frequent.
_COLOURS = np.array(
    [
        (68, 1, 84),
        (71, 44, 122),
        (59, 81, 139),
        (44, 113, 142),
        (33, 144, 141),
        (39, 173, 129),
        (92, 200, 99),
        (170, 220, 50),
        (253, 231, 37),
    ],
    np.float64,
)

INK, PALE = (32, 32, 36), (110, 110, 118)
BACKGROUND = (255, 255, 255)

WIDTH, MIN_CELL, MAX_CELL = 1280, 6, 40
MARGIN_LEFT, MARGIN_TOP, MARGIN_RIGHT, MARGIN_BOTTOM = 84, 96, 190, 76
SCALE_WIDTH, SCALE_GAP = 18, 36


def colours(values: np.ndarray) -> np.ndarray:
    """Colours uint8 [..., 3] of values in 0..1."""
    place = np.clip(values, 0, 1) * (len(_COLOURS) - 1)
    low = np.minimum(place.astype(int), len(_COLOURS) - 2)
    part = (place - low)[..., None]
    return np.rint(_COLOURS[low] * (1 - part) + _COLOURS[low + 1] * part).astype(np.uint8)


def draw_heatmap(
    share: np.ndarray, *, even_share: float, title: str, facts: str, text: str = ""
) -> Image.Image:
    """The heatmap with axes, scale and title.

    Args:
      share: float64 [L, E], the share of the tokens that chose each expert.
      even_share: what every share would be if experts were chosen evenly; marked on the scale.
      title, facts: the first two lines.
      text: the beginning of what was read, for the third line.
    """
    layers, experts = share.shape
    cell = int(np.clip((WIDTH - MARGIN_LEFT - MARGIN_RIGHT) // experts, MIN_CELL, MAX_CELL))
    row = int(np.clip(cell, 12, 28))
    width, height = cell * experts, row * layers
    size = (MARGIN_LEFT + width + MARGIN_RIGHT, MARGIN_TOP + max(height, 140) + MARGIN_BOTTOM)
    size = (max(size[0], 760), size[1])
    image = Image.new("RGB", size, BACKGROUND)
    top = max(float(share.max()), 1e-9)
    cells = colours(share / top).repeat(row, axis=0).repeat(cell, axis=1)
    image.paste(Image.fromarray(cells), (MARGIN_LEFT, MARGIN_TOP))
    draw = ImageDraw.Draw(image)
    if cell >= 10:
        _grid(draw, layers, experts, cell, row)
    _titles(draw, title, facts, text)
    _axes(image, draw, layers, experts, cell, row)
    _scale(image, draw, MARGIN_LEFT + width + SCALE_GAP, max(height, 140), top, even_share)
    return image


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _grid(draw: ImageDraw.ImageDraw, layers: int, experts: int, cell: int, row: int) -> None:
    """Thin gaps between cells that are large enough for them."""
    right, bottom = MARGIN_LEFT + cell * experts, MARGIN_TOP + row * layers
    for e in range(experts + 1):
        x = MARGIN_LEFT + e * cell
        draw.line([(x, MARGIN_TOP), (x, bottom)], fill=BACKGROUND)
    for layer in range(layers + 1):
        y = MARGIN_TOP + layer * row
        draw.line([(MARGIN_LEFT, y), (right, y)], fill=BACKGROUND)


def _titles(draw: ImageDraw.ImageDraw, title: str, facts: str, text: str) -> None:
    draw.text((MARGIN_LEFT, 18), title, fill=INK, font=_font(22))
    draw.text((MARGIN_LEFT, 48), facts, fill=PALE, font=_font(14))
    if text:
        words = printable(" ".join(text.split()))
        shown = words if len(words) <= 90 else words[:89] + "\u2026"
        draw.text((MARGIN_LEFT, 68), f"text: {shown}", fill=PALE, font=_font(14))


def _axes(
    image: Image.Image, draw: ImageDraw.ImageDraw, layers: int, experts: int, cell: int, row: int
) -> None:
    """Numbers of layers and experts, as many as there is room for, and what they are."""
    font = _font(13)
    for layer in range(0, layers, max(1, -(-16 // row))):
        y = MARGIN_TOP + layer * row + row / 2
        draw.text((MARGIN_LEFT - 8, y), str(layer), fill=INK, font=font, anchor="rm")
    bottom = MARGIN_TOP + row * layers
    room = 28 if experts > 100 else 24
    step = next(s for s in (1, 2, 4, 8, 16, 32, 64) if s * cell >= room or s == 64)
    for expert in range(0, experts, step):
        x = MARGIN_LEFT + expert * cell + cell / 2
        draw.line([(x, bottom + 2), (x, bottom + 6)], fill=PALE)
        draw.text((x, bottom + 9), str(expert), fill=INK, font=font, anchor="ma")
    draw.text(
        (MARGIN_LEFT + experts * cell / 2, bottom + 32), "expert", fill=INK, font=_font(15), anchor="ma"
    )
    label = Image.new("RGBA", (60, 22), (255, 255, 255, 0))
    ImageDraw.Draw(label).text((30, 11), "layer", fill=INK, font=_font(15), anchor="mm")
    turned = label.rotate(90, expand=True)
    image.paste(turned, (18, int(MARGIN_TOP + row * layers / 2 - 30)), turned)


def _scale(
    image: Image.Image, draw: ImageDraw.ImageDraw, left: int, height: int, top: float, even_share: float
) -> None:
    """The colour scale: share of tokens, with a mark where an even use would be."""
    ramp = colours(np.linspace(1, 0, height))[:, None, :].repeat(SCALE_WIDTH, axis=1)
    image.paste(Image.fromarray(ramp), (left, MARGIN_TOP))
    font = _font(13)
    for part in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = MARGIN_TOP + (1 - part) * (height - 1)
        draw.line([(left + SCALE_WIDTH, y), (left + SCALE_WIDTH + 4, y)], fill=INK)
        draw.text((left + SCALE_WIDTH + 8, y), f"{part * top:.1%}", fill=INK, font=font, anchor="lm")
    y = MARGIN_TOP + (1 - min(even_share / top, 1)) * (height - 1)
    draw.line([(left - 6, y), (left + SCALE_WIDTH, y)], fill=INK, width=2)
    below = MARGIN_TOP + height + 10
    draw.text((left - 6, below), "share of tokens", fill=INK, font=font)
    draw.text((left - 6, below + 17), f"bar: even, {even_share:.1%}", fill=PALE, font=font)
