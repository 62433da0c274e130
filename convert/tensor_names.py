"""The one table of tensors: parameter path, GGUF name, shape and allowed types.

Everything that goes from a file's names to the model's goes through
:func:`tensor_specs`; :func:`check_tensors` holds a file against it and names
what is missing, extra or misshapen before any weight is read.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from qwen3_moe_jax.convert.config import Qwen3MoeConfig
from qwen3_moe_jax.convert.errors import ModelFileError, printable, quote
from qwen3_moe_jax.convert.fused import with_parts
from qwen3_moe_jax.convert.ggml_types import BLOCK_FORMATS, SUPPORTED_TYPES, GGMLType
from qwen3_moe_jax.convert.gguf_file import GGUFFile, TensorInfo

NORM_TYPES: tuple[GGMLType, ...] = (GGMLType.F32, GGMLType.F16, GGMLType.BF16)
MATRIX_TYPES: tuple[GGMLType, ...] = SUPPORTED_TYPES

_NAMED_IN_A_MESSAGE = 4
_UNSUPPORTED_PARTS = {
    "attn_qkv": "stands beside one of attn_q, attn_k and attn_v, which it holds; convert the model again",
    "ffn_gate_up_exps": "stands beside ffn_gate_exps or ffn_up_exps, which it holds; convert the model again",
    "bias": "Qwen3-MoE has no biases, and ignoring one would change the result",
    "scale": "separate scale tensors are not supported, and ignoring one would change the result",
    "input_scale": "separate scale tensors are not supported, and ignoring one would change the result",
}


@dataclass(frozen=True)
class TensorSpec:
    """One tensor that a model must have.

    Attributes:
      path: parameter path of the model, for example ``layers.0.self_attn.q_proj``.
      gguf_name: its name in a GGUF file, for example ``blk.0.attn_q.weight``.
      shape: C order: ``[out, in]`` = [N, K] of a matrix, [E, N, K] of an expert
        stack, [n] of a norm.
      types: the types that its weights may have.
    """

    path: str
    gguf_name: str
    shape: tuple[int, ...]
    types: tuple[GGMLType, ...]


_Shape = Callable[[Qwen3MoeConfig], tuple[int, ...]]


def _q_size(c: Qwen3MoeConfig) -> int:
    return c.num_attention_heads * c.head_dim


def _kv_size(c: Qwen3MoeConfig) -> int:
    return c.num_key_value_heads * c.head_dim


# Path, GGUF name, shape. "{i}" is the layer.
_MODEL_TENSORS: tuple[tuple[str, str, _Shape], ...] = (
    ("embed_tokens", "token_embd.weight", lambda c: (c.vocab_size, c.hidden_size)),
    ("norm", "output_norm.weight", lambda c: (c.hidden_size,)),
    ("lm_head", "output.weight", lambda c: (c.vocab_size, c.hidden_size)),
)
_LAYER_TENSORS: tuple[tuple[str, str, _Shape], ...] = (
    ("input_layernorm", "attn_norm", lambda c: (c.hidden_size,)),
    ("self_attn.q_proj", "attn_q", lambda c: (_q_size(c), c.hidden_size)),
    ("self_attn.k_proj", "attn_k", lambda c: (_kv_size(c), c.hidden_size)),
    ("self_attn.v_proj", "attn_v", lambda c: (_kv_size(c), c.hidden_size)),
    ("self_attn.o_proj", "attn_output", lambda c: (c.hidden_size, _q_size(c))),
    ("self_attn.q_norm", "attn_q_norm", lambda c: (c.head_dim,)),
    ("self_attn.k_norm", "attn_k_norm", lambda c: (c.head_dim,)),
    ("post_attention_layernorm", "ffn_norm", lambda c: (c.hidden_size,)),
    ("mlp.router", "ffn_gate_inp", lambda c: (c.num_experts, c.hidden_size)),
    (
        "mlp.experts.gate_proj",
        "ffn_gate_exps",
        lambda c: (c.num_experts, c.moe_intermediate_size, c.hidden_size),
    ),
    (
        "mlp.experts.up_proj",
        "ffn_up_exps",
        lambda c: (c.num_experts, c.moe_intermediate_size, c.hidden_size),
    ),
    (
        "mlp.experts.down_proj",
        "ffn_down_exps",
        lambda c: (c.num_experts, c.hidden_size, c.moe_intermediate_size),
    ),
)


def tensor_specs(config: Qwen3MoeConfig) -> list[TensorSpec]:
    """Every tensor of a model with this config, in the order of the forward pass.

    ``lm_head`` is absent where the output is tied to the embedding.
    """
    embed, norm, lm_head = (_spec(row, config) for row in _MODEL_TENSORS)
    layers = [
        _spec((f"layers.{i}.{path}", f"blk.{i}.{name}.weight", shape), config)
        for i in range(config.num_hidden_layers)
        for path, name, shape in _LAYER_TENSORS
    ]
    return [embed, *layers, norm] + ([] if config.tie_word_embeddings else [lm_head])


def _spec(row: tuple[str, str, _Shape], config: Qwen3MoeConfig) -> TensorSpec:
    path, name, shape_of = row
    shape = shape_of(config)
    return TensorSpec(path, name, shape, NORM_TYPES if len(shape) == 1 else MATRIX_TYPES)


def uses_more_bits(layer: int, num_layers: int) -> bool:
    """Whether Q4_K_M stores ``v_proj`` and ``down_proj`` of this layer as Q6_K.

    Source: ``use_more_bits`` in llama.cpp at 0c1e57098, ``src/llama-quant.cpp`` line 452.
    """
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2


def q4_k_m_types(config: Qwen3MoeConfig) -> dict[str, GGMLType]:
    """The type that llama.cpp's Q4_K_M recipe gives every tensor, by path.

    Rows that are no multiple of 256 fall back to Q8_0, or to F16 where 32 does
    not divide them either (llama.cpp's own fallback from Q4_K is Q5_0). Real
    files differ from the recipe: always go by the type of each tensor.
    """
    return {spec.path: _q4_k_m_type(spec, config.num_hidden_layers) for spec in tensor_specs(config)}


def _q4_k_m_type(spec: TensorSpec, num_layers: int) -> GGMLType:
    if len(spec.shape) == 1 or spec.path.endswith("mlp.router"):
        return GGMLType.F32
    more_bits = spec.path == "lm_head"
    if spec.path.endswith(("self_attn.v_proj", "experts.down_proj")):
        more_bits = uses_more_bits(int(spec.path.split(".")[1]), num_layers)
    wanted = GGMLType.Q6_K if more_bits else GGMLType.Q4_K
    candidates = (wanted, GGMLType.Q8_0, GGMLType.F16)
    return next(t for t in candidates if spec.shape[-1] % BLOCK_FORMATS[t].weights == 0)


def check_tensors(gguf_file: GGUFFile, config: Qwen3MoeConfig) -> None:
    """Hold the tensors of a file against the model's: names, shapes, types.

    Reads no weights.

    Raises:
      ModelFileError: ``E_TENSOR`` for tensors that are missing, extra or
        misshapen (the message names the first few and counts the rest),
        ``E_QTYPE`` for one of a type that the model cannot use.
    """
    specs = {spec.gguf_name: spec for spec in tensor_specs(config)}
    found = with_parts(gguf_file.tensors, config)
    _refuse_unsupported_types(found.values())
    extra = [name for name in found if name not in specs]
    for name in extra:
        _refuse_known_variant(name)
    missing = [name for name in specs if name not in found]
    misshapen = [
        f"{name} {list(found[name].shape)}, not {list(spec.shape)}"
        for name, spec in specs.items()
        if name in found and found[name].shape != spec.shape
    ]
    problems = [_listing("missing", missing), _listing("misshapen", misshapen), _listing("extra", extra)]
    if any(problems):
        first = (missing or [m.split(" ", 1)[0] for m in misshapen] or extra)[0]
        raise ModelFileError(
            "E_TENSOR", "the tensors do not fit the model: " + "; ".join(filter(None, problems)), name=first
        )
    for name, spec in specs.items():
        if found[name].type not in spec.types:
            allowed = ", ".join(t.name for t in spec.types)
            raise ModelFileError(
                "E_QTYPE", f"{name} has type {found[name].type_name}; it may be {allowed}", name=name
            )


def _refuse_unsupported_types(tensors: Iterable[TensorInfo]) -> None:
    """Names every type at once, and what to ask for in place of such a file."""
    others = [tensor for tensor in tensors if not tensor.is_supported]
    if not others:
        return
    counts = Counter(tensor.type_name for tensor in others)
    found = ", ".join(f"{name} ({count} tensors)" for name, count in counts.most_common())
    supported = ", ".join(t.name for t in SUPPORTED_TYPES)
    raise ModelFileError(
        "E_QTYPE",
        f"tensors such as {quote(others[0].name)} have types that are not supported: {found}; ask for the "
        f"Q4_K_M, Q5_K_M, Q6_K or Q8_0 file of this model (supported types: {supported})",
        name=others[0].name,
    )


def _refuse_known_variant(name: str) -> None:
    """Explain the legal tensors that this model does not have; other names are reported together."""
    for part in name.split("."):
        reason = _UNSUPPORTED_PARTS.get(part)
        if reason:
            raise ModelFileError("E_TENSOR", f"{quote(name)}: {reason}", name=name)


def _listing(what: str, names: list[str]) -> str:
    if not names:
        return ""
    shown = ", ".join(printable(name, 100) for name in names[:_NAMED_IN_A_MESSAGE])
    rest = len(names) - _NAMED_IN_A_MESSAGE
    return f"{len(names)} {what}: {shown}" + (f" and {rest} more" if rest > 0 else "")
