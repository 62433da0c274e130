"""Goes through a newcomer's first hour on this machine and writes docs/guides/first-hour.md, with pictures.

    python -m scripts.record_first_hour [--no-install] [--backend NAME] [--out docs/guides]

Everything is real: a fresh environment and the wheel, a hub on this machine that speaks the real protocol (it
serves the embedded model), an empty cache of compiled programs, a terminal for ``chat``. Each time is that of
the whole command. The last line is JSON: seconds of each step.
"""

import argparse
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from qwen3_moe_jax.loader import embedded_model
from qwen3_moe_jax.machine.child_environment import child_environment
from qwen3_moe_jax.machine.jax_devices import PLATFORMS_VARIABLE
from qwen3_moe_jax.testing.terminal import Terminal
from scripts import ROOT
from scripts._screen import svg_of
from tests.hub.hub_server import Hub, running

REPO = "Tiny/Tiny-Coder-GGUF"
NAME = f"hf:{REPO}:Q4_K_M"
PICTURES = "pictures"
LINES, COLUMNS = 40, 100

QUESTIONS = (
    ("factorial", "Write a function that returns the factorial of n."),
    ("words", "Write a function that counts the words of a text."),
    ("empty", ""),
)


@dataclass
class Recorder:
    """Runs commands as a user would type them.

    Attributes:
      folder: where they run.
      environment: theirs.
      seconds: by step.
      blocks: of the page, by step.
      page: where it is written after each step.
      worked: seconds of processors, by step.
      options: of each command that runs the model.
    """

    folder: Path
    environment: dict[str, str]
    seconds: dict[str, float] = field(default_factory=dict)
    blocks: dict[str, str] = field(default_factory=dict)
    page: Path | None = None
    options: str = ""
    worked: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        self._used = _used()

    def save(self) -> None:
        """Writes what is recorded so far."""
        if self.page is not None:
            self.page.write_text(page(self))

    def run(self, step: str, *lines: str, codes: tuple[int, ...] = (0,)) -> None:
        """Runs lines of the shell; their output and time go into the page."""
        shown = []
        began = time.perf_counter()
        for line in lines:
            done = subprocess.run(
                ["bash", "-c", line], cwd=self.folder, env=self.environment, capture_output=True, text=True
            )
            if done.returncode not in codes:
                raise SystemExit(f"{line} ended with {done.returncode}:\n{done.stderr}")
            shown += [f"$ {line}", *self._clean(done.stderr + done.stdout)]
        self.add(step, time.perf_counter() - began, shown)

    def add(self, step: str, seconds: float, shown: list[str]) -> None:
        """One step of the page; its processor time is what children have used since the last one."""
        self.seconds[step] = round(seconds, 1)
        before, self._used = self._used, _used()
        self.worked[step] = round(self._used - before, 1)
        self.blocks[step] = "```console\n" + "\n".join(shown) + "\n```"
        print(f"{step}: {seconds:.1f} s", file=sys.stderr)
        self.save()

    def _clean(self, text: str) -> list[str]:
        """Lines without this machine's folders; long ones end in dots."""
        text = text.replace(str(self.folder), "~").replace(self.environment["HF_HUB_CACHE"], "~/.cache")
        lines = [line.rstrip() for line in text.splitlines()]
        return [
            line if len(line) <= 150 else line[:149] + "\u2026" for line in lines if "UserWarning" not in line
        ]


