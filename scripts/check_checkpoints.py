"""What a packed checkpoint survives: flipped bits, kill -9, a full disk, two writers at once.

    python -m scripts.check_checkpoints --receipt docs/receipts/checkpoint_integrity.json

runs 1,000 single-bit flips, 200 kills at random moments, 20 full disks (really
full, on a small tmpfs, where the user may mount one; injected otherwise) and 20
pairs of writers, on a small random model. The tests run a few of each with the
same functions. The last line of output is JSON; the exit code is 0 if nothing
was lost.
"""

import argparse
import builtins
import errno
import hashlib
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

from qwen3_moe_jax.commands.convert import silence_orbax
from qwen3_moe_jax.convert.checkpoint_writer import checkpoint_nbytes, write_checkpoint
from qwen3_moe_jax.convert.errors import ModelFileError
from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.convert.output_folder import OutputError
from qwen3_moe_jax.machine.child_environment import child_environment
from qwen3_moe_jax.testing.random_models import SMALL, write_random_gguf
from scripts import leave

_READY = b"ready\n"
_BUSY_EXIT = 4


def load_everything(path: Path) -> None:
    """Reads and verifies all of a model."""
    with open_model(path) as source:
        for _ in source.tensors():
            pass


def fingerprint(folder: Path) -> str:
    """SHA-256 of the names and the bytes of all files of a folder."""
    digest = hashlib.sha256()
    for file in sorted(f for f in folder.rglob("*") if f.is_file()):
        digest.update(f"{file.relative_to(folder)}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def convert(model: Path, out: Path) -> None:
    """Writes the checkpoint of a model, in this process."""
    with open_model(model) as source:
        write_checkpoint(source, out)


# Flipped bits


def missed_flips(checkpoint: Path, count: int, rng: random.Random) -> list[str]:
    """Flips single bits, one at a time, over all files; returns those that loading did not notice."""
    files = sorted(f for f in checkpoint.rglob("*") if f.is_file())
    missed = []
    for i in range(count):
        # Every file in turn, then at random by size, so that neither small nor large ones are left out.
        file = files[i] if i < len(files) else rng.choices(files, [f.stat().st_size for f in files])[0]
        bit = rng.randrange(8 * file.stat().st_size)
        flip_bit(file, bit)
        try:
            load_everything(checkpoint)
            missed.append(f"bit {bit} of {file.relative_to(checkpoint)}")
        except ModelFileError:
            pass
        finally:
            flip_bit(file, bit)
    load_everything(checkpoint)
    return missed


def flip_bit(file: Path, bit: int) -> None:
    """Changes one bit of a file, in place."""
    with open(file, "r+b") as stream:
        stream.seek(bit // 8)
        byte = stream.read(1)[0]
        stream.seek(bit // 8)
        stream.write(bytes([byte ^ 1 << bit % 8]))


# Processes that write


def ready_writer(model: Path, out: Path) -> subprocess.Popen:
    """A process that has loaded its modules and waits for :func:`begin` to write ``out``."""
    command = [sys.executable, "-m", "scripts.check_checkpoints", "--write", str(model), str(out)]
    environment = child_environment(JAX_PLATFORMS="cpu")
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    )
    if process.stdout.readline() != _READY:
        raise RuntimeError(f"the writer did not start: exit code {process.wait()}")
    return process


def begin(process: subprocess.Popen) -> None:
    """Lets a ready writer write."""
    process.stdin.close()


def _write_as_child(model: Path, out: Path) -> int:
    import orbax.checkpoint  # noqa: F401  so that the time from "ready" is the time of writing

    sys.stdout.buffer.write(_READY)
    sys.stdout.buffer.flush()
    sys.stdin.read()
    try:
        convert(model, out)
    except OutputError as error:
        return _BUSY_EXIT if error.code == "E_BUSY" else 3
    except KeyboardInterrupt:
        return 130
    return 0


def seconds_to_write(model: Path, out: Path) -> float:
    """How long a writer takes until its folder appears."""
    process = ready_writer(model, out)
    start = time.monotonic()
    begin(process)
    while not out.exists() and process.poll() is None:
        time.sleep(0.001)
    seconds = time.monotonic() - start
    process.wait()
    return seconds


def kill_writer(model: Path, out: Path, delay: float, number: int = signal.SIGKILL) -> str:
    """Stops a writer after ``delay`` seconds.

    Returns:
      What was there: ``"absent"``, ``"verified"``, ``"left over"`` (absent, with
      a temporary folder beside) or ``"damaged"``.
    """
    process = ready_writer(model, out)
    begin(process)
    time.sleep(delay)
    process.send_signal(number)
    process.wait()
    return state_of(out)


def state_of(out: Path) -> str:
    """One of the words of :func:`kill_writer`."""
    if os.path.lexists(out):
        try:
            load_everything(out)
        except ModelFileError:
            return "damaged"
        return "verified"
    return "left over" if leftovers(out) else "absent"


def leftovers(out: Path) -> list[str]:
    """Names beside ``out`` that a writer of it made."""
    return [name for name in os.listdir(out.parent) if name.startswith(f".{out.name}.")]


def two_writers(model: Path, out: Path) -> tuple[list[int], str]:
    """Starts two writers of one folder at once; returns their exit codes and what was there then."""
    writers = [ready_writer(model, out) for _ in range(2)]
    for writer in writers:
        begin(writer)
    return sorted(writer.wait() for writer in writers), state_of(out)


# Full disks


class _FullDisk:
    """Lets ``calls`` operations that write go through; every later one fails as on a full disk."""

    def __init__(self, folder: Path, calls: int):
        self._folder = str(folder)
        self._left = calls
        self.count = 0

    def _step(self, path: object) -> None:
        self.count += 1
        self._left -= 1
        if self._left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def _wrap(self, function: Callable, writes: Callable) -> Callable:
        def wrapped(path: object, *args: object, **kwargs: object) -> object:
            inside = isinstance(path, int) or str(path).startswith(self._folder)
            if inside and writes(*args, **kwargs):
                self._step(path)
            return function(path, *args, **kwargs)

        return wrapped

    def patches(self) -> list:
        """What to patch while the disk is full."""
        always, create = (lambda *_, **__: True), (lambda flags, *_, **__: bool(flags & os.O_CREAT))

        def to_write(mode: str = "r", *_: object, **__: object) -> bool:
            return not set("wax+").isdisjoint(mode)

        patched = [
            mock.patch.object(os, name, self._wrap(getattr(os, name), always))
            for name in ("mkdir", "rename", "fsync")
        ]
        patched.append(mock.patch.object(os, "open", self._wrap(os.open, create)))
        patched.append(mock.patch.object(builtins, "open", self._wrap(builtins.open, to_write)))
        return patched


@contextmanager
def full_disk_after(folder: Path, calls: int) -> Iterator[_FullDisk]:
    """Inside the block, writing under ``folder`` fails with ENOSPC after ``calls`` operations."""
    disk = _FullDisk(folder, calls)
    with ExitStack() as stack:
        for patch in disk.patches():
            stack.enter_context(patch)
        yield disk


def writing_calls(model: Path, out: Path) -> int:
    """Operations on the disk that writing a checkpoint takes. Leaves ``out`` absent."""
    with full_disk_after(out.parent, sys.maxsize) as disk:
        convert(model, out)
    shutil.rmtree(out)
    return disk.count


def fill_disk(model: Path, out: Path, calls: int) -> str:
    """Writes with a disk that is full after ``calls`` operations; returns the error's code."""
    with full_disk_after(out.parent, calls):
        try:
            convert(model, out)
        except OutputError as error:
            return error.code
    return "none"


@contextmanager
def small_tmpfs(folder: Path, nbytes: int) -> Iterator[None]:
    """A file system of ``nbytes`` at ``folder``. Needs root."""
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", str(folder)],
        check=True,
        capture_output=True,
    )
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True, capture_output=True)


