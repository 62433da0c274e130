"""Throws mutated GGUF files at the reader: each must open or end in one ``ModelFileError``.

Every mutant goes through all that a load does before weights are used: header,
shards, tensor bytes, types, hyper-parameters, the table of tensors, the
vocabulary. A crash, more than one second of CPU time, or any other exception
(MemoryError under a limit of 1 GB of address space is one) is a failure.

A mutant depends on the seed and its number alone:

    python -m scripts.fuzz_gguf --count 20000
    python -m scripts.fuzz_gguf --seed 7 --first 123 --count 1 --keep /tmp/mutant.gguf

The last line of the output is JSON; the exit code is 0 only without a failure.
"""

import argparse
import json
import os
import platform
import random
import resource
import secrets
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from qwen3_moe_jax.convert.config import Qwen3MoeConfig, RopeScaling, check_architecture
from qwen3_moe_jax.convert.errors import ModelFileError
from qwen3_moe_jax.convert.gguf_file import GGUFFile
from qwen3_moe_jax.convert.tensor_names import check_tensors
from qwen3_moe_jax.convert.tokenizer_metadata import check_tokenizer
from qwen3_moe_jax.machine.child_environment import child_environment
from qwen3_moe_jax.testing.gguf_builder import (
    F64,
    I8,
    I32,
    I64,
    TINY,
    U16,
    GGUFBuilder,
    Tensor,
    Typed,
    model_builder,
    model_metadata,
    model_tensors,
)

MUTANT_NAME = "m-00001-of-00002.gguf"
HANG_SECONDS = 1.0
MEMORY_LIMIT = 10**9
_FAILURES_SHOWN = 10

_EDGES = [e + d for e in (0, 2**8, 2**15, 2**16, 2**31, 2**32, 2**40, 2**63, 2**64) for d in (-1, 0, 1)]
_EDGES += [2, 3, 7, 8, 9, 13, 24, 30, 31, 63, 64, 2**24, 2**30, 500_000_000]


class _HangError(BaseException):
    """Not an ``Exception``, so that nothing under test can swallow it."""


def base_files() -> list[bytes]:
    """The sound files that mutants are made of; :func:`write_sibling` completes the last one."""
    small = replace(TINY, hidden_size=8, num_hidden_layers=1, moe_intermediate_size=8)
    tied = replace(small, tie_word_embeddings=True, num_experts=2)
    rope = RopeScaling("yarn", 4.0, 64)
    values = {
        "general.architecture": "other",
        "general.alignment": 64,
        "a": Typed(I8, -3),
        "b": Typed(F64, 0.5),
        "c": Typed(I64, [-1, 2**40]),
        "d": [True, False],
        "e": ["", "ü", "text"],
        "split.count": Typed(U16, 1),
        "split.no": Typed(U16, 0),
    }
    tensors = [
        Tensor("k", (2, 256), 12),
        Tensor("none", (0, 4)),
        Tensor("q", (3, 32), 8),
        Tensor("i", (2, 2), 24),
    ]
    return [
        model_builder(small).build(),
        model_builder(replace(tied, rope_scaling=rope)).build(),
        GGUFBuilder(model_metadata(tied), model_tensors(tied)).build(),
        GGUFBuilder(values, tensors, alignment=64).build(),
        GGUFBuilder(values, tensors, alignment=64, version=2).build(),
        _shard(0),
    ]


def _shard(number: int) -> bytes:
    split = {
        "split.no": Typed(U16, number),
        "split.count": Typed(U16, 2),
        "split.tensors.count": Typed(I32, 4),
    }
    return GGUFBuilder(split, [Tensor(f"{number}.{i}") for i in range(2)]).build()


def write_sibling(folder: Path) -> Path:
    """Shard 2 of 2 in ``folder``; returns the path that makes a mutant its first shard."""
    (folder / "m-00002-of-00002.gguf").write_bytes(_shard(1))
    return folder / MUTANT_NAME


