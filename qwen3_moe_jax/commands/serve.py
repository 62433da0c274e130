"""``qwen3-moe serve``: the model for every client that speaks HTTP."""

import argparse
import importlib.util
import math
import sys
from typing import TYPE_CHECKING, Any

from qwen3_moe_jax import loader
from qwen3_moe_jax.commands import options
from qwen3_moe_jax.commands.common import (
    add_adapter,
    add_context,
    add_exact,
    add_kernels,
    add_mesh,
    add_model,
    add_processes,
    processes_from,
)
from qwen3_moe_jax.core import speaker
from qwen3_moe_jax.core.errors import OptionError
from qwen3_moe_jax.core.exit_codes import ExitCode
from qwen3_moe_jax.machine import processes

if TYPE_CHECKING:
    from qwen3_moe_jax.serve.engine.frames import Start

EXAMPLES = """
clients (the server listens on http://127.0.0.1:8080 unless told otherwise):
  OpenAI's Python client     OpenAI(base_url="http://127.0.0.1:8080/v1", api_key="none")
  Anthropic's Python client  Anthropic(base_url="http://127.0.0.1:8080", api_key="none")
  Claude Code                ANTHROPIC_BASE_URL=http://127.0.0.1:8080 ANTHROPIC_AUTH_TOKEN=none claude
  Codex                      codex -c model_provider=local -c 'model_providers.local={name="local",
                             base_url="http://127.0.0.1:8080/v1",wire_api="responses"}'
  Qwen Code                  OPENAI_BASE_URL=http://127.0.0.1:8080/v1 OPENAI_API_KEY=none \\
                               OPENAI_MODEL=any qwen --auth-type openai
  curl                       curl http://127.0.0.1:8080/v1/chat/completions \\
                               -H 'Content-Type: application/json' \\
                               -d '{"messages": [{"role": "user", "content": "hi"}]}'
  a browser                  http://127.0.0.1:8080/
"""

MAX_REPLICAS = 64
"""More on one host are a typing error."""

NEEDED = ("starlette", "uvicorn", "httptools", "pydantic", "msgspec", "prometheus_client", "llguidance")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    parser.add_argument(
        "path", nargs="?", metavar="MODEL", type=options.path, help="the same as --model MODEL"
    )
    engine = add_engine_arguments(parser)
    engine.add_argument(
        "--replicas",
        type=options.number(1, MAX_REPLICAS),
        default=1,
        metavar="N",
        help="engines that share the requests: one for each GPU, or for each --mesh; on a CPU they share its "
        "cores. --slots, --context and --cache-ram are of each (1)",
    )
    engine.add_argument("--no-warm-up", action="store_true", help="compile at the first requests instead")
    _add_server_arguments(parser)
    add_processes(parser, joins=False)


def add_engine_arguments(parser: argparse.ArgumentParser, *, step_ms: float = 50) -> argparse._ArgumentGroup:
    """The model, and how its engine runs; returns their group. ``step_ms``: the default."""
    group = parser.add_argument_group("model and engine")
    add_model(group)
    group.add_argument("--backend", choices=("auto", *loader.BACKENDS), default="auto")
    group.add_argument("--dtype", choices=loader.DTYPES, help="operands of matrix products (jax)")
    add_exact(group)
    group.add_argument("--kv-cache", choices=loader.KV_CACHES, help="keys and values of the context (jax)")
    add_kernels(group)
    add_mesh(group)
    add_adapter(group)
    group.add_argument("--no-gate", action="store_true", help="skip the check at a file's first load")
    group.add_argument(
        "--slots",
        type=options.number(1, 256),
        metavar="N",
        help="answers at a time (default: as memory allows)",
    )
    add_context(group, "tokens of each slot (default: the file's, as memory allows)")
    group.add_argument(
        "--batch-invariant",
        action="store_true",
        help="an answer has the same bits alone and in any company, with and without the cache of prompts: "
        "at most 16 slots, and prompts are read one at a time (NVIDIA GPUs)",
    )
    group.add_argument(
        "--cache-ram",
        type=options.amount(0, 1e6),
        default=0,
        metavar="GB",
        help="main memory for prompts that were read (0)",
    )
    group.add_argument(
        "--step-ms",
        type=options.amount(1, 1e6),
        default=step_ms,
        metavar="MS",
        help=f"a step that also reads prompts may take ({'no limit' if math.isinf(step_ms) else step_ms})",
    )
    return group


NO_WINDOWS = "serve and batch do not run on Windows itself: use Linux in it (WSL 2)"


