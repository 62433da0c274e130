"""The cards that NVIDIA's driver lists: what ``nvidia-smi`` prints, of which nothing is taken for granted.

A figure that a card does not have is printed as ``[N/A]`` or ``[Not Supported]`` (memory, on
machines whose processor and GPU share it); an old driver does not know every field; a driver
that does not match the kernel's answers with a message; one that is stuck does not answer at all.
"""

import functools
import shutil
import subprocess
from dataclasses import dataclass

PROGRAM = "nvidia-smi"

TIMEOUT_SECONDS = 20.0

FIELDS = ("driver_version", "compute_cap", "memory.total", "memory.free", "mig.mode.current", "name")
"""What is asked for; the name is last, for it alone may have a comma in it."""

OLD_FIELDS = ("driver_version", "memory.total", "memory.free", "name")
"""What drivers before 510 know of these."""

MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class NvidiaGpu:
    """One card as ``nvidia-smi`` lists it.

    Attributes:
      name: the product's; "NVIDIA GPU" where it is not told.
      driver: version; "" where it is not told.
      capability: such as "9.0"; "" where it is not told.
      memory: bytes; None where they are not told.
      free: bytes that no program holds; None where they are not told.
      is_partitioned: MIG is on: programs get a slice of the card.
    """

    name: str
    driver: str
    capability: str
    memory: int | None
    free: int | None = None
    is_partitioned: bool = False

    @property
    def driver_major(self) -> int | None:
        """The driver's first number, or None."""
        head = self.driver.split(".")[0]
        return int(head) if head.isdecimal() else None


@dataclass(frozen=True)
class NvidiaReport:
    """What ``nvidia-smi`` answers.

    Attributes:
      gpus: the cards.
      fault: why it lists none though it is there, in one line; "" where there is no fault.
    """

    gpus: tuple[NvidiaGpu, ...] = ()
    fault: str = ""


def may_have_cards() -> bool:
    """Whether there is something to ask for cards."""
    return shutil.which(PROGRAM) is not None


def nvidia_gpus() -> tuple[NvidiaGpu, ...]:
    """The cards that ``nvidia-smi`` lists; none where there is no driver."""
    return nvidia_report().gpus


def nvidia_report() -> NvidiaReport:
    """Asks ``nvidia-smi``, once per process; never raises."""
    program = shutil.which(PROGRAM)
    return NvidiaReport() if program is None else _ask(program)


@functools.cache
def _ask(program: str) -> NvidiaReport:
    report = _query(program, FIELDS)
    # an old driver refuses the whole question for one field that it does not know
    return _query(program, OLD_FIELDS) if "not a valid field" in report.fault else report


def _query(program: str, fields: tuple[str, ...]) -> NvidiaReport:
    question = [program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            question,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TIMEOUT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return NvidiaReport(fault=f"nvidia-smi does not answer within {TIMEOUT_SECONDS:.0f} s")
    except OSError as error:
        return NvidiaReport(fault=f"nvidia-smi does not start: {error.strerror or error}")
    text = done.stdout.decode(errors="replace")
    gpus = tuple(gpu for line in text.splitlines() if (gpu := _card(line, fields)))
    if gpus:
        return NvidiaReport(gpus)
    said = " ".join((text + " " + done.stderr.decode(errors="replace")).split())
    if not said and not done.returncode:
        return NvidiaReport(fault="nvidia-smi prints nothing")
    return NvidiaReport(fault=f"nvidia-smi says: {_short(said) or f'exit code {done.returncode}'}")


def _card(line: str, fields: tuple[str, ...]) -> NvidiaGpu | None:
    """One card; None for a line that is no answer."""
    cells = [cell.strip() for cell in line.split(",", len(fields) - 1)]
    if len(cells) != len(fields):
        return None
    found = dict(zip(fields, cells, strict=True))
    return NvidiaGpu(
        name=_told(found["name"]) or "NVIDIA GPU",
        driver=_told(found["driver_version"]),
        capability=_told(found.get("compute_cap", "")),
        memory=_mebibytes(found["memory.total"]),
        free=_mebibytes(found["memory.free"]),
        is_partitioned=found.get("mig.mode.current", "").lower() == "enabled",
    )


def _told(cell: str) -> str:
    """A cell's text on one line of printable characters; "" where it says that there is no answer."""
    is_missing = cell.startswith("[") or cell.upper() in ("N/A", "ERR!", "UNKNOWN ERROR")
    return "" if is_missing else _short(cell)


def _short(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)[:200]


def _mebibytes(cell: str) -> int | None:
    """Bytes of "81559", "81559 MiB"; None for anything else."""
    number = cell.split()[0] if cell else ""
    return int(number) * MEBIBYTE if number.isascii() and number.isdecimal() else None
