"""``python -m qwen3_moe_jax``: the same as ``qwen3-moe``."""

import sys

from qwen3_moe_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
