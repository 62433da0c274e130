"""``qwen3-moe batch``: a file of requests in OpenAI's batch format, answered into a file of results."""

import argparse
import contextlib
import importlib.util
import math
import os
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from qwen3_moe_jax import loader
from qwen3_moe_jax.commands import options
from qwen3_moe_jax.commands.common import add_processes, processes_from
from qwen3_moe_jax.commands.serve import add_engine_arguments, check_installed, follow_if_asked, start_from
from qwen3_moe_jax.core import terminal
from qwen3_moe_jax.core.counted import counted
from qwen3_moe_jax.core.errors import OptionError
from qwen3_moe_jax.core.exit_codes import ExitCode

if TYPE_CHECKING:
    from qwen3_moe_jax.serve.batch.estimate import Estimate
    from qwen3_moe_jax.serve.batch.results import Results
    from qwen3_moe_jax.serve.batch.run import Answerer
    from qwen3_moe_jax.serve.engine.frames import Ready

SLOTS = 16
"""Requests at a time, as memory allows."""

AHEAD = 16
"""Requests that wait beside those: a slot that gets free has its next one at once."""

STEP_MS = math.inf
"""Nobody reads an answer while it is written: steps are as long as is fastest."""

CLUSTER_OPTIONS = (
    "backend",
    "dtype",
    "kv_cache",
    "kernels",
    "mesh",
    "no_gate",
    "slots",
    "context",
    "cache_ram",
    "cpus",
)
"""Arguments that are options of an application on Ray, too."""

LINE_SECONDS = 10.0
"""Between two lines of progress where standard error is no terminal."""

