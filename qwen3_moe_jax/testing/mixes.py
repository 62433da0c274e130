"""Which type every tensor of a random file has: llama.cpp's recipes, one type, or many in turn.

A recipe is what llama.cpp makes of a model with more than eight experts, with an importance matrix, as
published files are made: ``llama_tensor_get_type_impl`` and ``tensor_type_fallback`` in
https://github.com/ggml-org/llama.cpp/blob/007dbbf3f/src/llama-quant.cpp
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle

from qwen3_moe_jax.convert.config import Qwen3MoeConfig
from qwen3_moe_jax.convert.ggml_types import BLOCK_FORMATS, SUPPORTED_TYPES, GGMLType
from qwen3_moe_jax.convert.tensor_names import TensorSpec, q4_k_m_types, tensor_specs, uses_more_bits

_T = GGMLType

Rule = GGMLType | Callable[[int, int], GGMLType | None]
"""A type, or what gives one (or None: the recipe's own) from the number of a layer and of all layers."""


@dataclass(frozen=True)
class Recipe:
    """A published mixture.

    Attributes:
      default: the type of tensors without a rule.
      rules: by the last part of a tensor's path.
      grouped: over ``rules`` where four or more query heads share a key.
      head: of the output matrix, and of an embedding that is the output too.
    """

    default: GGMLType
    rules: dict[str, Rule]
    grouped: dict[str, Rule]
    head: GGMLType = _T.Q6_K


def _early(kind: GGMLType, part: int = 8) -> Rule:
    """One type for the first eighth (or other part) of the layers."""
    return lambda layer, layers: kind if layer < layers // part else None


def _more_bits(layer: int, layers: int) -> GGMLType | None:
    return _T.Q6_K if uses_more_bits(layer, layers) else None


def _middle(kind: GGMLType) -> Rule:
    return lambda layer, layers: kind if layers // 8 <= layer < 7 * layers // 8 else None


def _few_bits(default: GGMLType, embed: GGMLType, early: GGMLType, o_proj: GGMLType) -> Recipe:
    """IQ1 and IQ2."""
    rules: dict[str, Rule] = {"embed_tokens": embed, "v_proj": _T.Q4_K, "o_proj": o_proj}
    return Recipe(default, rules | {"down_proj": _early(early)}, {}, _T.Q5_K)


_V4: dict[str, Rule] = {"v_proj": _T.Q4_K}
_V5: dict[str, Rule] = {"v_proj": _T.Q5_K}
_SOME_Q6: dict[str, Rule] = {"v_proj": _more_bits, "down_proj": _more_bits}

RECIPES: dict[str, Recipe] = {
    "q2_k": Recipe(_T.Q2_K, dict.fromkeys(("v_proj", "o_proj", "down_proj"), _T.Q3_K), _V4),
    "q2_k_s": Recipe(_T.Q2_K, {"down_proj": _early(_T.Q4_K)}, _V4),
    "q3_k_s": Recipe(_T.Q3_K, {}, {}),
    "q3_k_m": Recipe(
        _T.Q3_K,
        {
            "v_proj": lambda layer, layers: _T.Q5_K if layer < 2 else _T.Q4_K,
            "o_proj": _T.Q4_K,
            "down_proj": lambda layer, layers: _T.Q5_K if layer < layers // 16 else _T.Q4_K,
        },
        {},
    ),
    "q3_k_l": Recipe(_T.Q3_K, dict.fromkeys(("v_proj", "o_proj", "down_proj"), _T.Q5_K), {}),
    "q4_k_s": Recipe(
        _T.Q4_K,
        {"v_proj": lambda layer, layers: _T.Q5_K if layer < 4 else None, "down_proj": _early(_T.Q5_K)},
        {},
    ),
    "q5_k_s": Recipe(_T.Q5_K, {}, {}),
    "q5_k_m": Recipe(_T.Q5_K, _SOME_Q6, {}),
    "q6_k": Recipe(_T.Q6_K, {}, {}),
    "q8_0": Recipe(_T.Q8_0, {}, {}, _T.Q8_0),
    "iq4_xs": Recipe(_T.IQ4_XS, {}, _V5),
    "iq4_nl": Recipe(_T.IQ4_NL, {}, _V5),
    "iq3_m": Recipe(_T.IQ3_S, {**_V4, "o_proj": _T.Q4_K, "down_proj": _early(_T.Q4_K)}, {}),
    "iq3_s": Recipe(_T.IQ3_S, {}, _V4),
    "iq3_xs": Recipe(
        _T.IQ3_S,
        {
            **dict.fromkeys(("q_proj", "k_proj"), _T.IQ3_XXS),
            **dict.fromkeys(("gate_proj", "up_proj"), _middle(_T.IQ3_XXS)),
        },
        _V4,
    ),
    "iq3_xxs": Recipe(
        _T.IQ3_XXS,
        {"embed_tokens": _T.IQ3_S, "q_proj": _T.IQ2_S, "k_proj": _T.IQ2_S, "o_proj": _T.IQ3_S},
        _V4,
        _T.Q5_K,
    ),
    "iq2_m": _few_bits(_T.IQ2_S, _T.IQ3_S, _T.IQ3_S, _T.IQ3_S),
    "iq2_s": _few_bits(_T.IQ2_XS, _T.IQ3_S, _T.IQ3_S, _T.IQ3_S),
    "iq2_xs": _few_bits(_T.IQ2_XS, _T.Q2_K, _T.Q2_K, _T.IQ2_XS),
    "iq2_xxs": _few_bits(_T.IQ2_XXS, _T.Q2_K, _T.Q2_K, _T.IQ2_XXS),
    "iq1_m": _few_bits(_T.IQ1_M, _T.Q2_K, _T.Q2_K, _T.IQ2_XXS),
    "iq1_s": _few_bits(_T.IQ1_S, _T.Q2_K, _T.Q2_K, _T.IQ2_XXS),
    "tq1_0": Recipe(_T.TQ1_0, {"embed_tokens": _T.Q4_K}, {}),
    "tq2_0": Recipe(_T.TQ2_0, {"embed_tokens": _T.Q4_K}, {}),
    "mxfp4_moe": Recipe(_T.Q8_0, dict.fromkeys(("gate_proj", "up_proj", "down_proj"), _T.MXFP4), {}, _T.Q8_0),
}
"""By the name that a published file has, in lower case; Q4_K_M is in ``convert/tensor_names.py``."""

FEW_BITS: tuple[GGMLType, ...] = tuple(
    kind for kind, form in BLOCK_FORMATS.items() if 8 * form.nbytes < 4.5 * form.weights
)
"""The types below Q4_0."""

_FALLBACKS = {
    **dict.fromkeys((_T.Q2_K, _T.Q3_K, _T.TQ1_0, _T.TQ2_0), _T.Q4_0),
    _T.Q4_K: _T.Q5_0,
    _T.Q5_K: _T.Q5_1,
    _T.Q6_K: _T.Q8_0,
}
"""Where rows are no whole superblocks; IQ4_NL for all others."""


def mix_types(mix: str, config: Qwen3MoeConfig) -> dict[str, GGMLType]:
    """The type of every tensor, by path.

    Args:
      mix: in any case: ``"q4_k_m"`` or another of :data:`RECIPES`, ``"all"`` (every supported type,
        in turn), ``"few_bits"`` (those below Q4_0, in turn), ``"only_q2_k"`` and the like (one type
        for all matrices), or the name of a type that no recipe has, which means the same.
      config: sizes.

    Raises:
      ValueError: an unknown mix.
    """
    mix = mix.lower()
    if mix == "q4_k_m":
        return q4_k_m_types(config)
    if mix in RECIPES:
        return {spec.path: _of_recipe(spec, RECIPES[mix], config) for spec in tensor_specs(config)}
    many = {"all": SUPPORTED_TYPES, "few_bits": FEW_BITS}
    return _in_turn(many[mix] if mix in many else (_one_type(mix),), config)


def _one_type(mix: str) -> GGMLType:
    name = mix.removeprefix("only_").upper()
    if name not in GGMLType.__members__:
        known = dict.fromkeys(
            ("q4_k_m", *RECIPES, "all", "few_bits", *(t.name.lower() for t in SUPPORTED_TYPES))
        )
        raise ValueError(f"no mix {mix!r}: there are {', '.join(known)}; only_NAME is one type for all")
    return GGMLType[name]


def _of_recipe(spec: TensorSpec, recipe: Recipe, config: Qwen3MoeConfig) -> GGMLType:
    if len(spec.shape) == 1 or spec.path.endswith("mlp.router"):
        return GGMLType.F32
    wanted = _wanted(spec.path, recipe, config)
    candidates = (wanted, _FALLBACKS.get(wanted, GGMLType.IQ4_NL), GGMLType.F16)
    return next(t for t in candidates if _fits(t, spec))


def _wanted(path: str, recipe: Recipe, config: Qwen3MoeConfig) -> GGMLType:
    *above, leaf = path.split(".")
    if leaf == "lm_head" or (leaf == "embed_tokens" and config.tie_word_embeddings):
        return recipe.head
    is_grouped = config.num_attention_heads >= 4 * config.num_key_value_heads
    rules = recipe.rules | (recipe.grouped if is_grouped else {})
    rule = rules.get(leaf, recipe.default)
    if isinstance(rule, GGMLType):
        return rule
    return rule(int(above[1]), config.num_hidden_layers) or recipe.default


def _in_turn(wanted: tuple[GGMLType, ...], config: Qwen3MoeConfig) -> dict[str, GGMLType]:
    turns: dict[tuple[GGMLType, ...], Iterator[GGMLType]] = {}
    types = {}
    for spec in tensor_specs(config):
        fitting = tuple(t for t in wanted if t in spec.types and _fits(t, spec)) or (GGMLType.F32,)
        types[spec.path] = next(turns.setdefault(fitting, cycle(fitting)))
    return types


def _fits(kind: GGMLType, spec: TensorSpec) -> bool:
    return spec.shape[-1] % BLOCK_FORMATS[kind].weights == 0
