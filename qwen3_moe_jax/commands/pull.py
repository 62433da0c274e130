"""``qwen3-moe pull``: a model from a hub to this machine's cache."""

import argparse

from qwen3_moe_jax.commands import options
from qwen3_moe_jax.core import terminal
from qwen3_moe_jax.core.errors import OptionError
from qwen3_moe_jax.core.exit_codes import ExitCode
from qwen3_moe_jax.hub import names

EPILOG = """
hf:OWNER/REPO                  the first of Q4_K_M, Q4_K_S, Q5_K_M, ... that fits this machine
hf:OWNER/REPO:Q6_K             that quantization, all its files
hf:OWNER/REPO/FILE.gguf        that file
hf:OWNER/REPO@REVISION:Q6_K    of a branch, tag or commit
https://huggingface.co/...     the address of a repository's page or of a file

The same names stand wherever a command takes -m. The files are kept in the cache of huggingface_hub,
and its variables hold: HF_TOKEN, HF_ENDPOINT (a mirror), HF_HUB_CACHE, HF_HUB_OFFLINE.
An interrupted download goes on where it ended.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("model", type=options.name, metavar="MODEL", help="hf:OWNER/REPO[:QUANT]; see below")
    parser.add_argument("-l", "--list", action="store_true", help="only show what the repository has")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress")


def run(args: argparse.Namespace) -> int:
    name = names.parse(args.model) or names.parse(names.guess(args.model))
    if name is None:
        raise OptionError(f"{args.model!r} is no name of a model on a hub: write {names.FORM}")
    if args.list:
        _show_listing(name, args.json)
        return ExitCode.DONE
    from qwen3_moe_jax.hub.pull import pull

    path = pull(name, quiet=args.quiet)
    if args.json:
        terminal.show_json({"model": str(name), "path": str(path)})
    else:
        terminal.show(path)
    return ExitCode.DONE


def _show_listing(name: names.HubName, as_json: bool) -> None:
    from qwen3_moe_jax.convert.progress import format_bytes
    from qwen3_moe_jax.hub.listing import ask
    from qwen3_moe_jax.hub.pull import fits
    from qwen3_moe_jax.machine.estimate import machine_memory

    listing, free = ask(name), machine_memory()
    rows = [
        {
            "quant": v.quant,
            "files": [file.path for file in v.files],
            "nbytes": v.nbytes,
            "runs": names.runs(v.quant),
            "fits": fits(v, free),
        }
        for v in listing.variants
    ]
    if as_json:
        terminal.show_json({"repo": listing.repo, "license": listing.license, "models": rows}, indent=2)
        return
    terminal.show(f"{listing.repo}: licence {listing.license or 'not named'}; {free}")
    for row in rows:
        state = "type not supported" if not row["runs"] else "fits" if row["fits"] else "does not fit"
        label = row["quant"] or row["files"][0]
        terminal.show(f"  {label:12} {format_bytes(row['nbytes']):>9}  {state}")
