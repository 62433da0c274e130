"""The real shapes of expert_matmul in Qwen3-30B-A3B, named once for tests and benchmarks."""

from dataclasses import dataclass

from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.kernels_pallas.quantized_matmul.arg_specs import TOKENS


@dataclass(frozen=True)
class ArgSpec:
    """Products of ``tokens`` tokens with the [rows, columns] matrices of ``used`` experts each.

    ``shared_input`` says that one row of x serves all experts of a token.
    """

    tokens: int
    experts: int
    used: int
    rows: int
    columns: int
    shared_input: bool
    type: GGMLType


STACKS = {
    "gate_up": (128, 8, 768, 2048, True, GGMLType.Q4_K),
    "down_q4": (128, 8, 2048, 768, False, GGMLType.Q4_K),
    "down_q6": (128, 8, 2048, 768, False, GGMLType.Q6_K),
}

ARG_SPECS = {
    f"{name}_{phase}": ArgSpec(tokens, *stack)
    for name, stack in STACKS.items()
    for phase, tokens in TOKENS.items()
}
