"""``qwen3-moe convert``: the same as ``python -m convert``."""

import argparse

from qwen3_moe_jax.convert import __main__ as converter


def add_arguments(parser: argparse.ArgumentParser) -> None:
    converter.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    return converter.run(args)
