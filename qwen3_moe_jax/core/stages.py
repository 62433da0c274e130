"""The named stages of one forward pass: one vocabulary for trace, bisect and interventions.

Names are llama.cpp's (``llama-eval-callback`` prints ``ffn_norm-12`` for layer
12), so that dumps of both programs line up. Letters as in ``docs/reference/glossary.md``.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One point of the forward pass.

    Attributes:
      name: llama.cpp's name.
      shape: letters of the axes; T is always first.
      tensor: the parameter that this stage reads, relative to its layer, or None.
    """

    name: str
    shape: str
    tensor: str | None = None


INPUT_STAGES = (Stage("inp_embd", "T D", "embed_tokens"),)

LAYER_STAGES = (
    Stage("attn_norm", "T D", "input_layernorm"),
    Stage("Qcur", "T N H", "self_attn.q_proj"),  # before its norm
    Stage("Kcur", "T K H", "self_attn.k_proj"),
    Stage("Vcur", "T K H", "self_attn.v_proj"),
    Stage("Qcur_normed", "T N H", "self_attn.q_norm"),
    Stage("Kcur_normed", "T K H", "self_attn.k_norm"),
    Stage("Qcur_rope", "T N H"),
    Stage("Kcur_rope", "T K H"),
    Stage("kqv_out", "T N H"),
    Stage("attn_out", "T D", "self_attn.o_proj"),
    Stage("ffn_inp", "T D"),
    Stage("ffn_norm", "T D", "post_attention_layernorm"),
    Stage("ffn_moe_logits", "T E", "mlp.router"),
    Stage("ffn_moe_probs", "T E"),
    Stage("ffn_moe_topk", "T X"),  # int32 expert ids
    Stage("ffn_moe_weights_norm", "T X"),
    Stage("ffn_moe_gate", "T X F", "mlp.experts.gate_proj"),
    Stage("ffn_moe_up", "T X F", "mlp.experts.up_proj"),
    Stage("ffn_moe_swiglu", "T X F"),
    Stage("ffn_moe_down", "T X D", "mlp.experts.down_proj"),
    Stage("ffn_moe_out", "T D"),
    Stage("l_out", "T D"),
)

OUTPUT_STAGES = (
    Stage("result_norm", "T D", "norm"),
    Stage("result_output", "T V", "lm_head"),
)

STAGES = {s.name: s for s in (*INPUT_STAGES, *LAYER_STAGES, *OUTPUT_STAGES)}

INSIDE_EXPERTS = frozenset({"ffn_moe_gate", "ffn_moe_up", "ffn_moe_swiglu", "ffn_moe_down"})
"""Stages inside the expert layer, which a fused kernel does not show."""

StageKey = tuple[str, int | None]
"""(stage name, layer), with layer None outside the layers."""
