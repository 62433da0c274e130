"""Renders chat templates in a process of its own; started by ``chat_template``.

A template comes out of an untrusted file. Jinja's immutable sandbox keeps it from
running code, but not from burning time or memory, and a loop inside one C call
cannot be interrupted from Python. So it runs here: the kernel ends this process
when a request has used its CPU time (``setitimer`` with the default action), and
an address-space limit turns a memory bomb into MemoryError. Only the standard
library and Jinja are imported, so that a start takes about 0.1 s.

Protocol, on stdin and stdout: frames of a 4-byte big-endian length and JSON.
Request: ``{"template", "chat" (JSON text), "settings", "masks", "max_output"}``. Answer: ``{"text"}`` or
``{"error", "line", "fatal"}``; after a fatal one the process ends.
"""

import contextlib
import json
import signal
import sys
from datetime import datetime

try:
    import resource
except ImportError:  # Windows: the parent's deadline is the only limit
    resource = None

CPU_SECONDS = 0.45
"""Less than the 0.5 s that are promised: the kernel counts in ticks and takes one to end the process."""

MEMORY_BYTES = 256 << 20
CACHED_TEMPLATES = 8


def make_environment():
    """Jinja as Hugging Face's ``apply_chat_template`` sets it up."""
    import jinja2.ext
    from jinja2 import nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """``{% generation %}`` marks what a model wrote, for training; here its body is plain output."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment


def make_tojson(masks):
    """JSON without HTML escapes and in key order; ``masks`` must come out unescaped even as ASCII."""
    escaped = {json.dumps(mask)[1:-1]: mask for mask in masks}

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        text = json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )
        for written, mask in escaped.items():
            text = text.replace(written, mask)
        return text

    return tojson


class OutputTooLongError(ValueError):
    """The template writes more than it may."""


def render(environment, compiled, request):
    """The template's output.

    Raises:
      OutputTooLongError: it is longer than ``max_output`` characters.
      Exception: whatever a template may raise.
    """
    environment.filters["tojson"] = make_tojson(request["masks"])
    source = request["template"]
    if source not in compiled:
        if len(compiled) == CACHED_TEMPLATES:
            compiled.clear()
        compiled[source] = environment.from_string(source)
    pieces, size = [], 0
    context = json.loads(request["chat"]) | request["settings"]
    for piece in compiled[source].generate(context):
        size += len(piece)
        if size > request["max_output"]:
            raise OutputTooLongError(f"it writes more than {request['max_output']} characters")
        pieces.append(piece)
    return "".join(pieces)


def describe(error):
    """A template's failure as an answer."""
    line = getattr(error, "lineno", None)
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    if isinstance(error, MemoryError):
        message = f"it needs more than {MEMORY_BYTES >> 20} MiB of memory"
    elif isinstance(error, RecursionError):
        message = "it is nested too deeply"
    else:
        message = " ".join(str(error).split())[:300] or type(error).__name__
    return {"error": message, "line": line, "fatal": isinstance(error, MemoryError | RecursionError)}


def limit_process():
    """Bounds memory, and takes away what no template needs: writing files, starting processes.

    A system that refuses a limit (macOS, for the address space) is left with the others.
    """
    if resource is None:
        return
    limits = {"RLIMIT_AS": MEMORY_BYTES, "RLIMIT_CORE": 0, "RLIMIT_FSIZE": 0, "RLIMIT_NPROC": 0}
    for name, value in limits.items():
        with contextlib.suppress(AttributeError, ValueError, OSError):
            resource.setrlimit(getattr(resource, name), (value, value))


def limit_cpu(seconds):
    """Ends the process once it has used this much more CPU time; 0 lifts the limit."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def read_frame(stream):
    """The next frame's bytes, or None at the end."""
    header = stream.read(4)
    return stream.read(int.from_bytes(header, "big")) if len(header) == 4 else None


def write_frame(stream, content):
    """Writes and flushes one frame."""
    stream.write(len(content).to_bytes(4, "big") + content)
    stream.flush()


def main():
    """Answers requests until stdin ends."""
    sys.path.extend(sys.argv[1:])
    environment, compiled = make_environment(), {}
    limit_process()
    while (frame := read_frame(sys.stdin.buffer)) is not None:
        limit_cpu(CPU_SECONDS)
        try:
            answer = {"text": render(environment, compiled, json.loads(frame))}
        except Exception as error:  # a template may raise anything; all of it goes back as an answer
            answer = describe(error)
        content = json.dumps(answer).encode()
        limit_cpu(0)
        write_frame(sys.stdout.buffer, content)
        if answer.get("fatal"):
            return


if __name__ == "__main__":
    main()