def mutate(bases: list[bytes], seed: int, number: int) -> bytes:
    """Mutant ``number`` of ``seed``."""
    rng = random.Random(f"{seed}:{number}")
    data = bytearray(rng.choice(bases))
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        rng.choice(_MUTATIONS)(data, rng, bases)
    return bytes(data)


def _position(data: bytearray, rng: random.Random) -> int:
    """Any byte, but mostly one of the header, and often one of its first hundred."""
    limit = rng.choice((100, 1500, 1500, 12_000, len(data)))
    return rng.randrange(max(1, min(limit, len(data))))


def _flip_bit(data: bytearray, rng: random.Random, bases: list[bytes]) -> None:
    if data:
        data[_position(data, rng)] ^= 1 << rng.randrange(8)


def _set_byte(data: bytearray, rng: random.Random, bases: list[bytes]) -> None:
    if data:
        data[_position(data, rng)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))


def _set_integer(data: bytearray, rng: random.Random, bases: list[bytes]) -> None:
    at, code = _position(data, rng), rng.choice(("<I", "<Q"))
    size = struct.calcsize(code)
    if at + size <= len(data):
        struct.pack_into(code, data, at, rng.choice(_EDGES) % 2 ** (8 * size))


def _nudge_integer(data: bytearray, rng: random.Random, bases: list[bytes]) -> None:
    at = _position(data, rng)
    if at + 8 <= len(data):
        (value,) = struct.unpack_from("<Q", data, at)
        struct.pack_into("<Q", data, at, (value + rng.choice((-32, -1, 1, 32, 2**32))) % 2**64)


def _insert(data: bytearray, rng: random.Random, bases: list[bytes]) -> None:
    at = _position(data, rng)
    data[at:at] = rng.randbytes(rng.choice((1, 4, 8, 32)))


def _delete(data: bytearray, rng: random.Random, bases: list[bytes]) -> None:
    at = _position(data, rng)
    del data[at : at + rng.choice((1, 4, 8, 32, 500))]


def _cut(data: bytearray, rng: random.Random, bases: list[bytes]) -> None:
    del data[rng.choice((_position(data, rng), max(0, len(data) - rng.randrange(1, 40)))) :]


def _repeat(data: bytearray, rng: random.Random, bases: list[bytes]) -> None:
    at = _position(data, rng)
    data[at:at] = data[at : at + rng.randrange(1, 200)] * rng.choice((1, 2, 20))


def _splice(data: bytearray, rng: random.Random, bases: list[bytes]) -> None:
    other = rng.choice(bases)
    at, start = _position(data, rng), _position(bytearray(other), rng)
    piece = other[start : start + rng.randrange(1, 300)]
    data[at : at + rng.choice((0, len(piece)))] = piece


_Mutation = Callable[[bytearray, random.Random, list[bytes]], None]
_MUTATIONS: tuple[_Mutation, ...] = (
    _flip_bit,
    _flip_bit,
    _set_byte,
    _set_byte,
    _set_integer,
    _set_integer,
    _nudge_integer,
    _insert,
    _delete,
    _cut,
    _repeat,
    _splice,
)


def load(path: Path) -> str:
    """All that a load checks before it uses weights; says how far the file came."""
    try:
        with GGUFFile.open(path) as file:
            for info in file.tensors.values():
                file.read(info)
            return _build_model(file)
    except ModelFileError as error:
        if not str(error).isprintable():
            raise ValueError(f"message is not one printable line: {error!r}") from error
        return error.code


def _build_model(file: GGUFFile) -> str:
    try:
        for info in file.tensors.values():
            _ = info.type
        check_architecture(file.metadata)
        embedding = file.tensors.get("token_embd.weight")
        config = Qwen3MoeConfig.from_metadata(
            file.metadata,
            tie_word_embeddings="output.weight" not in file.tensors,
            vocab_size=embedding.shape[0] if embedding else 0,
        )
        check_tensors(file, config)
        check_tokenizer(file.metadata, config.vocab_size)
    except ModelFileError as error:
        return f"opened, then {error.code}"
    return "sound"


def _raise_hang(*_: object) -> None:
    raise _HangError


