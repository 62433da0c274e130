"""``qwen3-moe warm``: every program that a session can need, compiled before the first one."""

import argparse
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from qwen3_moe_jax import loader
from qwen3_moe_jax.commands import options
from qwen3_moe_jax.commands.common import add_context, add_kernels, add_model, add_prompt_lookup
from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.convert.source import ModelSource
from qwen3_moe_jax.core import terminal
from qwen3_moe_jax.core.errors import BackendUnavailableError, OptionError, OutputFileError
from qwen3_moe_jax.core.exit_codes import ExitCode

EPILOG = """\
A program depends on the model's shapes and types, on the context and on this machine, not on the weights,
which are not loaded. Without --context those of `generate` and of `chat` are made. Programs are kept in the
user's cache folder until the model, this package, JAX or the driver change.
"""

CANNOT_WRITE = "compiled programs are not kept: the user's cache folder cannot be written"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    add_model(parser)
    add_context(parser, "tokens of the KV cache (default: those of generate and of chat)")
    parser.add_argument(
        "--slots",
        type=options.number(1),
        default=1,
        metavar="N",
        help="sequences at a time, as in serve (1)",
    )
    parser.add_argument("--dtype", choices=loader.DTYPES, help="as for generate")
    parser.add_argument("--kv-cache", choices=loader.KV_CACHES, help="as for generate")
    add_kernels(parser)
    add_prompt_lookup(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress")


def run(args: argparse.Namespace) -> int:
    if args.prompt_lookup and args.slots > 1:
        raise OptionError("--prompt-lookup is for generate and chat: leave out --slots")
    path = loader.model_path(args.model, quiet=args.quiet)
    with open_model(path) as source:
        wanted = all_of(args, source)
    began = time.monotonic()
    made = make(wanted, quiet=args.quiet)
    if not made:
        terminal.show(f"all {len(wanted)} programs are there")
    else:
        seconds = time.monotonic() - began
        terminal.show(f"{made} of {len(wanted)} programs made in {seconds:.0f} s; the others were there")
    return ExitCode.DONE


def all_of(args: argparse.Namespace, source: ModelSource) -> list:
    """The programs of every session that is asked for, each once (``session_programs.Wanted``).

    Raises:
      BackendUnavailableError: JAX does not start, or compiled programs are not kept on this machine.
      OptionError: a context that the model does not have.
    """
    from qwen3_moe_jax.machine.jax_devices import import_jax, jax_devices

    jax = import_jax()

    from qwen3_moe_jax.jax_backend import programs
    from qwen3_moe_jax.jax_backend.native import Native
    from qwen3_moe_jax.jax_backend.qwen3_moe import Qwen3Moe
    from qwen3_moe_jax.jax_backend.session_programs import Session, dtypes_on
    from qwen3_moe_jax.machine.kernels import AUTO, NATIVE, capability_of, choose_kernels
    from qwen3_moe_jax.parity.gate import first_forward

    if not programs.use_default_store():
        off = os.environ.get(programs.STORE_VARIABLE, "").lower() == "off"
        off_line = f"compiled programs are not kept: {programs.STORE_VARIABLE} is off"
        raise BackendUnavailableError(off_line if off else CANNOT_WRITE)
    device = jax_devices()[0]
    others = AUTO if args.kernels == NATIVE else args.kernels
    kernels = Native.begin(device, args.kernels, args.dtype is not None).kernels(
        choose_kernels(others, capability_of(device), jax.__version_info__)
    )
    compute_dtype, cache_dtype = dtypes_on(device, args.dtype, args.kv_cache)
    model = Qwen3Moe(source.config, compute_dtype, kernels=kernels.name)
    contexts = [loader.checked_context(source, "jax", c, args.kv_cache) for c in _contexts(args)]
    found = []
    for context in dict.fromkeys(contexts):
        own = source.types, device, context, cache_dtype, args.slots
        session = Session.of(model, *own, drafts=args.prompt_lookup)
        found += session.programs()
    return [session.forward(*first_forward(source)), *found]


def _contexts(args: argparse.Namespace) -> list[loader.Context]:
    return [args.context] if args.context else [None, "fit"]


def make(wanted: Iterable, *, quiet: bool) -> int:
    """Makes those that are not on disk; returns how many.

    Raises:
      BackendUnavailableError: some are missing, and the cache can only be read.
      OutputFileError: one was made and could not be kept.
    """
    from qwen3_moe_jax.jax_backend import programs
    from qwen3_moe_jax.jax_backend.settings import own_settings
    from qwen3_moe_jax.jax_backend.wanted import long_of

    wanted = list(wanted)
    with own_settings():
        missing = [w for w in wanted if not w.is_stored]
        if missing and not programs.keeps_on_disk():
            raise BackendUnavailableError(CANNOT_WRITE)
        programs.start_compilers(len(long_of(missing)))
        estimate = Estimate(sum(w.cost for w in missing))
        numbers = itertools.count(len(wanted) - len(missing) + 1)
        for one in made_of(
            missing, lambda w: _begin(w, f"{next(numbers)} of {len(wanted)}", estimate, quiet)
        ):
            if not one.is_stored:
                why = (*programs.trouble(), "this machine's JAX cannot write it")[0]
                raise OutputFileError(f"the program for {one.label} could not be kept: {why}")
            estimate.done(one.cost)
    return len(missing)


def _begin(one: Any, number: str, estimate: "Estimate", quiet: bool) -> None:
    words = estimate.in_words()
    estimate.begins(one.cost)
    if not quiet:
        terminal.note(f"{number}: {one.label}{words}")


def made_of(missing: Sequence[Any], begins: Callable[[Any], None]) -> Iterator[Any]:
    """Each program when it is made; several at a time where other processes compile."""
    from qwen3_moe_jax.jax_backend.program_farm import asking, farm
    from qwen3_moe_jax.jax_backend.settings import own_settings

    if not farm().count:
        for one in missing:
            begins(one)
            one.make()
            yield one
        return
    is_over = threading.Event()

    def make(one: Any) -> Any:
        with own_settings(), asking(is_over=is_over.is_set):
            begins(one)
            one.make()
        return one

    with ThreadPoolExecutor(farm().count + 1) as pool:
        try:
            yield from (made.result() for made in as_completed([pool.submit(make, w) for w in missing]))
        finally:
            is_over.set()
            pool.shutdown(wait=False, cancel_futures=True)


class Estimate:
    """Seconds left, from those of the programs that are made; none before the first long one.

    Of programs that are being made at the same time half is taken for done, and nothing is said before as
    much is made as is being made: fourteen that begin together end together, and after the first of them
    "601 s left" was said of 100.
    """

    def __init__(self, total: float):
        self._began, self._total, self._done, self._under_way = time.monotonic(), total, 0.0, 0.0
        self._lock = threading.Lock()

    def begins(self, cost: float) -> None:
        """A program of this cost is being made; told by the thread that makes it."""
        with self._lock:
            self._under_way += cost

    def done(self, cost: float) -> None:
        """One that had begun is made."""
        with self._lock:
            self._done += cost
            self._under_way -= cost

    def in_words(self) -> str:
        """ "; about 20 s left", or nothing where it is not known."""
        if self._done < max(1.0, self._under_way):
            return ""
        done = self._done + self._under_way / 2
        seconds = (time.monotonic() - self._began) * (self._total - done) / done
        return f"; about {max(1, round(seconds))} s left"
