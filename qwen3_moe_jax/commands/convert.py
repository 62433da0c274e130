"""``qwen3-moe convert``: a GGUF file to a packed checkpoint."""

import argparse
import logging
import os
import sys
import time
from typing import Any

from qwen3_moe_jax import loader
from qwen3_moe_jax.commands import options
from qwen3_moe_jax.convert.errors import ModelFileError
from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.convert.output_folder import OutputError
from qwen3_moe_jax.convert.progress import format_bytes
from qwen3_moe_jax.convert.tokenizer_metadata import check_tokenizer
from qwen3_moe_jax.core import terminal
from qwen3_moe_jax.core.exit_codes import ExitCode
from qwen3_moe_jax.machine.jax_devices import PLATFORMS_VARIABLE

EXIT_CODES = {"E_EXISTS": ExitCode.NOT_EMPTY, "E_BUSY": ExitCode.BUSY}
"""Of the errors of the output folder; the others are ExitCode.OUTPUT."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", type=options.path, help="a .gguf file (any shard of a split one), or hf:OWNER/REPO[:QUANT]"
    )
    parser.add_argument("out", type=options.path, help="folder to make; must not exist, or be empty")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress")


def run(args: argparse.Namespace) -> int:
    try:
        terminal.show(convert_model(args.model, args.out, quiet=args.quiet))
    except ModelFileError as error:
        return _fail(error, ExitCode.FAULT)
    except OutputError as error:
        return _fail(error, EXIT_CODES.get(error.code, ExitCode.OUTPUT))
    except KeyboardInterrupt:
        return _fail("interrupted; nothing was left behind", ExitCode.INTERRUPTED)
    return ExitCode.DONE


def _fail(message: object, code: ExitCode) -> ExitCode:
    terminal.error(f"convert: {message}")
    return code


def convert_model(model: str | os.PathLike, out: str | os.PathLike, *, quiet: bool = False) -> str:
    """Converts with a progress bar on standard error; returns one line that says what was made.

    Raises:
      ModelFileError: the model cannot be used.
      OutputError: the folder cannot be written.
    """
    # Orbax asks JAX for its devices; converting needs none, and a GPU's memory is not to be taken for it.
    os.environ.setdefault(PLATFORMS_VARIABLE, "cpu")
    silence_orbax()
    from qwen3_moe_jax.convert.checkpoint_writer import write_checkpoint

    model = loader.model_path(model, quiet=quiet)
    start = time.monotonic()
    label = f"converting {os.path.basename(model)}"
    with open_model(model) as source, terminal.show_progress(label, quiet=quiet) as progress:
        check_tokenizer(source.metadata, source.config.vocab_size)
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
