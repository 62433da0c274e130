"""Which type every tensor of a random file has: llama.cpp's recipes, one type, or all of them in turn."""

from collections.abc import Iterator
from itertools import cycle

from qwen3_moe_jax.convert.config import Qwen3MoeConfig
from qwen3_moe_jax.convert.ggml_types import BLOCK_FORMATS, SUPPORTED_TYPES, GGMLType
from qwen3_moe_jax.convert.tensor_names import TensorSpec, q4_k_m_types, tensor_specs

_EXCEPTIONS = {
    "q2_k": (GGMLType.Q2_K, {"lm_head": GGMLType.Q6_K, "v_proj": GGMLType.Q4_K, "o_proj": GGMLType.Q3_K}),
    "q3_k_m": (
        GGMLType.Q3_K,
        {
            "lm_head": GGMLType.Q6_K,
            "v_proj": GGMLType.Q5_K,
            "o_proj": GGMLType.Q4_K,
            "down_proj": GGMLType.Q4_K,
        },
    ),
    "iq4_xs": (GGMLType.IQ4_XS, {"lm_head": GGMLType.Q6_K, "v_proj": GGMLType.Q5_K}),
}
"""The type of most matrices, and those of others by the last part of their path. As in files that llama.cpp
makes of a model with experts (``llama_tensor_get_type`` in ``src/llama-quant.cpp``), layers of more bits
taken for all layers."""


def mix_types(mix: str, config: Qwen3MoeConfig) -> dict[str, GGMLType]:
    """The type of every tensor, by path.

    Args:
      mix: ``"q4_k_m"``, ``"q2_k"``, ``"q3_k_m"``, ``"iq4_xs"`` (about as in files of these names),
        ``"all"`` (every supported type, in turn), or the name of one type for all matrices;
        ``"only_iq4_xs"`` and ``"only_q2_k"`` where a recipe has the type's name.
      config: sizes.

    Raises:
      ValueError: an unknown mix.
    """
    if mix == "q4_k_m":
        return q4_k_m_types(config)
    if mix in _EXCEPTIONS:
        return {spec.path: _of_recipe(spec, *_EXCEPTIONS[mix]) for spec in tensor_specs(config)}
    return _in_turn(SUPPORTED_TYPES if mix == "all" else (_one_type(mix),), config)


def _one_type(mix: str) -> GGMLType:
    name = mix.removeprefix("only_").upper()
    if name not in GGMLType.__members__:
        known = ", ".join(("q4_k_m", *_EXCEPTIONS, "all", *(t.name.lower() for t in SUPPORTED_TYPES)))
        raise ValueError(f"no mix {mix!r}: there are {known}")
    return GGMLType[name]


def _of_recipe(spec: TensorSpec, most: GGMLType, others: dict[str, GGMLType]) -> GGMLType:
    if len(spec.shape) == 1 or spec.path.endswith("mlp.router"):
        return GGMLType.F32
    wanted = others.get(spec.path.rsplit(".", 1)[-1], most)
    candidates = (wanted, GGMLType.IQ4_NL, GGMLType.F16)
    return next(t for t in candidates if _fits(t, spec))


def _in_turn(wanted: tuple[GGMLType, ...], config: Qwen3MoeConfig) -> dict[str, GGMLType]:
    turns: dict[tuple[GGMLType, ...], Iterator[GGMLType]] = {}
    types = {}
    for spec in tensor_specs(config):
        fitting = tuple(t for t in wanted if t in spec.types and _fits(t, spec)) or (GGMLType.F32,)
        types[spec.path] = next(turns.setdefault(fitting, cycle(fitting)))
    return types


def _fits(kind: GGMLType, spec: TensorSpec) -> bool:
    return spec.shape[-1] % BLOCK_FORMATS[kind].weights == 0
