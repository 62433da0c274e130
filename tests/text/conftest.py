"""The real vocabulary and the real chat templates, read once a worker."""

from pathlib import Path

import pytest

from qwen3_moe_jax.convert.gguf_file import GGUFFile
from qwen3_moe_jax.text.tokenizer import Tokenizer

DATA = Path(__file__).parents[1] / "data"

QWEN3_CONTROL = [f"<|{name}|>" for name in (
    "object_ref_start", "object_ref_end", "box_start", "box_end", "quad_start", "quad_end",
    "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad",
)]  # fmt: skip
QWEN3_ADDED = {
    151657: "<tool_call>", 151658: "</tool_call>", 151659: "<|fim_prefix|>", 151660: "<|fim_middle|>",
    151661: "<|fim_suffix|>", 151662: "<|fim_pad|>", 151663: "<|repo_name|>", 151664: "<|file_sep|>",
    151665: "<tool_response>", 151666: "</tool_response>", 151667: "<think>", 151668: "</think>",
}  # fmt: skip


@pytest.fixture(scope="session")
def qwen2_metadata() -> dict[str, object]:
    with GGUFFile.open(DATA / "ggml-vocab-qwen2.gguf") as file:
        return dict(file.metadata)


@pytest.fixture(scope="session")
def qwen2_tokenizer(qwen2_metadata) -> Tokenizer:
    return Tokenizer(qwen2_metadata)


@pytest.fixture(scope="session")
def qwen3_metadata(qwen2_metadata) -> dict[str, object]:
    """The same vocabulary with Qwen3's own added tokens, typed as llama.cpp's converter types them."""
    tokens = list(qwen2_metadata["tokenizer.ggml.tokens"])
    types = list(qwen2_metadata["tokenizer.ggml.token_type"])
    names = dict(zip(range(151646, 151657), QWEN3_CONTROL, strict=True)) | QWEN3_ADDED
    for i in range(151646, len(tokens)):
        tokens[i] = names.get(i, tokens[i])
        types[i] = 5 if i not in names else 3 if tokens[i].startswith("<|") else 4
    changed = {"tokens": tokens, "token_type": types, "eos_token_id": 151645}
    return qwen2_metadata | {f"tokenizer.ggml.{key}": value for key, value in changed.items()}


@pytest.fixture(scope="session")
def qwen3_tokenizer(qwen3_metadata) -> Tokenizer:
    return Tokenizer(qwen3_metadata, vocab_size=151936)


@pytest.fixture(scope="session")
def templates() -> dict[str, str]:
    return {name: (DATA / f"{name}.jinja").read_text() for name in ("Qwen3", "Qwen3-Coder")}
