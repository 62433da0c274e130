"""What commands share: naming a model, loading it with a banner, sampling options."""

import argparse
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from qwen3_moe_jax import loader
from qwen3_moe_jax.commands import options
from qwen3_moe_jax.core import speaker, terminal
from qwen3_moe_jax.core.errors import OptionError
from qwen3_moe_jax.core.exit_codes import ExitCode
from qwen3_moe_jax.core.pictures import PICTURES, check_drawing
from qwen3_moe_jax.core.sampling import Sampling, random_seed
from qwen3_moe_jax.core.terminal import explain_if_slow, show_progress
from qwen3_moe_jax.machine import processes
from qwen3_moe_jax.machine.kernels import AUTO, CHOICES, NATIVE
from qwen3_moe_jax.machine.processes import JOIN_SECONDS, Processes

if TYPE_CHECKING:
    from qwen3_moe_jax.api import Model
    from qwen3_moe_jax.core.runner import Runner
    from qwen3_moe_jax.text.prompts import Opened


def add_model(parser: argparse._ActionsContainer) -> None:
    """--model alone."""
    parser.add_argument(
        "-m",
        "--model",
        type=options.path,
        help="a .gguf file, a checkpoint folder, or hf:OWNER/REPO[:QUANT] (default: the embedded model)",
    )


def add_exact(parser: argparse._ActionsContainer) -> None:
    """--exact alone."""
    parser.add_argument(
        "--exact",
        action="store_const",
        const="float32",
        dest="dtype",
        help="float32 products, as --dtype float32; else native kernels round activations to 15 bits, and "
        "long prompts in wgpu on NVIDIA GPUs to 16",
    )


def dtype_of(target: str) -> str | None:
    """The dtype of a target's operands; None is the backend's own choice, which wgpu has."""
    backend, _, dtype = target.partition(":")
    return dtype or (None if backend == "wgpu" else "float32")


def add_adapter(parser: argparse._ActionsContainer) -> None:
    """--adapter alone."""
    parser.add_argument(
        "--adapter", type=options.name, metavar="NAME", help="part of the WebGPU adapter's name (wgpu)"
    )


def add_kernels(parser: argparse._ActionsContainer) -> None:
    """--kernels alone."""
    parser.add_argument(
        "--kernels",
        choices=CHOICES,
        default=AUTO,
        help="kernels (jax): for Hopper GPUs, Ampere and later, CPUs, or none (default: the fastest here)",
    )


def add_mesh(parser: argparse._ActionsContainer) -> None:
    """--mesh alone."""
    parser.add_argument(
        "--mesh",
        type=options.mesh,
        metavar="tp=N,ep=N",
        help="split the model over tp x ep devices (jax): experts by expert (ep), their width (tp); or auto",
    )


def add_processes(parser: argparse.ArgumentParser, *, joins: bool = True) -> None:
    """--coordinator and what belongs to it.

    Args:
      joins: the command's own process joins the others; else its engine does.
    """
    group = parser.add_argument_group("several processes, on one host or several (with --mesh)")
    group.add_argument(
        "--coordinator",
        type=options.name,
        metavar="HOST:PORT",
        help="where process 0 listens: an address of its host that the others reach",
    )
    group.add_argument(
        "--num-processes",
        type=options.number(1),
        metavar="N",
        help="how many there are, all with this command",
    )
    group.add_argument(
        "--process-id", type=options.number(0), metavar="I", help="this one's number, from 0 on"
    )
    group.add_argument(
        "--distributed", action="store_true", help="let JAX find these three out, under Slurm or Open MPI"
    )
    group.add_argument(
        "--join-seconds",
        type=options.seconds,
        default=JOIN_SECONDS,
        metavar="S",
        help=f"how long they wait for each other at the start ({JOIN_SECONDS:g})",
    )
    parser.set_defaults(joins=joins)


def processes_from(args: argparse.Namespace) -> Processes | None:
    """What ``add_processes`` parsed; None for a process that is alone.

    Raises:
      OptionError: one option needs another.
    """
    named = args.coordinator, args.num_processes, args.process_id
    if named == (None, None, None) and not args.distributed:
        return None
    found = Processes(*named, seconds=args.join_seconds)
    found.check()
    if args.mesh is None:
        raise OptionError(
            "several processes share one model: --mesh says how it is split, such as --mesh auto"
        )
    return found


OF_EACH = {
    *("coordinator", "process_id", "distributed", "join_seconds", "joins", "run"),
    *("model", "prompt", "prompt_option", "file", "seed", "receipt", "picture", "quiet"),
}
"""What processes of one model may be given each for itself: a file's place, and what process 0 decides."""


def _options_of_all(args: argparse.Namespace) -> dict[str, str]:
    """Those in which the processes have to agree, as one would write them."""
    given = {name: value for name, value in vars(args).items() if name not in OF_EACH}
    return {f"--{name.replace('_', '-')}": repr(value) for name, value in sorted(given.items())}


