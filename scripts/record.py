"""Records what the project is held against: logits, log-likelihoods, and the texts that they belong to.

    python -m scripts.record --what logits log-likelihoods     # after a change of the embedded model
    python -m scripts.record --what parity-text perplexity-text

logits            four positions of each golden prompt (``tests/data/tiny-coder-golden.npz``), for ``verify``
log-likelihoods   the reference's judgement of the perplexity text, float32, windows of 512 tokens
parity-text       the text of ``verify``: a snapshot of this project's files
perplexity-text   the text of the perplexity tests: another snapshot. Record its log-likelihoods afterwards.

Texts are snapshots: recording them again changes every figure that depends on them.
"""

import argparse
import hashlib

import numpy as np

from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.loader import embedded_model
from qwen3_moe_jax.measure.perplexity import windows
from qwen3_moe_jax.parity.recorded import LOGITS_NAME, TEXT_NAME, fingerprint
from qwen3_moe_jax.reference import ReferenceRunner
from qwen3_moe_jax.text.tokenizer import Tokenizer
from scripts import ROOT

ASSETS = ROOT / "qwen3_moe_jax" / "assets"
DATA = ROOT / "tests" / "data"
PARITY_SOURCES = ("qwen3_moe_jax/reference/model.py", "convert/packed.py")
PERPLEXITY_SOURCES = (
    "docs/design/parity.md",
    "docs/reference/glossary.md",
    "qwen3_moe_jax/text/chat_template.py",
    "qwen3_moe_jax/text/tokenizer.py",
)
POSITIONS_KEPT = 4
CONTEXT = 512


def joined(paths: tuple[str, ...]) -> str:
    """The project's files as one text."""
    return "\n\n".join((ROOT / path).read_text() for path in paths)


def record_parity_text() -> None:
    """Writes ``parity-text.txt`` of the assets."""
    (ASSETS / TEXT_NAME).write_text(joined(PARITY_SOURCES))


def record_perplexity_text() -> None:
    """Writes ``perplexity-text.txt`` of the tests' data."""
    (DATA / "perplexity-text.txt").write_text(joined(PERPLEXITY_SOURCES))


def record_logits() -> None:
    """Writes ``tiny-coder-logits.npz`` of the assets."""
    with open_model(embedded_model()) as source, np.load(DATA / "tiny-coder-golden.npz") as golden:
        arrays: dict[str, np.ndarray] = {"fingerprint": np.array(fingerprint(source))}
        prompts = sum(name.startswith("ids") for name in golden.files)
        for i in range(prompts):
            ids = golden[f"ids{i}"]
            positions = np.linspace(0, len(ids) - 1, POSITIONS_KEPT).astype(np.int32)
            arrays[f"ids{i}"], arrays[f"positions{i}"] = ids, positions
            arrays[f"logits{i}"] = golden[f"float32_logits{i}"][positions]
        np.savez_compressed(ASSETS / LOGITS_NAME, prompts=np.array(prompts), **arrays)


def record_log_likelihoods() -> None:
    """Writes ``perplexity-reference.npz`` of the tests' data, window after window."""
    text = (DATA / "perplexity-text.txt").read_text()
    with open_model(embedded_model()) as source:
        ids = Tokenizer(source.metadata, vocab_size=source.config.vocab_size).encode(text)
        runner = ReferenceRunner(source)
        parts = [
            runner.log_likelihoods(ids[w.start : w.end], first=w.first - w.start)
            for w in windows(len(ids), CONTEXT, CONTEXT)
        ]
        np.savez_compressed(
            DATA / "perplexity-reference.npz",
            fingerprint=np.array(fingerprint(source)),
            text_sha256=np.array(hashlib.sha256(text.encode()).hexdigest()),
            context=np.array(CONTEXT),
            log_likelihoods=np.concatenate(parts).astype(np.float32),
        )
    mean = np.concatenate(parts).mean()
    print(f"{len(ids)} tokens, {sum(map(len, parts))} scored: perplexity {np.exp(-mean):.6f}")


RECORDERS = {
    "logits": record_logits,
    "log-likelihoods": record_log_likelihoods,
    "parity-text": record_parity_text,
    "perplexity-text": record_perplexity_text,
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", nargs="+", choices=RECORDERS, required=True, help="what to make again")
    for name in parser.parse_args(argv).what:
        RECORDERS[name]()


if __name__ == "__main__":
    main()
