"""Loads and decodes a random file of a published mixture in a process with a limit on its memory.

    python -m scripts.check_memory_limit --mix Q2_K --plan       # what a 30B model will take; loads nothing
    python -m scripts.check_memory_limit --mix Q2_K --limit 16G  # writes the file, 11.3 GB, and runs it
    python -m scripts.check_memory_limit --mix IQ4_XS --limit 16G --resident 0.91
    python -m scripts.check_memory_limit --mix Q2_K --layers 2 --limit 3G

The model starts twice, its gate on, with a cache folder that is empty at first: where the weights do not fit,
the first start writes their file and the second finds it.

The limit is a control group's (``systemd-run --scope -p MemoryMax=``) where this user may make one; the
kernel ends the process that passes it. Elsewhere it is ``RLIMIT_DATA``, which counts what a process allocates
and not what it uses: stricter, but for a file that is mapped, which it does not count. What memory would not
hold of one is then given back by hand: with ``--resident S``, after each token random pieces of it, until a
share S is resident. The last line is JSON with the plan, the limit's kind, peaks and rates; the peak of
anonymous memory is looked at every 20 ms.
"""

import argparse
import ctypes
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwen3_moe_jax.convert.config import PRESETS, Qwen3MoeConfig
from qwen3_moe_jax.convert.packed import packed_nbytes
from qwen3_moe_jax.convert.tensor_names import tensor_specs
from qwen3_moe_jax.machine.memory import WORKING_BYTES, cache_nbytes
from qwen3_moe_jax.testing.mixes import mix_types
from qwen3_moe_jax.testing.random_models import tensor_nbytes, write_random_gguf

UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
CACHE_ITEM = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}

MADV_PAGEOUT = 21
"""Gives pages back (Linux 5.4 and later); the mmap module has no name for it."""

UNIT = 256 << 10
"""Bytes that are given back together."""

SAMPLE_SECONDS = 0.02


def size(text: str) -> int:
    """Bytes of a number with K, M or G behind it."""
    return int(float(text[:-1]) * UNITS[text[-1]]) if text[-1] in UNITS else int(text)


def plan(config: Qwen3MoeConfig, mix: str, context: int, itemsize: int) -> dict[str, int]:
    """Bytes of the file, and of what a process holds."""
    types = mix_types(mix, config)
    specs = tensor_specs(config)
    held = {
        "weights": sum(packed_nbytes(types[s.path], s.shape) for s in specs),
        "cache": cache_nbytes(config, context, itemsize),
        "working": WORKING_BYTES,
    }
    return {
        "file": sum(tensor_nbytes(s.shape, types[s.path]) for s in specs),
        **held,
        "total": sum(held.values()),
    }


def limited(command: list[str], limit: int, cache: Path) -> tuple[str, subprocess.CompletedProcess]:
    """Runs a command under the limit; the first value says which kind it is."""
    options: Any = {
        "capture_output": True,
        "text": True,
        "env": {**os.environ, "QWEN3_MOE_CACHE": str(cache)},
    }
    if shutil.which("systemd-run"):
        scope = ["systemd-run", "--scope", "--quiet", "-p", f"MemoryMax={limit}", "-p", "MemorySwapMax=0"]
        for user in ([], ["--user"]):
            if subprocess.run([scope[0], *user, *scope[1:], "true"], capture_output=True).returncode == 0:
                return "control group", subprocess.run([scope[0], *user, *scope[1:], *command], **options)
    bound = lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    return "RLIMIT_DATA", subprocess.run(command, preexec_fn=bound, **options)


def status(name: str) -> int:
    """Bytes of a line of this process' status, such as RssAnon."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


class AnonymousPeak(threading.Thread):
    """The most anonymous memory that was seen.

    Attributes:
      nbytes: so far.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.nbytes = 0

    def run(self) -> None:
        while True:
            self.nbytes = max(self.nbytes, status("RssAnon"))
            time.sleep(SAMPLE_SECONDS)


