"""Names of models on a hub: what they mean, and what a wrong one could have meant."""

import pytest

from qwen3_moe_jax import loader
from qwen3_moe_jax.core.errors import OptionError
from qwen3_moe_jax.hub.names import HubName, guess, parse, quant_of, runs


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("hf:A/B", HubName("A/B")),
        ("hf:A/B:q4_k_m", HubName("A/B", quant="Q4_K_M")),
        ("hf:A/B@v1:Q8_0", HubName("A/B", "v1", quant="Q8_0")),
        ("hf:A/B/d/x.gguf", HubName("A/B", file="d/x.gguf")),
        ("https://huggingface.co/A/B", HubName("A/B")),
        ("https://hf.co/A/B/", HubName("A/B")),
        ("https://huggingface.co/A/B/resolve/main/x.gguf?download=true", HubName("A/B", file="x.gguf")),
        ("https://huggingface.co/A/B/blob/v1/d/x%20y.gguf", HubName("A/B", "v1", "d/x y.gguf")),
        ("https://huggingface.co/A/B/tree/main/UD-Q4_K_XL", HubName("A/B", quant="UD-Q4_K_XL")),
        ("models/x.gguf", None),
        ("C:/models/x.gguf", None),
    ],
)
def test_a_name_is_what_it_says(text, name):
    assert parse(text) == name


@pytest.mark.parametrize(
    "text",
    ["hf:", "hf:A", "hf:A/..", "hf:A/B/../../x", "https://example.com/A/B", "https://huggingface.co/A"]
    + ["https://huggingface.co/datasets/A/B", "hf:A/B\n"],
)
def test_what_is_no_name_is_refused(text):
    with pytest.raises(OptionError, match=r"hf:OWNER/REPO"):
        parse(text)


@pytest.mark.parametrize(
    ("path", "quant", "does_run"),
    [
        ("Qwen3-30B-A3B-Q4_K_M.gguf", "Q4_K_M", True),
        ("qwen3-30b-a3b.q4_k_m.gguf", "Q4_K_M", True),
        ("UD-Q4_K_XL/x-UD-Q4_K_XL-00001-of-00003.gguf", "UD-Q4_K_XL", True),
        ("x-UD-Q8_K_XL.gguf", "UD-Q8_K_XL", True),
        ("x-Q8_0.gguf", "Q8_0", True),
        ("x-BF16-00001-of-00002.gguf", "BF16", True),
        ("x-fp16.gguf", "F16", True),
        ("x-Q6_K_L.gguf", "Q6_K_L", True),
        ("x-UD-IQ1_M.gguf", "UD-IQ1_M", True),
        ("x-UD-IQ2_M.gguf", "UD-IQ2_M", True),
        ("x-IQ3_XS.gguf", "IQ3_XS", True),
        ("x-IQ4_XS.gguf", "IQ4_XS", True),
        ("x-TQ1_0.gguf", "TQ1_0", True),
        ("x-MXFP4_MOE.gguf", "MXFP4_MOE", True),
        ("model.gguf", None, False),
        ("Qwen3-30B-A3B.gguf", None, False),
    ],
)
def test_a_file_tells_its_quantization(path, quant, does_run):
    assert quant_of(path) == quant
    assert runs(quant) == does_run


@pytest.mark.parametrize("path", ["x-NVFP4.gguf", "x-Q5_3.gguf", "x-UD-IQ5_M.gguf"])
def test_unsupported_types_are_known_by_name(path):
    assert quant_of(path)
    assert not runs(quant_of(path))


def test_a_repository_without_its_prefix_is_guessed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OptionError, match=r"did you mean hf:Qwen/Qwen3-30B-A3B-GGUF:Q4_K_M\?"):
        loader.model_path("Qwen/Qwen3-30B-A3B-GGUF:Q4_K_M")
    (tmp_path / "Qwen").mkdir()
    assert not guess("Qwen/x")
    assert not guess("models/x.gguf")


def test_a_folder_with_one_model_is_that_model(tmp_path):
    for number in (1, 2):
        (tmp_path / f"x-Q8_0-0000{number}-of-00002.gguf").write_bytes(b"")
    assert loader.model_path(tmp_path) == tmp_path / "x-Q8_0-00001-of-00002.gguf"
    (tmp_path / "y.gguf").write_bytes(b"")
    with pytest.raises(OptionError, match=r"has 2 models: name one of .*y\.gguf"):
        loader.model_path(tmp_path)