def fill_tmpfs(model: Path, mount_point: Path, share: float) -> tuple[str, list[str]]:
    """Writes to a file system with only ``share`` of the room, unseen by the check before."""
    with open_model(model) as source:
        need = sum(source.tensor_nbytes(path) for path in source.paths())
    with small_tmpfs(mount_point, max(4096, int(need * share))):
        out = mount_point / "out"
        with mock.patch("qwen3_moe_jax.convert.output_folder._check_space"):
            try:
                convert(model, out)
                code = "none"
            except OutputError as error:
                code = error.code
        return code, os.listdir(mount_point)


# The whole check


def check_flips(work: Path, count: int, rng: random.Random) -> dict:
    out = work / "flips"
    convert(work / "model.gguf", out)
    start = time.monotonic()
    missed = missed_flips(out, count, rng)
    files = sum(f.is_file() for f in out.rglob("*"))
    return {"flips": count, "files": files, "missed": missed, "seconds": round(time.monotonic() - start, 1)}


def check_kills(work: Path, count: int, rng: random.Random) -> dict:
    model, out, older = work / "model.gguf", work / "killed", work / "older"
    convert(model, older)
    before = fingerprint(older)
    longest = 1.1 * statistics.median(seconds_to_write(model, work / f"timed{i}") for i in range(3))
    states: dict[str, int] = {}
    faults = []
    for i in range(count):
        delay = rng.uniform(0, longest)
        state = kill_writer(model, out, delay)
        # Follows how busy the machine is: about two of seven writers get to their end.
        longest *= 0.95 if state == "verified" else 1.02
        states[state] = states.get(state, 0) + 1
        if state == "damaged":
            faults.append(f"kill {i} after {delay:.4f} s: damaged")
        elif state != "verified":
            convert(model, out)
        if state_of(out) != "verified" or (state != "verified" and leftovers(out)):
            faults.append(f"kill {i} after {delay:.4f} s: the next run did not clean up")
        shutil.rmtree(out, ignore_errors=True)
    if fingerprint(older) != before:
        faults.append("a checkpoint beside was changed")
    return {"kills": count, "found": states, "faults": faults}


