"""Where the seconds to the first token go: a timeline of a start, and how fast weights go up.

    python -m scripts.profile_start FILE [--stages first warm sweep] [--kernels auto] [--no-gate]

first, warm   a process of its own, with an empty cache of programs and with that of the first: when each step
              began and how long it took, and every program with the thread that made it.
sweep         on a GPU: the load of all weights again and again with other numbers of readers and pieces,
              and its parts by themselves (read, send, both).

Results are printed as they come; the last line is one JSON object.
"""

import argparse
import cProfile
import io
import json
import pstats
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from scripts._children import programs_in, results_of, say
from scripts._thread_times import watched

SWEEP = ((4, 16), (6, 16), (8, 16), (12, 16), (6, 32), (8, 32), (8, 8), (12, 8))
"""Readers, and MiB of a piece."""

_began = time.perf_counter()


@contextmanager
def step(name: str) -> Iterator[None]:
    """Says when a step began, how long it took and in which thread."""
    began = time.perf_counter()
    yield
    took = time.perf_counter() - began
    if took > 0.01:
        thread = threading.current_thread().name
        say(step=name, at=round(began - _began, 3), seconds=round(took, 3), thread=thread)


def timed(owner: Any, name: str, label: str | None = None) -> None:
    """Makes ``owner.name`` say how long each call takes."""
    inner: Callable[..., Any] = getattr(owner, name)

    def outer(*args: Any, **kwargs: Any) -> Any:
        with step(label or name):
            return inner(*args, **kwargs)

    setattr(owner, name, outer)


def start(options: dict[str, Any]) -> None:
    """A start up to the second token, with its steps."""
    with watched() if options["threads"] else nullcontext({}) as threads:
        _start(options)
    for name, found in threads.items():
        say(of_thread=name, found=found)


def _start(options: dict[str, Any]) -> None:
    with step("import api"):
        from qwen3_moe_jax import api, loader
        from qwen3_moe_jax.core.sampling import Sampling
        from qwen3_moe_jax.machine import nvidia
    timed(nvidia, "nvidia_report", "nvidia-smi"), timed(loader, "start_driver", "cuInit")
    timed(loader, "start_gpu"), timed(loader, "jax_devices")
    with step("import JAX and the backend"):  # a load does it beside the start of a GPU
        import jax

        from qwen3_moe_jax.jax_backend import device_load, params, placement, program_farm, programs, runner
        from qwen3_moe_jax.jax_backend.session_programs import Session
        from qwen3_moe_jax.kernels_pallas.gpu import device as gpu
    _note_programs(programs)
    _note_workers(program_farm)
    (
        timed(api, "open_model"),
        timed(api, "check_once"),
        timed(api.Tokenizer, "built"),
        timed(loader, "make_runner"),
    )
    timed(placement, "load_params"), timed(params, "allocate"), timed(params, "device_plan")
    timed(params, "wanted_programs"), timed(params, "_vectors"), timed(device_load.Checks, "raise_first")
    timed(gpu, "import_kernels"), timed(loader, "import_jax")
    timed(Session, "of"), timed(runner.Native, "kernels"), timed(runner.Placement, "plan")
    profile = cProfile.Profile()
    if options["profile"]:
        profile.enable()
    model = api.load(
        options["model"], backend="jax", kernels=options["kernels"], gate=options["gate"], first_prompt=3
    )
    say(step="loaded", at=round(time.perf_counter() - _began, 3))
    tokens = model.runner.stream([1, 2, 3], max_tokens=2, sampling=Sampling(temperature=0))
    for name in ("first token", "second token"):
        next(tokens)
        say(step=name, at=round(time.perf_counter() - _began, 3))
    if options["profile"]:
        profile.disable()
        text = io.StringIO()
        pstats.Stats(profile, stream=text).sort_stats("tottime").print_stats(25)
        print(text.getvalue(), flush=True)
    tokens.close()
    long = model.runner.stream(list(range(1, 101)), max_tokens=2, sampling=Sampling(temperature=0))
    with step("first token of a prompt of 100"):
        next(long)
    long.close()
    model.close()
    say(jax=jax.__version__)


def _note_programs(programs: Any) -> None:
    """Every program with how it came to be, and the parts of a compilation in this process."""
    inner, timed_lower = programs.Program._compile, programs.Program._lowered

    def compiled(self: Any, entry: Any, arguments: Any) -> None:
        began = time.perf_counter()
        inner(self, entry, arguments)
        took, thread = time.perf_counter() - began, threading.current_thread().name
        say(program=self.name, at=round(began - _began, 3), compile=round(took, 3), thread=thread)

    def lowered(entry: Any) -> Any:
        with step("lower"):
            return timed_lower(entry)

    programs.Program._compile, programs.Program._lowered = compiled, staticmethod(lowered)
    timed(programs.Program, "_traced", "trace")
    programs.listen(
        lambda name, made: made and say(made=name, by=made.source, seconds=round(made.seconds, 3))
    )


