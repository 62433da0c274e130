"""How a model is split over devices, as a text: what ``--mesh`` and ``load(mesh=)`` take."""

import re

AUTO_MESH = "auto"
"""A mesh of as many devices as the model can be split over."""


def mesh_sizes(text: str) -> dict[str, int]:
    """The axes that ``tp=2,ep=1`` names, in any order, with their sizes.

    Raises:
      ValueError: the text is something else.
    """
    parts = text.split(",")
    pairs = dict(part.split("=") for part in parts if re.fullmatch(r"(ep|tp)=[1-9]\d{0,3}", part))
    if len(pairs) != len(parts):
        raise ValueError(f"mesh {text!r} is not such as tp=2,ep=1")
    return {name: int(number) for name, number in pairs.items()}
