"""Writes a Qwen3-MoE GGUF file of any size with random weights (``qwen3_moe_jax.testing.random_models``).

    python -m scripts.make_random_gguf /tmp/random-30b.gguf --vocab vocab.gguf
    python -m scripts.make_random_gguf /tmp/tiny.gguf --layers 2 --hidden 256 --heads 4 --kv 2 \\
        --head-dim 64 --experts 8 --experts-per-token 2 --ff 256 --vocab-size 320 --mix all
"""

import argparse
import os
from dataclasses import replace

from qwen3_moe_jax.convert.config import PRESETS
from qwen3_moe_jax.testing.random_models import tokenizer_of, write_random_gguf


def _parse(argv: list[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("out", help="file to write")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="Qwen3-Coder-30B-A3B")
    parser.add_argument("--layers", type=int, dest="num_hidden_layers")
    parser.add_argument("--hidden", type=int, dest="hidden_size")
    parser.add_argument("--heads", type=int, dest="num_attention_heads")
    parser.add_argument("--kv", type=int, dest="num_key_value_heads")
    parser.add_argument("--head-dim", type=int, dest="head_dim")
    parser.add_argument("--experts", type=int, dest="num_experts")
    parser.add_argument("--experts-per-token", type=int, dest="num_experts_per_tok")
    parser.add_argument("--ff", type=int, dest="moe_intermediate_size")
    parser.add_argument("--context", type=int, dest="max_position_embeddings")
    parser.add_argument("--theta", type=float, dest="rope_theta")
    parser.add_argument("--vocab-size", type=int, dest="vocab_size", help="of the byte-level vocabulary")
    parser.add_argument("--tied", action="store_true", dest="tie_word_embeddings", help="no output.weight")
    parser.add_argument("--vocab", help="a GGUF file to copy the tokenizer from")
    parser.add_argument(
        "--mix",
        default="q4_k_m",
        help="as published: Q2_K, Q3_K_M, IQ4_XS, ...; or all, few_bits, only_TYPE",
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = _parse(argv)
    given = {k: v for k, v in vars(args).items() if hasattr(PRESETS[args.preset], k) and v is not None}
    tokenizer = None
    if args.vocab:
        tokenizer = tokenizer_of(args.vocab)
        given["vocab_size"] = len(tokenizer["tokenizer.ggml.tokens"])
    config = replace(PRESETS[args.preset], **given)
    write_random_gguf(args.out, config, mix=args.mix, tokenizer=tokenizer, seed=args.seed)
    print(f"{args.out}: {os.path.getsize(args.out) / 1e9:.3f} GB")


if __name__ == "__main__":
    main()
