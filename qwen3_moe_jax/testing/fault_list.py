"""The ten faults that are planted: what each is, and what ``bisect`` has to say about it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One fault, and what ``bisect`` has to say about it.

    Attributes:
      name: short.
      words: what is wrong.
      stage, layer: the first stage that departs.
      tensor: the parameter to blame, or None.
      expert: the expert to blame, or None.
      cause: a part of the cause that bisect gives.
    """

    name: str
    words: str
    stage: str
    layer: int | None
    tensor: str | None
    expert: int | None
    cause: str


FAULTS = {
    fault.name: fault
    for fault in (
        Fault(
            "sub-scale",
            "one 6-bit scale of one subblock is another",
            "ffn_moe_up",
            3,
            "layers.3.mlp.experts.up_proj",
            7,
            "subblock 3",
        ),
        Fault("rope-theta", "RoPE's base is 10,000", "Qcur_rope", 0, None, None, "rope_theta is 10000"),
        Fault(
            "q-norm",
            "queries are not normed",
            "Qcur_normed",
            0,
            "layers.0.self_attn.q_norm",
            None,
            "norm is missing",
        ),
        Fault(
            "late-softmax",
            "softmax over the chosen experts alone",
            "ffn_moe_probs",
            0,
            None,
            None,
            "softmax is taken after the choice",
        ),
        Fault(
            "no-renormalization",
            "expert weights do not sum to one",
            "ffn_moe_weights_norm",
            0,
            None,
            None,
            "not renormalized",
        ),
        Fault(
            "swapped-experts",
            "experts 2 and 5 are in each other's place",
            "ffn_moe_gate",
            1,
            "layers.1.mlp.experts.gate_proj",
            2,
            "swapped",
        ),
        Fault(
            "gqa-map",
            "query head n reads KV head n % K",
            "kqv_out",
            0,
            None,
            None,
            "n % K",
        ),
        Fault(
            "position", "positions are one too large", "Qcur_rope", 0, None, None, "positions are 1 too large"
        ),
        Fault(
            "misread-type",
            "a Q6_K tensor is read as Q4_K",
            "ffn_moe_down",
            2,
            "layers.2.mlp.experts.down_proj",
            None,
            "read as Q4_K",
        ),
        Fault(
            "last-chunk",
            "the last chunk of a prompt is dropped",
            "inp_embd",
            None,
            "embed_tokens",
            None,
            "chunk",
        ),
    )
}
"""The ten faults by name; layers and experts are of the embedded model."""