def check_full_disks(work: Path, count: int) -> dict:
    model, out = work / "model.gguf", work / "full"
    calls = writing_calls(model, out)
    faults = []
    for i in range(count):
        code = fill_disk(model, out, calls * i // count)
        if code != "E_DISK_FULL" or state_of(out) != "absent":
            faults.append(f"after {calls * i // count} of {calls} operations: {code}, {state_of(out)}")
    result = {"injected": count, "operations": calls, "faults": faults, "tmpfs": 0}
    if os.geteuid() == 0:
        mount_point = work / "tmpfs"
        mount_point.mkdir()
        for i in range(count):
            code, names = fill_tmpfs(model, mount_point, (i + 0.5) / count * 0.95)
            if code != "E_DISK_FULL" or names:
                faults.append(f"tmpfs {i}: {code}, {names}")
        result["tmpfs"] = count
    return result


def check_two_writers(work: Path, count: int) -> dict:
    faults, busy = [], 0
    for i in range(count):
        out = work / f"pair{i}"
        codes, state = two_writers(work / "model.gguf", out)
        # The second may also come when the first has ended: then it finds the folder filled.
        busy += codes == [0, _BUSY_EXIT]
        if codes not in ([0, _BUSY_EXIT], [0, 3]) or state != "verified" or leftovers(out):
            faults.append(f"pair {i}: exit codes {codes}, {state}")
    return {"pairs": count, "second_said_busy": busy, "faults": faults}


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="what a packed checkpoint survives")
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--full-disks", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="where to work; a temporary folder by default")
    parser.add_argument("--receipt", help="file to write the result to, as JSON")
    parser.add_argument("--write", nargs=2, metavar=("MODEL", "OUT"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    if args.write:
        return _write_as_child(*map(Path, args.write))
    rng = random.Random(args.seed)
    silence_orbax()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        work = Path(folder)
        write_random_gguf(work / "model.gguf", SMALL, mix="all", seed=args.seed)
        with open_model(work / "model.gguf") as source:
            nbytes = checkpoint_nbytes(source)
        result = {
            "what": "python -m scripts.check_checkpoints",
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
            "seed": args.seed,
            "checkpoint_bytes": nbytes,
            "bit_flips": check_flips(work, args.flips, rng),
            "kill_9": check_kills(work, args.kills, rng),
            "disk_full": check_full_disks(work, args.full_disks),
            "two_writers": check_two_writers(work, args.pairs),
        }
    lost = [fault for part in ("kill_9", "disk_full", "two_writers") for fault in result[part]["faults"]]
    lost += result["bit_flips"]["missed"]
    leave(result, args.receipt)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
