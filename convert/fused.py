"""Tensors that hold several parameters: q, k and v in one, or gate and up of all experts.

``attn_qkv`` has the rows of q, then of k, then of v. ``ffn_gate_up_exps`` has for each expert the rows of
gate, then of up (``build_moe_ffn`` in ``src/llama-graph.cpp`` of llama.cpp at commit 007dbbf3f: "merged
gate_up path").
"""

import math
import re
from collections.abc import Mapping

from qwen3_moe_jax.convert.config import Qwen3MoeConfig
from qwen3_moe_jax.convert.errors import ModelFileError, quote
from qwen3_moe_jax.convert.ggml_types import KNOWN_TYPES
from qwen3_moe_jax.convert.gguf_header import TensorInfo

FUSED: dict[str, tuple[str, ...]] = {
    "attn_qkv": ("attn_q", "attn_k", "attn_v"),
    "ffn_gate_up_exps": ("ffn_gate_exps", "ffn_up_exps"),
}
"""Parts of the names of fused tensors, and those of the tensors that they stand for, in their order."""

_NAME = re.compile(rf"blk\.([0-9]+)\.({'|'.join(FUSED)})\.weight")


def part_shapes(name: str, c: Qwen3MoeConfig) -> list[tuple[int, ...]]:
    """Shapes of the parts of a fused tensor."""
    if name == "attn_qkv":
        heads = (c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads)
        return [(count * c.head_dim, c.hidden_size) for count in heads]
    return [(c.num_experts, c.moe_intermediate_size, c.hidden_size)] * 2


def with_parts(tensors: Mapping[str, TensorInfo], config: Qwen3MoeConfig) -> dict[str, TensorInfo]:
    """The tensors of a file, with the parts of fused ones in their place.

    A fused tensor beside one of its parts stays, so that the file is refused for it.

    Raises:
      ModelFileError: ``E_TENSOR`` for a fused tensor whose shape is not that of its parts together.
    """
    found: dict[str, TensorInfo] = {}
    for info in tensors.values():
        match = _NAME.fullmatch(info.name)
        names = [f"blk.{match[1]}.{part}.weight" for part in FUSED[match[2]]] if match else []
        if match is None or any(name in tensors for name in names):
            found[info.name] = info
        else:
            found |= _split(info, names, part_shapes(match[2], config))
    return found


def _split(info: TensorInfo, names: list[str], shapes: list[tuple[int, ...]]) -> dict[str, TensorInfo]:
    *leading, _, columns = shapes[0]
    rows = sum(shape[-2] for shape in shapes)
    if info.shape != (*leading, rows, columns):
        raise ModelFileError(
            "E_TENSOR",
            f"{quote(info.name)} has shape {list(info.shape)}; {' and '.join(names)} in one must be "
            f"{[*leading, rows, columns]}",
            name=info.name,
        )
    size = KNOWN_TYPES[info.type_id]
    row_nbytes = columns // size.weights * size.nbytes
    parts: dict[str, TensorInfo] = {}
    offset = info.offset
    for name, shape in zip(names, shapes, strict=True):
        run = shape[-2] * row_nbytes
        nbytes = math.prod(leading) * run
        gap = rows * row_nbytes - run
        parts[name] = TensorInfo(name, shape, info.type_id, nbytes, offset, info.shard, run, gap)
        offset += run
    return parts
