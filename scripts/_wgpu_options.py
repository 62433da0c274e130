"""What the measurements of the wgpu backend are asked for."""

import argparse

from qwen3_moe_jax.loader import embedded_model


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """A parser with the model, the adapter, the context and the prompt's length."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-m", "--model", default=str(embedded_model()))
    parser.add_argument("--adapter", help="part of the adapter's name")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    return parser