def _used() -> float:
    """Seconds of processors that ended children have used."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def write_requests(path: Path) -> None:
    """A batch of three lines, one of which asks for nothing, and one line that is no request."""
    lines = []
    for name, text in QUESTIONS:
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 40, "temperature": 0}
        body = body if text else {"max_tokens": 40}
        request = {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}
        lines.append(json.dumps(request))
    path.write_text("\n".join(lines) + "\n")


def record_chat(recorder: Recorder, out: Path) -> None:
    """Two turns and a command at a real terminal; the screen goes into a picture."""
    began = time.perf_counter()
    environment = {**recorder.environment, "TERM": "xterm-256color", "COLORTERM": "truecolor"}
    environment |= {"PROMPT_TOOLKIT_NO_CPR": "1", "PYTHONIOENCODING": "utf-8"}
    talk = Terminal(
        "chat",
        "-m",
        NAME,
        "--temperature",
        "0",
        "-n",
        "60",
        "--no-history",
        *recorder.options.split(),
        size=(LINES, COLUMNS),
        **environment,
    )
    ready = r"\x1b\[\?2004h[^>]*>[^\n]*\x1b\[\?25h"
    talk.until(ready)
    for line in ("def quick_sort(values):", "and now a merge sort, please"):
        talk.press(line + "\r")
        talk.until(re.escape(line[-8:]))
        talk.until(ready)
    talk.press("/stats\r")
    talk.until(r"context:")
    talk.until(ready)
    screen = talk.all
    talk.press("\x04")
    talk.exit_code()
    svg = svg_of(screen, lines=LINES, columns=COLUMNS, title=f"qwen3-moe chat -m {NAME}")
    (out / PICTURES / "chat.svg").write_text(svg)
    recorder.add(
        "chat",
        time.perf_counter() - began,
        [f"$ qwen3-moe chat -m {NAME} --temperature 0 -n 60{recorder.options}"],
    )


def install(recorder: Recorder) -> None:
    """The wheel into a fresh environment, whose command is then used."""
    dist = recorder.folder / "dist"
    subprocess.run(
        [sys.executable, "-m", "scripts.check_wheel", "--keep", dist],
        cwd=ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    (wheel,) = dist.glob("*.whl")
    shutil.move(wheel, recorder.folder / wheel.name)
    recorder.environment.pop("PYTHONPATH", None)  # pip would take the clone for an installed package
    recorder.run(
        "install",
        "python3 -m venv .venv",
        f".venv/bin/pip install -q './{wheel.name}[serve,plot]'",
        ".venv/bin/qwen3-moe --version",
    )
    recorder.environment["PATH"] = f"{recorder.folder}/.venv/bin:{recorder.environment['PATH']}"


def clone_command(recorder: Recorder) -> None:
    """``qwen3-moe`` of this clone, without an installation."""
    folder = recorder.folder / "bin"
    folder.mkdir()
    (folder / "qwen3-moe").write_text(f'#!/bin/sh\nexec {sys.executable} -m qwen3_moe_jax.cli "$@"\n')
    (folder / "qwen3-moe").chmod(0o755)
    recorder.environment["PATH"] = f"{folder}:{recorder.environment['PATH']}"


def record(recorder: Recorder, out: Path) -> None:
    """Every step after the installation."""
    run, b = recorder.run, recorder.options
    run("look", f"qwen3-moe pull --list hf:{REPO}", f"qwen3-moe inspect {NAME} | head -n 9")
    run("pull", f"qwen3-moe pull {NAME}")
    run("models", "qwen3-moe models")
    run("generate", f"qwen3-moe generate 'def fib(n):' -n 40 --temperature 0 -m {NAME}{b}")
    run("again", f"qwen3-moe generate 'def fib(n):' -n 40 --temperature 0 -m {NAME} -q{b}")
    record_chat(recorder, out)
    picture = out / PICTURES / "experts.png"
    texts = "'def area(r):\n    return 3.14 * r * r' --against 'Once upon a time there was a king.'"
    run("experts", f"qwen3-moe experts {texts} -m {NAME} -q{b} | tail -n 7")
    shutil.move(recorder.folder / "experts.png", picture)
    write_requests(recorder.folder / "requests.jsonl")
    batch = f"qwen3-moe batch requests.jsonl -o results.jsonl -m {NAME}{b}"
    show = "cut -c 1-140 results.jsonl"
    run("batch", "cut -c 1-140 requests.jsonl", batch, show, batch, codes=(0, 1))


HEAD = """\
# The first hour

