"""``python -m convert model.gguf out/``: a GGUF file to a packed checkpoint.

Exit codes: 0 done, 1 the model cannot be used, 2 wrong arguments, 3 the folder
cannot be written, 4 another process is writing it, 130 interrupted.
"""

import argparse
import logging
import os
import sys
import time
from typing import Any

from qwen3_moe_jax.convert.errors import ModelFileError
from qwen3_moe_jax.convert.model_source import open_model
from qwen3_moe_jax.convert.output_folder import OutputError
from qwen3_moe_jax.convert.progress import format_bytes, show_progress

EXIT_MODEL = 1
EXIT_OUTPUT = 3
EXIT_BUSY = 4
EXIT_INTERRUPTED = 130


def convert_model(model: str | os.PathLike, out: str | os.PathLike) -> str:
    """Converts with a progress bar on standard error; returns one line that says what was made.

    Raises:
      ModelFileError: the model cannot be used.
      OutputError: the folder cannot be written.
    """
    # Orbax asks JAX for its devices; converting needs none, and a GPU's memory is not to be taken for it.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    silence_orbax()
    from qwen3_moe_jax.convert.checkpoint_writer import write_checkpoint

    start = time.monotonic()
    with open_model(model) as source, show_progress(f"converting {os.path.basename(model)}") as progress:
        nbytes = write_checkpoint(source, out, progress=progress)
    seconds = time.monotonic() - start
    return f"{out}: {format_bytes(nbytes)} in {seconds:.1f} s ({format_bytes(nbytes / seconds)}/s)"


def silence_orbax() -> None:
    """Keeps a full disk to one message: orbax has many writes under way, and every one of them fails.

    The first failure is raised. The others are logged by asyncio, or reach a
    loop that is closed by then, which is printed as if the program had died.
    """
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    previous = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            previous(unraisable)

    sys.unraisablehook = hook


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m convert", description="GGUF file to packed checkpoint")
    add_arguments(parser)
    return run(parser.parse_args(argv))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that ``run`` reads."""
    parser.add_argument("model", help="a .gguf file (any shard of a split one)")
    parser.add_argument("out", help="folder to make; must not exist, or be empty")


def run(args: argparse.Namespace) -> int:
    """Converts; returns the exit code."""
    try:
        print(convert_model(args.model, args.out))
    except ModelFileError as error:
        return _fail(str(error), EXIT_MODEL)
    except OutputError as error:
        return _fail(str(error), EXIT_BUSY if error.code == "E_BUSY" else EXIT_OUTPUT)
    except KeyboardInterrupt:
        return _fail("interrupted; nothing was left behind", EXIT_INTERRUPTED)
    return 0


def _fail(message: str, code: int) -> int:
    print(f"convert: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
