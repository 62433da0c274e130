"""The real shapes of quantized_matmul in Qwen3-30B-A3B, named once for tests and benchmarks."""

from dataclasses import dataclass

from qwen3_moe_jax.convert.ggml_types import GGMLType


@dataclass(frozen=True)
class ArgSpec:
    """One product ``[tokens, columns] @ [rows, columns].T``, with the type that Q4_K_M gives the weights."""

    tokens: int
    rows: int
    columns: int
    type: GGMLType


MATRICES = {
    "q_proj": (4096, 2048, GGMLType.Q4_K),
    "k_proj": (512, 2048, GGMLType.Q4_K),
    "v_proj": (512, 2048, GGMLType.Q6_K),
    "o_proj": (2048, 4096, GGMLType.Q4_K),
    "lm_head": (151936, 2048, GGMLType.Q6_K),
}

TOKENS = {"decode1": 1, "decode8": 8, "prefill512": 512, "prefill2048": 2048}

ARG_SPECS = {
    f"{name}_{phase}": ArgSpec(tokens, *matrix)
    for name, matrix in MATRICES.items()
    for phase, tokens in TOKENS.items()
}
