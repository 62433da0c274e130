"""Arrangements of packed arrays: the same bytes in the order that a backend reads them in.

``"rows"`` is the order of the file, see :mod:`qwen3_moe_jax.convert.packed`. ``"lanes16"`` is
for CPUs with vector units: sixteen rows side by side, so that one vector
instruction works on the same column of sixteen rows and no sum across a
vector's lanes is ever needed.

Arrays of ``"lanes16"`` for ``[..., N, K]``, from those of ``"rows"`` with C columns:

- one-byte arrays become uint32 ``[..., N/16, C/4, 16]``: each word holds four
  neighbouring bytes of one row, the first in its low byte;
- float16 arrays become float16 ``[..., N/16, C, 16]``.

No bit changes, the size stays, and :func:`to_layout` goes both ways.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.convert.packed import ARRAY_FORMATS, LANES, LANES16, ROWS, PackedTensor
from qwen3_moe_jax.convert.unpack import aligned_empty

LAYOUTS = (ROWS, LANES16)

LANES_TYPES = (
    GGMLType.Q4_K,
    GGMLType.Q5_K,
    GGMLType.Q6_K,
    GGMLType.Q8_0,
    GGMLType.Q2_K,
    GGMLType.Q3_K,
    GGMLType.IQ4_XS,
    GGMLType.IQ4_NL,
    GGMLType.Q4_0,
    GGMLType.Q4_1,
    GGMLType.Q5_0,
    GGMLType.Q5_1,
    GGMLType.MXFP4,
)
"""Types with products in this layout, see ``kernels_pallas/native``; others stay in rows."""

_PIECE_NBYTES = 1 << 22


def supports(layout: str, type: GGMLType, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of this type and logical shape has that layout."""
    if layout == ROWS:
        return True
    if layout != LANES16 or type not in LANES_TYPES or len(shape) < 2 or shape[-2] % LANES:
        return False
    arrays = ARRAY_FORMATS[type].values()
    return all(shape[-1] % (4 * a.weights) == 0 for a in arrays if np.dtype(a.dtype).itemsize == 1)


def to_layout(packed: PackedTensor, layout: str) -> PackedTensor:
    """Re-arranges a tensor's NumPy arrays; the same object if nothing changes.

    Raises:
      ValueError: the layout is unknown, or the tensor cannot have it (:func:`supports` tells).
    """
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}: there are {', '.join(LAYOUTS)}")
    if layout == packed.layout:
        return packed
    if not supports(layout, packed.type, packed.shape):
        raise ValueError(
            f"{packed!r} cannot have layout {layout!r}: it takes {LANES} quantized rows at a time, "
            f"of {', '.join(t.name for t in LANES_TYPES)}"
        )
    formats = ARRAY_FORMATS[packed.type]
    convert = _interleave if layout == LANES16 else _separate
    arrays = {k: convert(np.asarray(a), np.dtype(formats[k].dtype)) for k, a in packed.arrays.items()}
    return PackedTensor(arrays, packed.type, layout)


def _copy(out: np.ndarray, view: np.ndarray) -> None:
    """``out[...] = view``, the first axes of both spread over threads."""
    stride = max(1, _PIECE_NBYTES // max(1, view[:1].nbytes))
    starts = range(0, len(out), stride)

    def fill(start: int) -> None:
        out[start : start + stride] = view[start : start + stride]

    if len(starts) == 1:
        fill(0)
    else:
        with ThreadPoolExecutor() as pool:
            list(pool.map(fill, starts))


def _interleave(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Rows ``[..., N, C]`` of ``dtype`` to lanes."""
    *leading, rows, _ = array.shape
    elements = np.ascontiguousarray(array).view("<u4" if dtype.itemsize == 1 else dtype)
    elements = elements.reshape(-1, LANES, elements.shape[-1])
    out = aligned_empty((len(elements), elements.shape[-1], LANES), elements.dtype)
    _copy(out, elements.swapaxes(1, 2))
    return out.reshape(*leading, rows // LANES, *out.shape[1:])


def _separate(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Lanes to rows ``[..., N, C]`` of ``dtype``."""
    *leading, tiles, columns, lanes = array.shape
    elements = array.reshape(-1, columns, lanes)
    out = aligned_empty((len(elements), lanes, columns), array.dtype)
    _copy(out, elements.swapaxes(1, 2))
    return out.view(dtype).reshape(*leading, tiles * lanes, -1)
