"""The real shapes of moe_mlp in Qwen3-30B-A3B, named once for tests and benchmarks."""

from dataclasses import dataclass

from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.kernels_pallas.quantized_matmul.arg_specs import TOKENS


@dataclass(frozen=True)
class ArgSpec:
    """One expert layer: gate_proj and up_proj [experts, width, hidden], down_proj the other way round."""

    tokens: int
    experts: int
    used: int
    hidden: int
    width: int
    gate_up_type: GGMLType
    down_type: GGMLType


ARG_SPECS = {
    f"{down_type.name.lower()}_{phase}": ArgSpec(tokens, 128, 8, 2048, 768, GGMLType.Q4_K, down_type)
    for down_type in (GGMLType.Q4_K, GGMLType.Q6_K)
    for phase, tokens in TOKENS.items()
}