class Resident:
    """Holds the share of a mapped file of weights that is resident."""

    def __init__(self, share: float):
        lines = Path("/proc/self/maps").read_text().splitlines()
        line = next(line for line in lines if line.endswith("weights.bin"))
        self._start, end = (int(part, 16) for part in line.split()[0].split("-"))
        self._size, self._random = end - self._start, random.Random(0)
        self._other = max(0, status("RssFile") - self._size)
        self._most = int(self._size * share) + self._other
        self._libc = ctypes.CDLL(None, use_errno=True)

    def hold(self) -> None:
        """Gives random pieces back until no more than the share is there."""
        while (over := status("RssFile") - self._most) > 0:
            for _ in range(-(-over // UNIT)):
                at = self._start + self._random.randrange(self._size // UNIT) * UNIT
                if self._libc.madvise(ctypes.c_void_p(at), ctypes.c_size_t(UNIT), MADV_PAGEOUT):
                    raise OSError(ctypes.get_errno(), "madvise")


def decode(model: Any, tokens: int, resident: Resident | None) -> dict[str, Any]:
    """Tokens/s of a sampled text, and what they read from the disk; time to hold memory is not counted."""
    from qwen3_moe_jax.core.sampling import Sampling

    before, seconds, count = resource.getrusage(resource.RUSAGE_SELF), 0.0, 0
    stream = model.runner.stream([1], max_tokens=tokens + 1, sampling=Sampling(temperature=1.0, seed=1))
    next(stream)
    began = time.perf_counter()
    for _ in stream:
        seconds, count = seconds + time.perf_counter() - began, count + 1
        if resident is not None:
            resident.hold()
        began = time.perf_counter()
    after = resource.getrusage(resource.RUSAGE_SELF)
    found: dict[str, Any] = {"tokens": count, "tokens_per_s": count / seconds}
    return found | {"major_faults_per_token": (after.ru_majflt - before.ru_majflt) / count}


def child(args: argparse.Namespace) -> None:
    """What runs under the limit: loads, reads a prompt, writes tokens; prints one line of JSON."""
    peak = AnonymousPeak()
    peak.start()
    import qwen3_moe_jax as q3

    began = time.perf_counter()
    context, kv_cache = args.context, args.kv_cache
    with q3.load(args.file, backend=args.backend, max_context=context, kv_cache=kv_cache) as model:
        loaded = time.perf_counter()
        model.generate("a", max_tokens=2, temperature=0)
        first = time.perf_counter()
        found = decode(model, args.tokens, None)
        weights = str(model.runner.describe().get("weights", ""))
        if args.resident and weights:
            found["resident"] = {
                "share": args.resident,
                **decode(model, args.tokens, Resident(args.resident)),
            }
    seconds = {"load_s": loaded - began, "first_text_s": first - began}
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    mapped = weights and f"mapped: {weights.partition(': ')[2]}"
    peaks = {"peak_anonymous": peak.nbytes, "peak_resident": highest, "weights": mapped}
    print(json.dumps({**seconds, **found, **peaks}))


def child_command(args: argparse.Namespace, path: Path) -> list[str]:
    """This script again, as :func:`child`."""
    command = [sys.executable, "-m", "scripts.check_memory_limit", "--child", "--file", str(path)]
    command += ["--context", str(args.context), "--kv-cache", args.kv_cache]
    command += ["--resident", str(args.resident)]
    return [*command, "--tokens", str(args.tokens), "--backend", args.backend]


def main(argv: list[str] | None = None) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--mix", default="Q2_K", help="as make_random_gguf takes it")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="Qwen3-30B-A3B")
    parser.add_argument("--layers", type=int, help="fewer than the preset has")
    parser.add_argument("--limit", type=size, default=size("16G"), help="bytes, or with K, M or G")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--kv-cache", choices=list(CACHE_ITEM), default="float32")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--resident", type=float, default=0.0, metavar="S", help="share of a mapped file")
    parser.add_argument("--cache", type=Path, help="the cache folder (default: a new one, removed)")
    parser.add_argument("--backend", default="jax")
    parser.add_argument("--file", type=Path, help="where the model is, or is written and kept")
    parser.add_argument("--plan", action="store_true", help="say what it will take, and stop")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        child(args)
        return 0
    config = PRESETS[args.preset]
    config = replace(config, num_hidden_layers=args.layers or config.num_hidden_layers)
    planned = plan(config, args.mix, args.context, CACHE_ITEM[args.kv_cache])
    result = {
        "mix": args.mix,
        "layers": config.num_hidden_layers,
        "context": args.context,
        "limit": args.limit,
    }
    result |= {"kv_cache": args.kv_cache, "plan": planned, "fits": planned["total"] <= args.limit}
    if args.plan:
        print(json.dumps(result))
        return int(not result["fits"])
    with tempfile.TemporaryDirectory() as folder:
        path = args.file or Path(folder) / "model.gguf"
        if not path.exists():
            write_random_gguf(path, config, mix=args.mix)
        starts: list[dict[str, Any]] = []
        for _ in range(2):
            kind, done = limited(child_command(args, path), args.limit, args.cache or Path(folder) / "cache")
            lines = done.stdout.strip().splitlines()
            good = done.returncode == 0 and lines
            starts.append(json.loads(lines[-1]) if good else {"error": done.stderr[-500:]})
            if not good:
                break
    print(json.dumps({**result, "limit_kind": kind, "rc": done.returncode, "starts": starts}))
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