What a newcomer sees, recorded by `python -m scripts.record_first_hour` on {machine}.
The hub is one on the same machine that speaks the real protocol and serves the embedded model (14 MB); with a
real one only names and sizes differ. Each time is that of its whole block. In brackets is what the processors
worked for it, which depends less on what else the machine did: {load}
{backend}"""

SECTIONS = {
    "install": ("Install", "", ""),
    "look": (
        "Look before the download",
        "What there is, then the header of one file, which is all that `inspect` reads.",
        "",
    ),
    "pull": ("Get it", "", ""),
    "models": ("What is here", "", ""),
    "generate": (
        "Write",
        "On the jax backend a model's first run compiles its programs, which are kept.",
        "",
    ),
    "again": ("Write again", "", ""),
    "chat": (
        "Talk",
        "Two turns and `/stats`. On the jax backend a turn reads only what is new. [All of chat](chat.md).",
        "![The terminal after two turns and /stats](pictures/chat.svg)",
    ),
    "experts": (
        "See",
        "Which experts each of two texts uses, on one scale, and the difference.",
        "![Which experts each text uses, and the difference](pictures/experts.png)",
    ),
    "batch": (
        "Many prompts",
        "A line that is no good request gets its reason. The same command again does nothing twice.",
        "",
    ),
}
"""Step: title, what comes before its block, and after it."""

TAIL = """\
## Next

[Get a model](models.md), [chat](chat.md), [batch files](batch-files.md), [serve](serve.md),
[look inside](inside.md), [verify](verify.md). From Python: the notebook `docs/examples/first_hour.ipynb`.
"""


def page(recorder: Recorder) -> str:
    """The page, with the steps that were recorded."""
    machine = f"{os.cpu_count()} cores without a GPU, Python {platform.python_version()}"
    load = f"its load was {os.getloadavg()[1]:.0f} at the end."
    backend = f"\nThe model ran with `{recorder.options.strip()}`.\n" if recorder.options else ""
    parts = [HEAD.format(machine=machine, load=load, backend=backend)]
    for step, (title, before, after) in SECTIONS.items():
        if step in recorder.blocks:
            seconds, worked = recorder.seconds[step], recorder.worked[step]
            head = f"## {title}: {seconds} s ({worked} s)" if seconds else f"## {title}"
            parts.append("\n\n".join(filter(None, (head, before, recorder.blocks[step], after))) + "\n")
    return "\n".join([*parts, TAIL])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-install", action="store_true", help="use this clone; the page keeps its block")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "guides")
    parser.add_argument("--backend", help="of each command that runs the model (default: the machine's)")
    args = parser.parse_args()
    data = embedded_model().read_bytes()
    files = {
        "README.md": b"# Tiny",
        "Tiny-Coder-Q4_K_M.gguf": data,
        "Tiny-Coder-NVFP4.gguf": bytes(9_000_000),
    }
    with tempfile.TemporaryDirectory() as name, running(Hub(repos={REPO: files})) as hub:
        folder = Path(name) / "home"
        folder.mkdir()
        caches = {"HF_HUB_CACHE": f"{name}/hub", "QWEN3_MOE_CACHE": f"{name}/programs", "HOME": str(folder)}
        settings = {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_DISABLE_XET": "1",
            "COLUMNS": "100",
            PLATFORMS_VARIABLE: "cpu",
        }
        recorder = Recorder(folder, {**os.environ, **child_environment(), **caches, **settings})
        recorder.options = f" --backend {args.backend}" if args.backend else ""
        recorder.page = args.out / "first-hour.md"
        clone_command(recorder) if args.no_install else install(recorder)
        if args.no_install:
            recorder.add("install", 0.0, ["$ pip install '.[serve,plot]'"])
        record(recorder, args.out)
    print(json.dumps({"seconds": recorder.seconds, "worked": recorder.worked, "cores": os.cpu_count()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