EXAMPLE = """
a line of the input, and of the output (in the order in which they end):
  {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions",
   "body": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 100}}
  {"id": "batch_...", "custom_id": "1", "response": {"status_code": 200, "request_id": "req_...",
   "body": {...}}, "error": null}
urls: /v1/chat/completions, /v1/completions, /v1/responses; bodies as `qwen3-moe serve` takes them.

After Ctrl-C or a kill the same command goes on: a custom_id that has its line is not asked again.
A line that cannot be a request gets a line with its error. With any such line the exit code is 1.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLE
    parser.add_argument(
        "requests", metavar="REQUESTS.jsonl", type=options.path, help="one request per line; - reads a pipe"
    )
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        type=options.output(),
        metavar="RESULTS.jsonl",
        help="results are added to this file, each as its request ends",
    )
    parser.add_argument(
        "--retry-errors", action="store_true", help="ask again what has a line that is no answer"
    )
    parser.add_argument("--name", type=options.text, help="the model's name in results (default: the file's)")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress and no figures")
    add_engine_arguments(parser, step_ms=STEP_MS)
    group = parser.add_argument_group("cluster")
    group.add_argument(
        "--ray",
        nargs="?",
        const="auto",
        type=options.text,
        metavar="ADDRESS",
        help="on the hosts of a cluster of Ray, which have the model at the same path; without ADDRESS on "
        "that of RAY_ADDRESS or of this host",
    )
    group.add_argument(
        "--replicas",
        type=options.number(1),
        metavar="N",
        help="engines of the cluster (as many as it has room for)",
    )
    group.add_argument(
        "--cpus", type=options.number(1), default=4, metavar="N", help="processors of each engine there (4)"
    )
    add_processes(parser, joins=False)


def run(args: argparse.Namespace) -> int:
    check_installed()
    if args.ray is None and args.replicas is not None:
        raise OptionError("--replicas: batch runs several engines with --ray alone")
    if args.ray is not None:
        check_ray(args)
        if processes_from(args) is not None:
            raise OptionError("--ray starts engines of one process each: leave it out with --coordinator")
    follow_if_asked(args)
    from qwen3_moe_jax.serve.batch import lines, results

    both_exist = os.path.exists(args.requests) and os.path.exists(args.output)
    if both_exist and os.path.samefile(args.requests, args.output):
        raise OptionError(f"{args.output} is the file of requests: name another for the results")
    names = None if args.requests == "-" else lines.check(args.requests)
    if args.retry_errors and os.path.isfile(args.output):
        results.without_failures(args.output)
    try:
        with results.open_results(args.output) as found:
            if names is not None:
                _check_results(found, names, args)
            return _answer(args, found)
    except results.ResultsBusyError as error:
        terminal.error(error)
        return ExitCode.BUSY


def check_ray(args: argparse.Namespace) -> None:
    """Raises RuntimeError, OptionError: Ray is not installed, or cannot have the options."""
    if args.adapter is not None:
        raise OptionError("--adapter: engines of a cluster run on JAX: leave it out")
    if importlib.util.find_spec("ray") is None:
        raise RuntimeError("--ray needs ray: pip install 'qwen3-moe-jax[ray]'")


def _check_results(found: "Results", names: dict[str, int], args: argparse.Namespace) -> None:
    """Raises OptionError: the results are of other requests."""
    other = next((n for n in found.names if isinstance(n, str) and n not in names), None)
    if other is not None:
        raise OptionError(
            f"{args.output} has a result of {other[:80]!r}, which is not in {args.requests}: "
            "name another file"
        )


def _answer(args: argparse.Namespace, found: "Results") -> int:
    from qwen3_moe_jax.serve.batch import lines, run, source
    from qwen3_moe_jax.serve.batch.estimate import Estimate

    if args.requests == "-":
        requests, estimate = source.StreamSource(terminal.bytes_of_input()), Estimate()
    else:
        with lines.open_requests(args.requests) as file:
            estimate = Estimate(line for line in lines.read(file) if line.name not in found.names)
        requests = source.FileSource(args.requests)
    before = found.statuses.total()
    if before and not args.quiet:
        left = "" if estimate.total is None else f", {estimate.total:,} are left"
        have = "has its" if before == 1 else "have their"
        terminal.note(f"{counted(before, 'line')} {have} result{left}")
    is_long = estimate.total is None or estimate.total > SLOTS
    if estimate.total == 0:
        return _end(found, estimate, args, is_stopped=False)
    progress = Progress(quiet=args.quiet)

    async def work() -> None:
        with terminal.explain_if_slow("loading the model ...", quiet=args.quiet) as has_begun:
            async with _engines(args, is_long=is_long) as (answerer, ready, count):
                has_begun()
                progress.banner(args, ready, count)
                estimate.start()
                ahead = AHEAD * count
                await run.Work(answerer, found, estimate, ahead=ahead, say=progress.show).run(requests)

    try:
        is_stopped = run.until_interrupted(work)
    finally:
        progress.clear()
        requests.close()
    return _end(found, estimate, args, is_stopped=is_stopped)


@contextlib.asynccontextmanager
async def _engines(
    args: argparse.Namespace, *, is_long: bool
) -> "AsyncIterator[tuple[Answerer, Ready, int]]":
    """Who answers, what the first engine says that is ready, and how many there are.

    Raises:
      ServeError, MemoryPlanError, OptionError: there is none.
    """
    from qwen3_moe_jax.serve import headless
    from qwen3_moe_jax.serve.batch import run

    settings = run.batch_settings(args.name)
    own = {"max_slots": SLOTS, "warm_up": False, "load_programs": is_long}
    if args.ray is None:
        async with headless.engine(settings, start_from(args, **own)) as service:
            yield run.OneEngine(service), service.engine.loaded(), 1
        return
    import msgspec

    from qwen3_moe_jax.serve.batch import ray_workers
    from qwen3_moe_jax.serve.cluster.options import options_of

    with ray_workers.connected(args.ray) as resources:
        given = {name: getattr(args, name) for name in CLUSTER_OPTIONS}
        given["model"] = _path_on_all_hosts(args.model)
        options = options_of(given, cluster_gpus=resources.get("GPU", 0))
        options = ray_workers.as_many_as_fit(options, resources, args.replicas)
        start = msgspec.structs.replace(options.start(), step_ms=args.step_ms, **own)
        async with ray_workers.engines(options, settings, start, ahead=AHEAD) as workers:
            ready = await workers.first()
            yield workers, ready, options.replicas


def _path_on_all_hosts(model: str | None) -> str | None:
    """A whole path; a name on a hub stays as it is."""
    from qwen3_moe_jax.hub import names

    return model if model is None or names.parse(model) is not None else os.path.abspath(model)


def _end(found: "Results", estimate: "Estimate", args: argparse.Namespace, *, is_stopped: bool) -> int:
    if not args.quiet:
        kinds = found.statuses - Counter({"200": found.statuses["200"]})
        errors = ", ".join(f"{count:,} x {kind}" for kind, count in sorted(kinds.items()))
        terminal.note(
            f"{args.output}: {counted(found.statuses['200'], 'answer')}, {counted(found.errors, 'error')}"
            + (f" ({errors})" if errors else "")
            + estimate.figures()
        )
        if is_stopped:
            terminal.note("stopped: the same command goes on with what is left")
    if is_stopped:
        return ExitCode.INTERRUPTED
    return ExitCode.FAULT if found.errors else ExitCode.DONE


class Progress:
    """What is said on the way: one line that is written over on a terminal, else a line now and then."""

    def __init__(self, *, quiet: bool):
        self._quiet, self._status = quiet, terminal.Status()
        self._due = time.monotonic() + LINE_SECONDS

    def banner(self, args: argparse.Namespace, ready: "Ready", engines: int) -> None:
        """What runs."""
        if not self._quiet:
            name = os.path.basename(loader.model_path(args.model)) if args.ray is None else args.model or ""
            on = "" if args.ray is None else f", {counted(engines, 'engine')} of the cluster"
            terminal.note(
                f"{name}: {counted(ready.slots * engines, 'request')} at a time{on}, "
                f"each of at most {ready.context:,} tokens; {ready.backend} on {ready.facts.get('device')}"
            )

    def show(self, estimate: "Estimate", results: "Results") -> None:
        """How far it is."""
        now = time.monotonic()
        if self._quiet or (now < self._due and not terminal.notes_on_terminal()):
            return
        self._due = now + LINE_SECONDS
        self._status.show(estimate.in_words(results.errors))

    def clear(self) -> None:
        """Takes the line away."""
        self._status.clear()