@contextmanager
def beside_others(args: argparse.Namespace) -> Generator[Callable[[int], int]]:
    """Within the block this process is one of those that the options name, if they name some.

    All but process 0 are silent, and write no files. The block's value takes its exit code, and gives that of
    process 0.
    """
    wanted = processes_from(args)
    if wanted is None:
        yield lambda code: code
        return
    speaker.keep_output()
    processes.join(wanted)
    if not processes.is_first():
        speaker.silence()

    def agreed(code: int) -> int:
        if code == ExitCode.INTERRUPTED:  # the others may not be: they are in the middle of a step
            processes.leave(code, "interrupted")
            return code
        return processes.of_first("exit code", int(code))

    try:
        processes.check_all_have(_options_of_all(args), what="options")
        yield agreed
    except BaseException as error:
        processes.await_news(error)
        is_interrupt = isinstance(error, KeyboardInterrupt)
        code = ExitCode.INTERRUPTED if is_interrupt else ExitCode.FAULT
        processes.leave(code, "interrupted" if is_interrupt else " ".join(str(error).split())[:300])
        raise


def runner_options(backend: str, args: argparse.Namespace) -> dict[str, Any]:
    """What ``add_kernels``, ``add_mesh`` and ``add_adapter`` parsed, as far as a backend takes it."""
    of = {"jax": {"kernels": args.kernels, "mesh": args.mesh}, "wgpu": {"adapter": args.adapter}}
    return of.get(backend, {})


def add_context(parser: argparse._ActionsContainer, help: str, default: int | None = None) -> None:
    """--context and the names that other programs give it."""
    kind = options.number(2)
    names = ("-c", "--context", "--ctx-size")
    parser.add_argument(*names, type=kind, default=default, metavar="TOKENS", help=help)


def add_model_arguments(
    parser: argparse.ArgumentParser, *, context_help: str = "tokens that the KV cache holds"
) -> None:
    """--model, --backend and what belongs to them."""
    group = parser.add_argument_group("model and backend")
    add_model(group)
    group.add_argument("--backend", choices=("auto", *loader.BACKENDS), default="auto")
    group.add_argument(
        "--dtype", choices=loader.DTYPES, help="operands of matrix products (jax; default: by the device)"
    )
    add_exact(group)
    group.add_argument(
        "--kv-cache",
        choices=loader.KV_CACHES,
        help="keys and values of the context (jax; default: by the device); int8 saves memory",
    )
    add_kernels(group)
    add_context(group, context_help)
    add_adapter(group)
    add_mesh(group)
    group.add_argument("--no-gate", action="store_true", help="skip the check at a file's first load")
    group.add_argument(
        "--strict", action="store_true", help="end with an error where something would fall back"
    )
    group.add_argument("-q", "--quiet", action="store_true", help="no banner and no figures")


def add_prompt_lookup(parser: argparse._ActionsContainer) -> None:
    """--prompt-lookup."""
    parser.add_argument(
        "--prompt-lookup",
        action="store_true",
        help="guess what the answer repeats: the same answer, sooner where it quotes or edits (jax)",
    )


def add_template(parser: argparse.ArgumentParser) -> None:
    """--chat-template-file."""
    parser.add_argument(
        "--chat-template-file",
        dest="chat_template",
        type=options.template,
        metavar="FILE",
        help="a Jinja template in place of the model file's",
    )


def add_picture(parser: argparse._ActionsContainer, what: str) -> None:
    """--picture."""
    parser.add_argument(
        "-o",
        "--picture",
        type=options.output(*PICTURES),
        metavar="FILE",
        help=f"draw {what}: {', '.join(PICTURES)} (needs the extra [plot])",
    )


def picture_path(args: argparse.Namespace) -> str | None:
    """Where the picture goes; raises PicturesUnavailableError before any work if it cannot be drawn."""
    if args.picture:
        check_drawing()
    return args.picture


def _slow_load(*, has_gate: bool) -> str:
    """What a load that takes long waits for."""
    clock = sys.modules.get("qwen3_moe_jax.jax_backend.compile_clock")
    if clock is None or clock.compile_clock().wait() is None:
        return "loading the model ..."
    if not has_gate:
        return "loading the model: compiling a program for it ..."
    return (
        "loading the model: the first time, a few tokens are checked against the reference; "
        "compiling a program for it ..."
    )