def check_installed() -> None:
    """Raises RuntimeError: a package of the extra ``serve`` is missing, or the system has no such engine."""
    if sys.platform == "win32":
        raise RuntimeError(NO_WINDOWS)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise RuntimeError(f"this command needs {', '.join(missing)}: pip install 'qwen3-moe-jax[serve]'")


def start_from(args: argparse.Namespace, **fields: Any) -> "Start":
    """What the engine is to load; ``fields`` as ``frames.Start``, beside ``add_engine_arguments``."""
    from qwen3_moe_jax.serve.engine.frames import Start

    return Start(
        model=str(loader.model_path(args.model)),
        backend=args.backend,
        dtype=args.dtype,
        kv_cache=args.kv_cache,
        kernels=args.kernels,
        adapter=args.adapter,
        mesh=args.mesh,
        gate=not args.no_gate,
        context=args.context,
        slots=args.slots,
        prefix_bytes=int(args.cache_ram * 1e9),
        step_ms=args.step_ms,
        batch_invariant=args.batch_invariant,
        processes=_processes(args),
        **fields,
    )


def follow_if_asked(args: argparse.Namespace) -> None:
    """The whole work of a process that is not process 0; returns for process 0, and one alone."""
    found = processes_from(args)
    if found is None or found.is_first:
        return
    from qwen3_moe_jax.serve.engine.relay import check, follow

    start = start_from(args)
    check(start, getattr(args, "replicas", None) or 1)
    speaker.silence()
    try:
        follow(start)
    except BaseException as error:
        processes.await_news(error)
        processes.leave(ExitCode.FAULT, " ".join(str(error).split())[:300])
        raise


def _processes(args: argparse.Namespace) -> tuple[str, int, int, float] | None:
    """What the engine is told of the processes."""
    given = processes_from(args)
    if given is None:
        return None
    found = given.found()
    assert found.coordinator is not None, "it was found"
    return found.coordinator, found.count or 0, found.index or 0, found.seconds


def _add_server_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    group.add_argument(
        "--host", type=options.name, default="127.0.0.1", help="address to listen on (127.0.0.1)"
    )
    group.add_argument(
        "--port", type=options.number(0, 65535), default=8080, help="0 takes a free one (8080)"
    )
    group.add_argument(
        "--name", type=options.text, help="what clients call the model (default: the file's name)"
    )
    group.add_argument(
        "--api-key-file",
        type=options.path,
        metavar="FILE",
        help="keys, one per line, of which a request must bring one",
    )
    group.add_argument(
        "--allow-host",
        action="append",
        type=options.name,
        default=[],
        metavar="NAME",
        help="of the Host header",
    )
    group.add_argument(
        "--allow-origin",
        action="append",
        type=options.name,
        default=[],
        metavar="URL",
        help="of web pages that may call",
    )
    group.add_argument("--metrics", action="store_true", help="GET /metrics for Prometheus")
    group.add_argument("--no-page", action="store_true", help="no chat page at /")
    group.add_argument("--strict-fields", action="store_true", help="refuse fields that are not known")
    group.add_argument("--strict-model", action="store_true", help="refuse other model names")
    group.add_argument(
        "--max-queue", type=options.number(0), default=256, metavar="N", help="requests that may wait (256)"
    )
    group.add_argument(
        "--max-queue-tokens",
        type=options.number(0),
        default=1 << 20,
        metavar="N",
        help="tokens of prompts that may wait",
    )
    group.add_argument(
        "--drain-timeout",
        type=options.amount(0, 1e6),
        default=30,
        metavar="S",
        help="for answers to end after SIGTERM (30)",
    )


def run(args: argparse.Namespace) -> int:
    check_installed()
    from qwen3_moe_jax.serve.keys import read_keys
    from qwen3_moe_jax.serve.run import serve
    from qwen3_moe_jax.serve.settings import Settings

    if args.path and args.model:
        raise OptionError("two models are given: give one")
    settings = Settings(
        host=args.host,
        port=args.port,
        name=args.name,
        api_keys=read_keys(args.api_key_file),
        hosts=tuple(args.allow_host),
        origins=tuple(args.allow_origin),
        metrics=args.metrics,
        page=not args.no_page,
        strict_fields=args.strict_fields,
        strict_model=args.strict_model,
        max_queue=args.max_queue,
        max_queue_tokens=args.max_queue_tokens,
        drain_seconds=args.drain_timeout,
    )
    args.model = args.path or args.model
    follow_if_asked(args)
    start = start_from(
        args,
        max_queue=args.max_queue,
        max_queue_tokens=args.max_queue_tokens,
        warm_up=not args.no_warm_up,
    )
    return serve(settings, start, args.replicas)