def _note_workers(program_farm: Any) -> None:
    """What other processes compile, and when they began it."""
    inner = program_farm._Worker.ask

    def asked(self: Any, message: Any, seconds: float) -> str:
        static = message.get("static", {})
        name = message["program"].rpartition(":")[2] if "program" in message else "start"
        with step(f"worker {self._process.pid}: {name} {static.get('chunk', '')}".rstrip()):
            return inner(self, message, seconds)

    program_farm._Worker.ask = asked


def sweep(options: dict[str, Any]) -> None:
    """The load of all weights with other settings, and its parts."""
    import jax

    from qwen3_moe_jax import loader
    from qwen3_moe_jax.convert.open_model import open_model
    from qwen3_moe_jax.jax_backend import device_load, params, programs

    programs.use_default_store()
    device = loader.jax_devices()[0]
    with open_model(options["model"]) as source:
        for readers, mib in ((options["readers"], options["mib"]), *SWEEP):
            device_load.READERS, device_load.PIECE_BYTES = readers, mib << 20
            made: list[float] = []
            stop = programs.listen(lambda _, what, made=made: made.append(what.seconds) if what else None)
            times = {}
            for attempt in ("first", "again"):
                began = time.perf_counter()
                found = params.load_on_device(source, params.GPU_ROLES, device)
                jax.block_until_ready(jax.tree.leaves(found))
                times[attempt] = round(time.perf_counter() - began, 3)
                jax.tree.map(lambda array: array.delete(), found)
                del found
            stop()
            say(readers=readers, mib=mib, **times, programs_s=round(sum(made), 2), gb=source.nbytes / 1e9)
        for readers, mib in ((1, 16), (6, 16), (12, 16), (8, 8)):
            for part in ("read", "send", "read and send"):
                say(
                    part=part,
                    readers=readers,
                    mib=mib,
                    gb_per_s=_rate(source, device, part, readers, mib << 20),
                )


def _rate(source: Any, device: Any, part: str, readers: int, piece: int) -> float:
    """GB per second of reading, of sending, or of both, by so many threads."""
    from concurrent.futures import ThreadPoolExecutor

    import jax
    import numpy as np

    from qwen3_moe_jax.convert.unpack import aligned_empty

    local = threading.local()
    places = [
        (path, at)
        for path in source.paths()
        for at in range(0, source.tensor_nbytes(path) - piece + 1, piece)
    ][: (8 << 30) // piece]

    def one(place: tuple[str, int]) -> None:
        if not hasattr(local, "buffer"):
            local.buffer = aligned_empty((piece,), np.uint8)
            local.buffer[:] = 1
        if "read" in part:
            source.read_blocks(*place, local.buffer)
        if "send" in part:
            jax.device_put(local.buffer, device).block_until_ready()

    began = time.perf_counter()
    with ThreadPoolExecutor(readers) as pool:
        list(pool.map(one, places))
    return round(len(places) * piece / 1e9 / (time.perf_counter() - began), 2)


CHILDREN = {"first": start, "warm": start, "sweep": sweep}


def main() -> None:
    """Runs the stages."""
    if sys.argv[1:2] == ["--child"]:
        CHILDREN[sys.argv[2]](json.loads(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="a .gguf file; none is the embedded model")
    parser.add_argument("--stages", nargs="*", choices=CHILDREN, default=["first", "warm"])
    parser.add_argument("--kernels", default="auto")
    parser.add_argument(
        "--no-gate", dest="gate", action="store_false", help="without the check at a first load"
    )
    parser.add_argument("--profile", action="store_true", help="first, warm: the main thread's, by cProfile")
    parser.add_argument("--threads", action="store_true", help="first, warm: what each thread does, and when")
    parser.add_argument("--readers", type=int, default=6, help="sweep: the first to be tried")
    parser.add_argument("--mib", type=int, default=16)
    parser.add_argument("--cache", metavar="FOLDER", help="programs are kept there (default: nowhere)")
    parser.add_argument("--stage-limit", type=float, default=180, help="seconds")
    args = parser.parse_args()
    with programs_in(args.cache) as cache:
        run = lambda stage: results_of("profile_start", stage, vars(args), cache, args.stage_limit)
        results = {stage: [found for _, found in run(stage)] for stage in args.stages}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
