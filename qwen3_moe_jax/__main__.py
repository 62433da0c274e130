"""``python -m qwen3_moe_jax``: the same as ``qwen3-moe``."""

from qwen3_moe_jax.cli import program

if __name__ == "__main__":
    program()
