"""What commands share: naming a model, loading it with a banner, sampling options."""

import argparse
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from qwen3_moe_jax import loader
from qwen3_moe_jax.convert.progress import show_progress
from qwen3_moe_jax.core.sampling import Sampling

if TYPE_CHECKING:
    from qwen3_moe_jax.api import Model


def add_model_arguments(
    parser: argparse.ArgumentParser, *, context_help: str = "tokens that the KV cache holds"
) -> None:
    """--model, --backend and what belongs to them."""
    group = parser.add_argument_group("model and backend")
    group.add_argument(
        "-m", "--model", help="a .gguf file or a packed checkpoint folder (default: the embedded model)"
    )
    group.add_argument("--backend", choices=("auto", *loader.BACKENDS), default="auto")
    group.add_argument(
        "--dtype", choices=loader.DTYPES, help="operands of matrix products (jax; default: by the device)"
    )
    group.add_argument(
        "--kv-cache",
        choices=loader.KV_CACHES,
        help="keys and values of the context (jax; default: by the device); int8 saves memory",
    )
    group.add_argument("--context", type=int, metavar="TOKENS", help=context_help)
    group.add_argument("--adapter", metavar="NAME", help="part of the WebGPU adapter's name (wgpu)")
    group.add_argument("--no-gate", action="store_true", help="skip the check at a file's first load")
    group.add_argument(
        "--strict", action="store_true", help="end with an error where something would fall back"
    )
    group.add_argument("-q", "--quiet", action="store_true", help="no banner and no figures")


SLOW_SECONDS = 2.0
"""A wait longer than this is explained."""


@contextmanager
def explain_if_slow(text: str, *, quiet: bool = False) -> Iterator[Callable[[], None]]:
    """Says ``text`` on standard error if the block, or what precedes a call of its value, takes long."""
    timer = threading.Timer(SLOW_SECONDS, print, (text,), {"file": sys.stderr, "flush": True})
    timer.daemon = True
    if not quiet:
        timer.start()
    try:
        yield timer.cancel
    finally:
        timer.cancel()


def load_model(args: argparse.Namespace, *, show_banner: bool = True) -> "Model":
    """Loads what ``add_model_arguments`` parsed, with progress and a banner on standard error."""
    from qwen3_moe_jax.api import load  # --help needs none of it

    slow = "loading (and, when a backend first meets a file, checking it against the reference)"
    with explain_if_slow(slow, quiet=args.quiet), show_progress("loading") as progress:
        model = load(
            args.model,
            backend=args.backend,
            max_context=args.context,
            dtype=args.dtype,
            kv_cache=args.kv_cache,
            adapter=args.adapter,
            gate=not args.no_gate,
            strict=args.strict,
            progress=progress,
        )
    if show_banner and not args.quiet:
        print(banner(model), file=sys.stderr)
    return model


def banner(model: "Model") -> str:
    """Two lines: what the model is, and what it runs on."""
    c, source = model.config, model.source
    name = source.metadata.get("general.name", source.path.name)
    kinds = ", ".join(sorted({t.name for t in source.types.values()}))
    facts = model.runner.describe()
    implementations = ", ".join(f"{t}: {i}" for t, i in facts["implementations"].items())
    return (
        f"{name}: {c.num_hidden_layers} layers, {c.num_experts} experts ({c.num_experts_per_tok} used), "
        f"{kinds}, {source.nbytes / 1e9:.3g} GB\n"
        f"{facts['backend']} on {facts['device']} ({model.backend_reason}), {facts['compute_dtype']}, "
        f"context {model.runner.max_context}, {implementations}"
    )


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """One option for each field of ``Sampling``, --max-tokens and --stop."""
    group = parser.add_argument_group("sampling (default: what the file or its family recommends)")
    group.add_argument("-n", "--max-tokens", type=int, metavar="N", help="at most N new tokens")
    group.add_argument("--temperature", type=float, help="0 is greedy")
    group.add_argument("--top-k", type=int)
    group.add_argument("--top-p", type=float)
    group.add_argument("--min-p", type=float)
    group.add_argument("--repetition-penalty", type=float)
    group.add_argument("--presence-penalty", type=float)
    group.add_argument("--seed", type=int)
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text")


SAMPLING_FIELDS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "seed",
)


def sampling_from(args: argparse.Namespace, model: "Model", *, thinking: bool | None = None) -> Sampling:
    """The recommended sampling with the options given; says on standard error what it is."""
    sampling, origin = model.default_sampling(thinking=thinking)
    given = {f: getattr(args, f) for f in SAMPLING_FIELDS if getattr(args, f) is not None}
    sampling = replace(sampling, **given)
    if not args.quiet:
        fields = " ".join(f"{f} {getattr(sampling, f):g}" for f in SAMPLING_FIELDS)
        origin = f"{origin}, and options" if given else origin
        print(f"sampling: {fields} ({origin})", file=sys.stderr)
        if sampling.temperature == 0 and thinking:
            print("note: greedy decoding and thinking end in loops; the family advises 0.6", file=sys.stderr)
    return sampling
