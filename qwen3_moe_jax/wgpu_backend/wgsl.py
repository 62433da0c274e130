"""The text of the shaders: templates in ``shaders`` with their constants filled in."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from qwen3_moe_jax.convert.formats.iq4 import VALUES as IQ4_VALUES
from qwen3_moe_jax.convert.formats.mxfp4 import FP4_VALUES
from qwen3_moe_jax.wgpu_backend.layout import GRID_OFFSETS, WORD_FORMATS, reads_grids


@cache
def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "shaders"),
        line_statement_prefix="//%",
        line_comment_prefix="//#",
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # the output is WGSL
    )


def render(name: str, **constants: Any) -> str:
    """The WGSL source of ``shaders/<name>.wgsl`` with its constants filled in."""
    kinds = {type.name: layout.kind for type, layout in WORD_FORMATS.items()}
    units = {type.name: layout.unit for type, layout in WORD_FORMATS.items()}
    facts = {
        "KINDS": kinds,
        "UNITS": units,
        "IQ4": _words(IQ4_VALUES),
        "FP4": _words(FP4_VALUES),
        "GRIDS": GRID_OFFSETS,
    }
    names = [*constants.get("TYPES", ()), *([constants["TYPE"]] if "TYPE" in constants else ())]
    facts["READS_GRIDS"] = any(map(reads_grids, names))
    return _templates().get_template(f"{name}.wgsl").render(**facts, **constants)


def _words(values: Sequence[int]) -> list[str]:
    """Sixteen values of eight bits as four words of WGSL."""
    return [f"{word:#x}u" for word in np.array(values, np.int8).view("<u4").tolist()]
