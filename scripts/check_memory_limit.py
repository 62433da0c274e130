"""Loads and decodes a random file of a published mixture in a process with a limit on its memory.

    python -m scripts.check_memory_limit --mix Q2_K --plan       # what a 30B model will take; loads nothing
    python -m scripts.check_memory_limit --mix Q2_K --limit 16G  # writes the file, 11.3 GB, and runs it
    python -m scripts.check_memory_limit --mix IQ4_XS --limit 16G --context 1024 --kv-cache int8
    python -m scripts.check_memory_limit --mix Q2_K --layers 2 --limit 3G

The limit is a control group's (``systemd-run --scope -p MemoryMax=``) where this user may make one; the
kernel ends the process that passes it. Elsewhere it is ``RLIMIT_DATA``, which counts what a process allocates
and not what it uses: stricter. The last line is JSON with the plan, the limit's kind, the peak and the rates.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from qwen3_moe_jax.convert.config import PRESETS, Qwen3MoeConfig
from qwen3_moe_jax.convert.packed import packed_nbytes
from qwen3_moe_jax.convert.tensor_names import tensor_specs
from qwen3_moe_jax.machine.memory import WORKING_BYTES, cache_nbytes
from qwen3_moe_jax.testing.mixes import mix_types
from qwen3_moe_jax.testing.random_models import tensor_nbytes, write_random_gguf

UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
CACHE_ITEM = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


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


def limited(command: list[str], limit: int) -> tuple[str, subprocess.CompletedProcess]:
    """Runs a command under the limit; the first value says which kind it is."""
    if shutil.which("systemd-run"):
        scope = ["systemd-run", "--scope", "--quiet", "-p", f"MemoryMax={limit}", "-p", "MemorySwapMax=0"]
        for user in ([], ["--user"]):
            if subprocess.run([scope[0], *user, *scope[1:], "true"], capture_output=True).returncode == 0:
                done = subprocess.run([scope[0], *user, *scope[1:], *command], capture_output=True, text=True)
                return "control group", done
    bound = lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    return "RLIMIT_DATA", subprocess.run(command, capture_output=True, text=True, preexec_fn=bound)


def child(path: str, context: int, kv_cache: str | None, tokens: int, backend: str) -> None:
    """What runs under the limit: loads, reads a prompt, writes tokens; prints one line of JSON."""
    import qwen3_moe_jax as q3

    began = time.perf_counter()
    with q3.load(path, backend=backend, max_context=context, kv_cache=kv_cache, gate=False) as model:
        loaded = time.perf_counter()
        model.generate("a", max_tokens=2, temperature=0)
        warm = time.perf_counter()
        answer = model.generate("a", max_tokens=tokens, temperature=0)
        seconds = time.perf_counter() - warm
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    figures = {"load_s": loaded - began, "tokens": len(answer.tokens), "tokens_per_s": tokens / seconds}
    print(json.dumps({**figures, "peak_resident": peak}))


def child_command(args: argparse.Namespace, path: Path) -> list[str]:
    """This script again, as :func:`child`."""
    command = [sys.executable, "-m", "scripts.check_memory_limit", "--child", "--file", str(path)]
    command += ["--context", str(args.context), "--kv-cache", args.kv_cache]
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
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--backend", default="jax")
    parser.add_argument("--file", type=Path, help="where the model is, or is written and kept")
    parser.add_argument("--plan", action="store_true", help="say what it will take, and stop")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        child(str(args.file), args.context, args.kv_cache, args.tokens, args.backend)
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
        kind, done = limited(child_command(args, path), args.limit)
    lines = done.stdout.strip().splitlines()
    found = json.loads(lines[-1]) if done.returncode == 0 and lines else {"error": done.stderr[-500:]}
    print(json.dumps({**result, "limit_kind": kind, "rc": done.returncode, **found}))
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
