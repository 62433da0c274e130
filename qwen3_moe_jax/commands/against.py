"""``qwen3-moe perplexity --against FILE``: two files of one model, held together or one after the other."""

import argparse
import copy
from collections.abc import Generator
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any

from qwen3_moe_jax import loader
from qwen3_moe_jax.commands.common import load_model, what_is_slow
from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.core import terminal
from qwen3_moe_jax.core.errors import MemoryPlanError
from qwen3_moe_jax.core.exit_codes import ExitCode
from qwen3_moe_jax.core.terminal import explain_if_slow
from qwen3_moe_jax.measure.divergence import (
    Divergence,
    StoredLogits,
    check_same_vocabulary,
    divergences,
    runner_logits,
)
from qwen3_moe_jax.measure.perplexity import Cut, cut_text
from qwen3_moe_jax.text.prompts import Opened
from qwen3_moe_jax.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from qwen3_moe_jax.api import Model


def run_against(args: argparse.Namespace, text: str, status: Any) -> int:
    """Compares ``args.model`` with ``args.against``; ``status`` shows the estimates so far."""
    last: Divergence | None = None
    facts: dict[str, Any] = {}
    try:
        with closing(_estimates(args, text, facts)) as found:
            for last in found:
                status.show(last)
    except KeyboardInterrupt:
        if last is None:
            terminal.error("interrupted before the first window was compared")
            return ExitCode.INTERRUPTED
    status.clear()
    assert last is not None  # a text has at least one window
    if args.json:
        terminal.show_json({**last.as_dict(), **facts})
    else:
        _print(last, facts, quiet=args.quiet)
    return ExitCode.DONE if last.is_complete else ExitCode.INTERRUPTED


def _estimates(args: argparse.Namespace, text: str, facts: dict[str, Any]) -> Generator[Divergence]:
    """The base is loaded first; if the model does not fit beside it, its logits are stored and it goes."""
    base_args = copy.copy(args)
    base_args.model = args.against
    with ExitStack() as stack:
        cuts: list[Cut] = []
        check = lambda opened: cuts.append(_checked_cut(opened, args, text))
        base = stack.enter_context(load_model(base_args, before_weights=check))
        cut = cuts[0]
        facts["base"] = {"model": str(base.source.path), "identity": base.source.identity}
        try:
            model = stack.enter_context(load_model(args))
        except MemoryPlanError:
            model = None
        if model is not None:
            facts |= _facts(model, together=True)
            sources = (runner_logits(held.runner, cut) for held in (model, base))
            with explain_if_slow(what_is_slow(model.runner, "the first window"), quiet=args.quiet) as begun:
                for found in divergences(cut, *sources):
                    begun()
                    yield found
            return
        stored = stack.enter_context(StoredLogits(cut, base.config.vocab_size))
        _store(base, cut, stored)
        base.close()
        model = stack.enter_context(load_model(args))
        facts |= _facts(model, together=False)
        yield from divergences(cut, runner_logits(model.runner, cut), stored.of)


def _checked_cut(base: Opened, args: argparse.Namespace, text: str) -> Cut:
    """The text in the windows of both files, neither of which is loaded; errors as the functions it calls."""
    cut = cut_text(base.max_context, base.tokenizer, text, args.context, args.stride)
    with open_model(loader.model_path(args.model, quiet=args.quiet)) as source:
        tokenizer = Tokenizer(source.metadata, vocab_size=source.config.vocab_size)
    check_same_vocabulary(cut, tokenizer, base.tokenizer, text, args.against)
    return cut


def _store(base: "Model", cut: Cut, stored: StoredLogits) -> None:
    logits = runner_logits(base.runner, cut)
    for number, window in enumerate(cut.windows):
        stored.keep(number, logits(number, window))


def _facts(model: "Model", *, together: bool) -> dict[str, Any]:
    return {
        "model": str(model.source.path),
        "identity": model.source.identity,
        "backend": model.runner.describe(),
        "held_together": together,
    }


def _print(found: Divergence, facts: dict[str, Any], *, quiet: bool) -> None:
    part = "" if found.is_complete else f" (after {found.windows} of {found.windows_in_all} windows)"
    terminal.show(
        f"KL divergence {found.kl:.6f} +- {found.kl_error:.6f} nats per token{part}",
        f"the likeliest token agrees in {100 * found.top_1:.2f} +- {100 * found.top_1_error:.2f} %",
    )
    if quiet:
        return
    terminal.show(
        f"median {found.kl_median:.6f}, 99 % below {found.kl_99:.6f}, maximum {found.kl_max:.6f} nats",
        f"perplexity {found.perplexity:.4f}, of {facts['base']['model']} {found.base_perplexity:.4f}",
        f"{found.tokens_scored} tokens, {found.seconds:.1f} s, "
        + ("both models in memory" if facts["held_together"] else "one model in memory at a time"),
    )
