"""The real shapes of attention in Qwen3-30B-A3B, named once for tests and benchmarks."""

from dataclasses import dataclass

from qwen3_moe_jax.kernels_pallas.quantized_matmul.arg_specs import TOKENS


@dataclass(frozen=True)
class ArgSpec:
    """``tokens`` queries at the end of ``used`` slots of a cache that holds ``capacity``."""

    tokens: int
    capacity: int
    used: int
    heads: int = 32
    kv_heads: int = 4
    head_dim: int = 128


ARG_SPECS = {
    **{name: ArgSpec(tokens, 40960, tokens) for name, tokens in TOKENS.items()},
    "decode1_depth4096": ArgSpec(1, 40960, 4096),
    "prefill512_depth4096": ArgSpec(512, 40960, 4608),
}
