"""The commands of ``qwen3-moe``: one module each, with ``add_arguments(parser)`` and ``run(args) -> int``."""
