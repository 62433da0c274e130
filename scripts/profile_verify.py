"""Where the seconds of ``qwen3-moe verify`` go: what runs when, and what keeps the processors busy.

    python -m scripts.profile_verify -m FILE --backend jax:bfloat16

Options are those of ``verify``, whose lines are printed as always. Beside them comes a line for each piece of
evidence, each request to the processes that share the reference's work and each program, when it ends; and
every two seconds the processors that each kind of process has kept busy (Linux).
"""

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

EVERY_SECONDS = 2.0

KINDS = ("crew_worker", "program_worker", "ptxas", "verify")
"""Of processes, by what their command lines have in them."""

TICKS = 100
"""Of processor time, per second."""

_began = time.perf_counter()


def say(text: str) -> None:
    """One line with the seconds since the start."""
    sys.stderr.write(f"[{time.perf_counter() - _began:6.2f}] {text}\n")


def timed(owner: Any, name: str, label: Callable[..., str]) -> None:
    """Makes ``owner.name`` say when each call began and how long it took."""
    inner = getattr(owner, name)

    def outer(*args: Any, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            return inner(*args, **options)
        finally:
            took = time.perf_counter() - began
            if took > 0.05:
                say(f"{label(*args, **options):40} from {began - _began:6.2f} for {took:6.2f} s")

    setattr(owner, name, outer)


def ticks_by_kind() -> Counter[str]:
    """Processor time of each kind of process so far."""
    found: Counter[str] = Counter()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        kind = next((kind for kind in KINDS if kind in command), "others")
        found[kind] += int(fields[11]) + int(fields[12])
    return found


def watch() -> None:
    """Says what each kind has kept busy, until the process ends."""
    before = ticks_by_kind()
    while True:
        time.sleep(EVERY_SECONDS)
        now = ticks_by_kind()
        busy = {kind: (now[kind] - before[kind]) / TICKS / EVERY_SECONDS for kind in now}
        say("busy " + ", ".join(f"{kind} {n:.1f}" for kind, n in sorted(busy.items()) if n > 0.05))
        before = now


def main() -> int:
    """Runs ``verify``."""
    from qwen3_moe_jax import cli, loader
    from qwen3_moe_jax.commands import verify
    from qwen3_moe_jax.parity import evidence
    from qwen3_moe_jax.parity.crew import Crew

    say("imported")
    timed(Crew, "ask", lambda crew, name, **_: f"crew {name}")
    timed(loader, "start_gpu", lambda: "start_gpu")
    timed(loader, "make_runner", lambda *_, **__: "make_runner")
    inner = evidence.Lazily.__init__

    def lazily(self: Any, compute: Callable[[], Any]) -> None:
        inner(self, compute)
        name = getattr(getattr(compute, "func", compute), "__name__", "?")
        timed(self, "_compute", lambda: f"evidence {name} {getattr(compute, 'args', ('',))[-1]!s:.12}")

    evidence.Lazily.__init__ = lazily
    if Path("/proc/self/stat").exists():
        threading.Thread(target=watch, daemon=True).start()
    real = verify.unloaded_runners

    def runners(*args: Any) -> Any:
        from qwen3_moe_jax.jax_backend import programs

        programs.listen(lambda name, made: made and say(f"{name} by {made.source}, {made.seconds:.2f} s"))
        return real(*args)

    verify.unloaded_runners = runners
    return cli.main(["verify", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