def work(args: argparse.Namespace) -> None:
    """The child: runs mutants until the end or the first crash; its results are its last line."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    signal.signal(signal.SIGPROF, _raise_hang)
    bases = base_files()
    endings: Counter[str] = Counter()
    failures: list[str] = []
    slowest = 0.0
    path = write_sibling(args.folder)
    progress = os.open(args.folder / "number", os.O_WRONLY | os.O_CREAT)
    for number in range(args.first, args.first + args.count):
        os.pwrite(progress, b"%20d" % number, 0)
        path.write_bytes(mutate(bases, args.seed, number))
        start = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, HANG_SECONDS)
        try:
            endings[load(path)] += 1
        except _HangError:
            endings["HANG"] += 1
            failures.append(f"mutant {number}: over {HANG_SECONDS:g} s")
        except Exception as error:  # the very thing that is looked for
            endings["OTHER"] += 1
            failures.append(f"mutant {number}: {type(error).__name__}: {error}")
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        slowest = max(slowest, time.process_time() - start)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps({"endings": endings, "failures": failures, "slowest": slowest, "kib": usage.ru_maxrss}))


def run(args: argparse.Namespace) -> dict[str, object]:
    """Runs children over all mutants, a new one after each crash; returns the summary."""
    endings: Counter[str] = Counter()
    failures: list[str] = []
    slowest, kib, first, last = 0.0, 0, args.first, args.first + args.count
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        while first < last:
            count = min(args.batch, last - first)
            command = [sys.executable, *(["-O"] if args.optimize else []), "-m", "scripts.fuzz_gguf"]
            command += [
                "--worker",
                folder,
                "--seed",
                str(args.seed),
                "--first",
                str(first),
                "--count",
                str(count),
            ]
            child = subprocess.run(
                command, stdout=subprocess.PIPE, text=True, env=child_environment(OPENBLAS_NUM_THREADS="1")
            )
            if child.returncode:
                crashed = int((Path(folder) / "number").read_text())
                endings["CRASH"] += 1
                failures.append(f"mutant {crashed}: the process ended with {child.returncode}")
                first = crashed + 1
                continue
            result = json.loads(child.stdout.splitlines()[-1])
            endings.update(result["endings"])
            failures += result["failures"]
            slowest, kib = max(slowest, result["slowest"]), max(kib, result["kib"])
            first += count
            print(f"{first - args.first} of {args.count}, {len(failures)} failures", file=sys.stderr)
        if args.keep:
            shutil.copy(Path(folder) / MUTANT_NAME, args.keep)
    for failure in failures[:_FAILURES_SHOWN]:
        print(failure)
    return {
        "seed": args.seed,
        "first": args.first,
        "count": args.count,
        "crashes": endings.pop("CRASH", 0),
        "hangs": endings.pop("HANG", 0),
        "other_exceptions": endings.pop("OTHER", 0),
        "endings": dict(endings.most_common()),
        "slowest_cpu_seconds": round(slowest, 4),
        "peak_resident_mib": round(kib / 1024, 1),
        "memory_limit_bytes": MEMORY_LIMIT,
        "seconds": round(time.monotonic() - start, 1),
        "python": platform.python_version() + (" -O" if args.optimize else ""),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=20_000, help="mutants to try")
    parser.add_argument("--seed", type=int, default=None, help="default: a new one, printed")
    parser.add_argument("--first", type=int, default=0, help="number of the first mutant")
    parser.add_argument("--batch", type=int, default=50_000, help="mutants of one child process")
    parser.add_argument("--optimize", action="store_true", help="run under python -O")
    parser.add_argument("--keep", type=Path, help="copy the last mutant here")
    parser.add_argument("--worker", dest="folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.seed is None:
        args.seed = secrets.randbelow(2**32)
    if args.folder:
        work(args)
        return 0
    print(f"seed {args.seed}")
    summary = run(args)
    print(json.dumps(summary))
    return 0 if not (summary["crashes"] or summary["hangs"] or summary["other_exceptions"]) else 1


if __name__ == "__main__":
    sys.exit(main())
