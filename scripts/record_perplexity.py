"""Makes what perplexity is tested against: a text of this project, and the reference's judgement of it.

    python scripts/record_perplexity.py

The reference is the NumPy forward pass in float32 on the embedded model, the definition that of
``qwen3-moe perplexity --context 512 --stride 512``. The text is a snapshot of this project's own files and
only made again when asked for with ``--text``.
"""

import argparse
import hashlib
from pathlib import Path

import numpy as np

from qwen3_moe_jax.convert.model_source import open_model
from qwen3_moe_jax.loader import embedded_model
from qwen3_moe_jax.measure.perplexity import windows
from qwen3_moe_jax.parity.recorded import fingerprint
from qwen3_moe_jax.reference import ReferenceRunner
from qwen3_moe_jax.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
TEXT = ROOT / "tests" / "data" / "perplexity-text.txt"
RECORD = ROOT / "tests" / "data" / "perplexity-reference.npz"
TEXT_SOURCES = (
    "docs/parity.md",
    "docs/glossary.md",
    "qwen3_moe_jax/text/chat_template.py",
    "qwen3_moe_jax/text/tokenizer.py",
)
CONTEXT = 512


def record_text() -> None:
    """Writes the text."""
    TEXT.write_text("\n\n".join((ROOT / path).read_text() for path in TEXT_SOURCES))


def record_log_likelihoods() -> None:
    """Writes the reference's log-likelihoods, window after window."""
    text = TEXT.read_text()
    with open_model(embedded_model()) as source:
        ids = Tokenizer(source.metadata, vocab_size=source.config.vocab_size).encode(text)
        runner = ReferenceRunner(source)
        parts = [
            runner.log_likelihoods(ids[w.start : w.end], first=w.first - w.start)
            for w in windows(len(ids), CONTEXT, CONTEXT)
        ]
        np.savez_compressed(
            RECORD,
            fingerprint=np.array(fingerprint(source)),
            text_sha256=np.array(hashlib.sha256(text.encode()).hexdigest()),
            context=np.array(CONTEXT),
            log_likelihoods=np.concatenate(parts).astype(np.float32),
        )
    mean = np.concatenate(parts).mean()
    print(f"{len(ids)} tokens, {sum(map(len, parts))} scored: perplexity {np.exp(-mean):.6f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", action="store_true", help="make the text again too")
    args = parser.parse_args()
    if args.text:
        record_text()
    record_log_likelihoods()


if __name__ == "__main__":
    main()
