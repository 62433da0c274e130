"""How much each type loses: files of the embedded model, made with a public quantizer, against the model.

    pip install cyllama        # llama.cpp's quantizer as a wheel; or unpack one and put it on PYTHONPATH
    python -m scripts.quantization_loss --receipt docs/receipts/quantization_loss.json
    python -m scripts.make_tables

The embedded model is Q4_K_M. Its dequantized weights are the base: they are written as F32, quantized anew
to each type for all matrices but the router, and run by the reference backend in float32 over windows of the
perplexity tests' text. Every tensor of these files is also held, bit for bit, against the ``gguf`` package.
Types that llama.cpp makes with an importance matrix alone are left out by name: the wheel takes none.
"""

import argparse
import datetime
import json
import os
import platform
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import gguf
import numpy as np

from qwen3_moe_jax.convert.ggml_types import BLOCK_FORMATS, GGMLType
from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.convert.unpack import dequantize
from qwen3_moe_jax.loader import embedded_model
from qwen3_moe_jax.measure.divergence import Divergence, StoredLogits, divergences, runner_logits
from qwen3_moe_jax.measure.perplexity import Cut, cut_text
from qwen3_moe_jax.reference import ReferenceRunner
from qwen3_moe_jax.text.tokenizer import Tokenizer
from scripts import ROOT

TEXT = ROOT / "tests" / "data" / "perplexity-text.txt"
CONTEXT = 512

FTYPES = {
    "BF16": 32, "F16": 1, "Q8_0": 7, "Q6_K": 18, "Q5_K": 16, "Q5_1": 9, "Q5_0": 8, "Q4_K": 14, "Q4_1": 3,
    "Q4_0": 2, "IQ4_NL": 25, "IQ4_XS": 30, "MXFP4": 38, "Q3_K": 11, "IQ3_S": 26, "IQ3_XXS": 23, "Q2_K": 10,
    "IQ2_S": 29, "IQ2_XS": 20, "IQ2_XXS": 19, "IQ1_M": 31, "IQ1_S": 24, "TQ2_0": 37, "TQ1_0": 36,
}  # fmt: skip
"""``enum llama_ftype`` (include/llama.h of llama.cpp) of the mixture whose first type this is."""

NEED_IMPORTANCES = ("IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S")


def write_f32(to: Path) -> None:
    """The embedded model with its weights dequantized, every key as it is in the original."""
    original = embedded_model()
    reader = gguf.GGUFReader(original)
    raw = Path(original).read_bytes()
    keys = raw[24 : reader.tensors[0].field.offset]
    infos, parts, offset = [], [], 0
    for tensor in reader.tensors:
        name = tensor.name.encode()
        dims = [int(n) for n in tensor.shape]
        shape = struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, 0, offset)
        infos.append(struct.pack("<Q", len(name)) + name + shape)
        weights = np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), "<f4").tobytes()
        parts.append(weights + bytes(-len(weights) % 32))
        offset += len(parts[-1])
    count = struct.unpack_from("<Q", raw, 16)[0]
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(infos), count) + keys + b"".join(infos)
    to.write_bytes(head + bytes(-len(head) % 32) + b"".join(parts))


def quantizer() -> tuple[str, Callable[[Path, Path, int], None]]:
    """Name and version of the quantizer, and a function of input, output and ``llama_ftype``."""
    from cyllama.llama import llama_cpp

    def run(source: Path, to: Path, ftype: int) -> None:
        params = llama_cpp.LlamaModelQuantizeParams()
        params.ftype, params.pure, params.nthread = ftype, True, 2
        llama_cpp.model_quantize(str(source), str(to), params)

    try:
        return f"cyllama {version('cyllama')}", run
    except ModuleNotFoundError:  # an unpacked wheel whose metadata is elsewhere
        return "cyllama", run


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--windows", type=int, default=4, help="of the text, each of 512 tokens")
    parser.add_argument("--types", nargs="*", default=list(FTYPES), choices=list(FTYPES))
    parser.add_argument("--receipt", type=Path, help="a JSON file to write")
    args = parser.parse_args(argv)
    name, quantize = quantizer()
    result = about(name)
    with tempfile.TemporaryDirectory() as folder:
        for found in measure(Path(folder), quantize, args.types, args.windows):
            result |= found
            print(result["rows"][-1], flush=True)
            if args.receipt:
                args.receipt.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def about(name: str) -> dict:
    """What a receipt says of a run."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "what": "loss of each type on the embedded model",
        "date": datetime.date.today().isoformat(),
        "command": "python -m scripts.quantization_loss",
        "commit": commit.stdout.strip(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {"quantizer": name, "numpy": np.__version__, "gguf": version("gguf")},
    }


def measure(folder: Path, quantize: Callable, types: list[str], windows: int) -> Iterator[dict]:
    """The rows after one type, after two, ...; one that cannot be made has the reason in place of figures."""
    base_path = folder / "f32.gguf"
    write_f32(base_path)
    rows: list[dict] = []
    with open_model(base_path) as source:
        tokenizer = Tokenizer(source.metadata, vocab_size=source.config.vocab_size)
        runner = ReferenceRunner(source)
        cut = cut_text(runner.max_context, tokenizer, TEXT.read_text(), CONTEXT, None)
        del cut.windows[windows:]
        logits = runner_logits(runner, cut)
        with StoredLogits(cut, source.config.vocab_size) as stored:
            for number, window in enumerate(cut.windows):
                stored.keep(number, logits(number, window))
            for kind in types:
                rows.append({"type": kind, **_row(folder, base_path, quantize, kind, cut, stored)})
                count = sum(w.end - w.first for w in cut.windows)
                yield {"tokens_scored": count, "context": CONTEXT, "rows": rows}


def _row(folder: Path, base: Path, quantize: Callable, kind: str, cut: Cut, stored: StoredLogits) -> dict:
    path = folder / "one.gguf"
    try:
        quantize(base, path, FTYPES[kind])
    except RuntimeError:
        if kind in NEED_IMPORTANCES:
            return {"left_out": "needs an importance matrix"}
        raise
    with open_model(path) as source:
        counts = {t: sum(s is t for s in source.types.values()) for t in set(source.types.values())}
        check_bits(path)
        *_, found = divergences(cut, runner_logits(ReferenceRunner(source), cut), stored.of)
        return {
            "mixture": {t.name: n for t, n in sorted(counts.items())},
            "bits_per_weight": 8 * source.nbytes / sum(int(np.prod(s.shape)) for s in source.specs.values()),
            **_figures(found),
        }


def _figures(found: Divergence) -> dict:
    wanted = ("kl", "kl_error", "kl_median", "kl_99", "kl_max", "top_1", "perplexity", "base_perplexity")
    return {name: getattr(found, name) for name in wanted}


def check_bits(path: Path) -> None:
    """Every tensor of a real quantizer's file is bit for bit what the ``gguf`` package dequantizes."""
    oracle = {t.name: t for t in gguf.GGUFReader(path).tensors}
    with open_model(path) as source:
        for name, tensor in source.tensors():
            want = oracle[source.specs[name].gguf_name]
            expected = np.asarray(gguf.dequantize(want.data, want.tensor_type), np.float32)
            found = dequantize(tensor)
            assert tensor.type in BLOCK_FORMATS
            assert GGMLType(int(want.tensor_type)) is tensor.type
            assert np.array_equal(found.view("u4"), expected.reshape(found.shape).view("u4")), name


if __name__ == "__main__":
    main()
