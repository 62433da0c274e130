"""Makes what ``verify`` compares with: a text of this project, and a part of the recorded golden logits.

    python scripts/record_parity_assets.py

Keeps four positions of each prompt of ``tests/data/tiny-coder-golden.npz`` in
full float32; the test suite compares with all of them. The text is a snapshot
and only made again when asked for with ``--text``.
"""

import argparse
from pathlib import Path

import numpy as np

from qwen3_moe_jax.convert.model_source import open_model
from qwen3_moe_jax.parity.recorded import LOGITS_NAME, TEXT_NAME, fingerprint

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "qwen3_moe_jax" / "assets"
GOLDEN = ROOT / "tests" / "data" / "tiny-coder-golden.npz"
TEXT_SOURCES = ("qwen3_moe_jax/reference/model.py", "convert/packed.py")
POSITIONS_KEPT = 4


def record_logits() -> None:
    """Writes ``tiny-coder-logits.npz``."""
    with open_model(ASSETS / "tiny-coder-Q4_K_M.gguf") as source, np.load(GOLDEN) as golden:
        arrays: dict[str, np.ndarray] = {"fingerprint": np.array(fingerprint(source))}
        prompts = sum(name.startswith("ids") for name in golden.files)
        for i in range(prompts):
            ids = golden[f"ids{i}"]
            positions = np.linspace(0, len(ids) - 1, POSITIONS_KEPT).astype(np.int32)
            arrays[f"ids{i}"], arrays[f"positions{i}"] = ids, positions
            arrays[f"logits{i}"] = golden[f"float32_logits{i}"][positions]
        np.savez_compressed(ASSETS / LOGITS_NAME, prompts=np.array(prompts), **arrays)


def record_text() -> None:
    """Writes ``parity-text.txt``."""
    text = "\n\n".join((ROOT / path).read_text() for path in TEXT_SOURCES)
    (ASSETS / TEXT_NAME).write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", action="store_true", help="make the text again too")
    args = parser.parse_args()
    if args.text:
        record_text()
    record_logits()


if __name__ == "__main__":
    main()