def load_model(
    args: argparse.Namespace,
    *,
    show_banner: bool = True,
    context: loader.Context = None,
    first_prompt: int | None = None,
    before_weights: "Callable[[Opened], object] | None" = None,
) -> "Model":
    """Loads what ``add_model_arguments`` parsed, with progress and a banner on standard error.

    ``context`` is what holds without --context; ``first_prompt`` and ``before_weights`` as for ``api.load``.
    """
    from qwen3_moe_jax.api import load  # --help needs none of it

    path = loader.model_path(args.model, quiet=args.quiet)
    with (
        explain_if_slow(partial(_slow_load, has_gate=not args.no_gate), quiet=args.quiet),
        show_progress("loading", quiet=args.quiet) as progress,
    ):
        model = load(
            path,
            backend=args.backend,
            max_context=args.context or context,
            dtype=args.dtype,
            kv_cache=args.kv_cache,
            kernels=args.kernels,
            adapter=args.adapter,
            mesh=args.mesh,
            prompt_lookup=getattr(args, "prompt_lookup", False),
            gate=not args.no_gate,
            strict=args.strict,
            progress=progress,
            first_prompt=first_prompt,
            before_weights=before_weights,
        )
    if not args.quiet:
        compiled = model.runner.compilation()
        terminal.note(*(f"note: {line}" for line in (compiled.trouble if compiled else ())))
    if show_banner and not args.quiet:
        terminal.note(*banner(model), *(f"warning: {text}" for text in model.source.warnings))
    return model


def banner(model: "Model") -> tuple[str, ...]:
    """Two lines: what the model is, and what it runs on; a third on its mesh, or on its weights' file."""
    c, source = model.config, model.source
    name = source.metadata.get("general.name", source.path.name)
    kinds = ", ".join(sorted({t.name for t in source.types.values()}))
    facts = model.runner.describe()
    found = facts["implementations"]
    assert isinstance(found, Mapping), "describe() gives one name for each type"
    implementations = ", ".join(f"{t}: {i}" for t, i in found.items())
    kernels = f"{facts['kernels']} kernels ({facts['kernels_reason']}), " if _has_choice(facts) else ""
    mesh = (f"mesh {facts['mesh']}",) if "mesh" in facts else ()
    weights = (f"weights {facts['weights']}",) if "weights" in facts else ()
    device = f"{facts['backend']} on {facts['device']} ({model.backend_reason})"
    return (
        f"{name}: {c.num_hidden_layers} layers, {c.num_experts} experts ({c.num_experts_per_tok} used), "
        f"{kinds}, {source.nbytes / 1e9:.3g} GB",
        f"{device}, {kernels}{facts['compute_dtype']}, context {model.runner.max_context}, {implementations}",
        *mesh,
        *weights,
    )


def _has_choice(facts: Mapping[str, Any]) -> bool:
    """Whether there was a choice of kernels."""
    is_choice = "(gpu)" in facts.get("device", "") or facts.get("kernels") == NATIVE or "mesh" in facts
    return "kernels" in facts and is_choice


def compile_seconds(runner: "Runner") -> float:
    """Seconds that this process has compiled programs; 0 for a backend that compiles when it loads."""
    compiled = runner.compilation()
    return compiled.seconds if compiled else 0.0


def what_is_slow(runner: "Runner", doing: str) -> Callable[[], str]:
    """A text for ``explain_if_slow`` that says whether a program is being compiled when it is shown."""

    def text() -> str:
        compiled = runner.compilation()
        if compiled is not None and compiled.is_waiting:
            known = f"{compiled.count_ready()} of {compiled.wanted} are ready"
            kept = ", which is kept for the next run" if compiled.are_kept else ""
            return f"{doing}: compiling a program for it{kept} ({known}) ..."
        return f"{doing} ..."

    return text


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """One option for each field of ``Sampling``, --max-tokens and --stop."""
    group = parser.add_argument_group("sampling (default: what the file or its family recommends)")
    group.add_argument(
        "-n", "--max-tokens", "--n-predict", type=options.number(1), metavar="N", help="at most N new tokens"
    )
    value = options.sampling_value
    group.add_argument("--temperature", "--temp", type=value("temperature"), metavar="T", help="0 is greedy")
    group.add_argument("--top-k", type=value("top_k"), metavar="K", help="0 keeps all")
    group.add_argument("--top-p", type=value("top_p"), metavar="P", help="1 keeps all")
    group.add_argument("--min-p", type=value("min_p"), metavar="P", help="0 keeps all")
    group.add_argument(
        "--repetition-penalty",
        "--repeat-penalty",
        type=value("repetition_penalty"),
        metavar="X",
        help="1 is none",
    )
    group.add_argument("--presence-penalty", type=value("presence_penalty"), metavar="X", help="0 is none")
    group.add_argument(
        "-s", "--seed", type=options.seed, metavar="N", help="of the random choices (default: -1, a new one)"
    )
    group.add_argument(
        "--stop",
        action="append",
        type=options.escaped,
        default=[],
        metavar="TEXT",
        help="end before this text, in which \\n is a line end; may be given several times",
    )


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
    sampling = replace(sampling, **{"seed": random_seed(), **given})
    if not args.quiet:
        fields = " ".join(f"{f} {_plain(getattr(sampling, f))}" for f in SAMPLING_FIELDS)
        origin = f"{origin}, and options" if given else origin
        terminal.note(f"sampling: {fields} ({origin})")
        if sampling.temperature == 0 and thinking:
            terminal.note("note: greedy decoding and thinking end in loops; the family advises 0.6")
    return sampling


def _plain(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"
