"""The tokenizer against llama.cpp's vectors, and its promises on control tokens and UTF-8."""

import json
import random
import time
from pathlib import Path

import pytest

from qwen3_moe_jax.convert.errors import ModelFileError
from qwen3_moe_jax.text.chat_template import RenderedChat, render_chat
from qwen3_moe_jax.text.tokenizer import StreamDecoder, Tokenizer

DATA = Path(__file__).parents[1] / "data"
IM_START, IM_END, END_OF_TEXT = 151644, 151645, 151643


def vectors() -> list[tuple[str, list[int]]]:
    texts = (DATA / "ggml-vocab-qwen2.gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = (DATA / "ggml-vocab-qwen2.gguf.out").read_text().split("\n")
    return [(text, list(map(int, line.split()))) for text, line in zip(texts, lines, strict=True)]


@pytest.mark.smoke
def test_ids_equal_llama_cpp(qwen2_tokenizer):
    cases = vectors()
    assert len(cases) == 47
    wrong = {text: qwen2_tokenizer.encode(text) for text, ids in cases if qwen2_tokenizer.encode(text) != ids}
    assert wrong == {}


def test_decode_gives_the_vectors_texts_back(qwen2_tokenizer):
    for text, ids in vectors():
        assert qwen2_tokenizer.decode(ids) == text


def test_ids_equal_hugging_face(qwen2_tokenizer):
    expected = json.loads((DATA / "qwen2_hf_ids.json").read_text())
    assert {text: qwen2_tokenizer.encode(text) for text in expected} == expected


def test_no_normalization(qwen2_tokenizer):
    decomposed, composed = "e\u0301", "\u00e9"
    assert qwen2_tokenizer.encode(decomposed) != qwen2_tokenizer.encode(composed)
    assert qwen2_tokenizer.decode(qwen2_tokenizer.encode(decomposed)) == decomposed


ALPHABETS = ["ab' \n\t\r123", "<|im_end|></think>", "\u0300éßИ我🦙\u200d\x00\xa0\u2028"]


@pytest.mark.parametrize("seed", range(20))
def test_round_trip_of_any_text(qwen3_tokenizer, seed):
    rng = random.Random(seed)
    anything = [*map(chr, range(0x250)), *(chr(rng.randrange(0xE000, 0x110000)) for _ in range(100))]
    text = "".join(rng.choice(rng.choice([*ALPHABETS, anything])) for _ in range(400))
    ids = qwen3_tokenizer.encode(text)
    decoder = StreamDecoder(qwen3_tokenizer)
    assert qwen3_tokenizer.decode(ids) == text, f"{seed=}"
    assert "".join(map(decoder.push, ids)) + decoder.finish() == text, f"{seed=}"


@pytest.mark.parametrize(
    "text", ["<|im_end|>", "a<|im_start|>system\nb<|endoftext|>", "<|<|im_end|>im_end|>"]
)
def test_control_tokens_in_text_stay_text(qwen3_tokenizer, text):
    ids = qwen3_tokenizer.encode(text)
    assert not {IM_START, IM_END, END_OF_TEXT} & set(ids)
    assert qwen3_tokenizer.decode(ids) == text


def test_parse_special_makes_control_ids(qwen3_tokenizer):
    ids = qwen3_tokenizer.encode("<|im_start|>user\nhi<|im_end|>\n", parse_special=True)
    assert ids == [IM_START, 872, 198, 6023, IM_END, 198]


def test_words_run_across_the_border_of_template_and_message(qwen3_tokenizer):
    chat = RenderedChat("<|im_start|>user\n\n\nhi<|im_end|>\n", inert=())
    assert qwen3_tokenizer.encode_chat(chat)[1:4] == qwen3_tokenizer.encode("user\n\n\nhi")[:3]


@pytest.mark.parametrize("place", [1, 10])  # either | of the second token
def test_a_control_token_that_touches_an_inert_character_stays_text(qwen3_tokenizer, place):
    text = "<|im_end|><|im_end|>"
    chat = RenderedChat(text, inert=(10 + place - (place == 10) * 2,))
    ids = qwen3_tokenizer.encode_chat(chat)
    assert ids.count(IM_END) == 1
    assert ids[0] == IM_END
    assert qwen3_tokenizer.decode(ids, show_control=True) == text


def with_added_tokens(metadata: dict[str, object], added: dict[str, int]) -> Tokenizer:
    """A tokenizer whose unused ids from 151700 on are these tokens, of these types."""
    tokens, types = (list(metadata[f"tokenizer.ggml.{key}"]) for key in ("tokens", "token_type"))
    tokens[151700 : 151700 + len(added)] = added
    types[151700 : 151700 + len(added)] = added.values()
    return Tokenizer(metadata | {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types})


BARLESS = ["<sep>", "[INST]", "<start of turn>", "</S>", "<<S>>", "\u2581eos"]


@pytest.mark.parametrize("token", BARLESS)
def test_a_control_token_without_a_bar_is_one_id_of_the_template_alone(qwen3_metadata, token):
    tokenizer = with_added_tokens(qwen3_metadata, {token: 3})

    def ids(content: str, template: str, **special: str) -> list[int]:
        messages = [{"role": "user", "content": content}, {"role": "user", "content": token[-3:]}]
        chat = render_chat(template, messages, special=special, control_tokens=tokenizer.control_tokens)
        assert content.strip() in chat.text
        return tokenizer.encode_chat(chat)

    template = token + "{{ messages[0].content }}" + token
    assert ids("hi", template).count(151700) == 2
    for content in (token, f"a{token}b", token * 3, token[:-1], token[1:], f"{token[:2]} < [ </think>"):
        assert ids(content, template).count(151700) == 2
    joined = "{{ messages[0].content | trim }}{{ messages[1].content }}" + token
    for cut in range(len(token)):
        assert ids(token[:cut] + " " * (cut < len(token) - 3), joined).count(151700) == 1
    assert ids(token, "{{ bos_token }}{{ messages[0].content }}", bos_token=token).count(151700) == 1


def test_messages_keep_what_only_looks_like_a_control_token(qwen3_metadata):
    tokenizer = with_added_tokens(qwen3_metadata, {"<sep>": 3})
    content = "<think>x</think> <script> [0] a < b"
    template = "<sep>{{ messages[0].content.split('</think>')[-1] }}"
    message = {"role": "user", "content": content}
    chat = render_chat(template, [message], control_tokens=tokenizer.control_tokens)
    assert chat.text == "<sep> <script> [0] a < b"
    assert not chat.inert


@pytest.mark.parametrize("token", ["user", "content", "role"])
def test_a_control_token_that_is_a_word_of_the_chat_changes_nothing(token):
    template = "{{ messages[0].role }}: {{ messages[0].content }}"
    chat = render_chat(template, [{"role": "user", "content": "hi"}], control_tokens=[token])
    assert chat.text == "user: hi"
    assert token not in chat.tracked


def test_every_declared_end_ends_an_answer(qwen3_metadata):
    lists = {"eos_token_ids": [5, 7], "eot_token_ids": [8], "eom_token_ids": [9], "eom_token_id": 10}
    metadata = qwen3_metadata | {f"tokenizer.ggml.{key}": value for key, value in lists.items()}
    assert {5, 7, 8, 9, 10, IM_END} <= Tokenizer(metadata).stop_ids


@pytest.mark.parametrize("value", [[-1], [5, 10**6], ["5"], [True], [5.0], 5.0])
def test_an_end_that_is_no_token_is_named(qwen3_metadata, value):
    with pytest.raises(ModelFileError, match="eos_token_ids") as caught:
        Tokenizer(qwen3_metadata | {"tokenizer.ggml.eos_token_ids": value})
    assert caught.value.code == "E_TOKENIZER"


def test_the_longest_added_token_wins(qwen3_metadata):
    tokenizer = with_added_tokens(qwen3_metadata, {"[[a": 4, "[[a]][[b]]": 4, "[[a]]": 4})
    assert tokenizer.encode("[[a]][[b]][[a]][[a") == [151701, 151702, 151700]


def test_user_defined_tokens_are_matched_and_shown(qwen3_tokenizer):
    ids = qwen3_tokenizer.encode("<think>\n</think><tool_call>")
    assert ids == [151667, 198, 151668, 151657]
    assert qwen3_tokenizer.decode(ids) == "<think>\n</think><tool_call>"


def test_what_decode_shows_and_hides(qwen3_tokenizer):
    added = list(range(151657, 151669))
    shown = "".join(qwen3_tokenizer.decode([i]) for i in added)
    assert shown.startswith("<tool_call></tool_call><|fim_prefix|>")
    assert shown.endswith("<|file_sep|><tool_response></tool_response><think></think>")
    assert qwen3_tokenizer.decode([IM_END, 151656, 151669, 151935]) == ""
    assert qwen3_tokenizer.decode([IM_END], show_control=True) == "<|im_end|>"


def test_stop_ids(qwen3_tokenizer):
    assert qwen3_tokenizer.eos_id == IM_END
    assert qwen3_tokenizer.stop_ids == {IM_END, END_OF_TEXT, 151662, 151663, 151664}


def test_stop_ids_keep_the_files_own_eos(qwen3_metadata):
    metadata = qwen3_metadata | {"tokenizer.ggml.eos_token_id": 5, "tokenizer.ggml.eot_token_id": 6}
    assert {5, 6, IM_END} <= Tokenizer(metadata).stop_ids


def test_bos_only_where_the_file_asks(qwen3_metadata, qwen3_tokenizer):
    assert qwen3_tokenizer.encode("hi") == [6023]
    tokenizer = Tokenizer(qwen3_metadata | {"tokenizer.ggml.add_bos_token": True})
    assert tokenizer.encode("hi") == [END_OF_TEXT, 6023]
    assert tokenizer.encode("<|endoftext|>hi", parse_special=True) == [END_OF_TEXT, 6023]


def test_stream_holds_back_half_a_character(qwen3_tokenizer):
    ids = qwen3_tokenizer.encode("is 🦙.cpp")
    decoder = StreamDecoder(qwen3_tokenizer)
    assert [decoder.push(i) for i in ids] == ["is", " ", "", "🦙", ".", "cpp"]


def test_stream_of_broken_utf8_equals_decode(qwen3_tokenizer):
    llama = qwen3_tokenizer.encode(" 🦙")
    for ids in (llama[:-1], llama[1:], [llama[0], 64, *llama], [*llama[:-1], IM_END, llama[-1]]):
        decoder = StreamDecoder(qwen3_tokenizer)
        streamed = "".join(map(decoder.push, ids)) + decoder.finish()
        assert streamed == qwen3_tokenizer.decode(ids)


def test_ids_outside_the_vocabulary(qwen3_metadata):
    tokenizer = Tokenizer(qwen3_metadata, vocab_size=152064)
    assert tokenizer.decode([152063]) == ""
    for token_id in (-1, 152064):
        with pytest.raises(ValueError, match=f"{token_id} is outside the vocabulary of 152064"):
            tokenizer.decode([token_id])


def test_text_that_is_no_unicode(qwen3_tokenizer):
    with pytest.raises(ValueError, match="surrogate pair at character 2"):
        qwen3_tokenizer.encode("ab\ud800")
    with pytest.raises(ValueError, match="must be a str, not bytes"):
        qwen3_tokenizer.encode(b"ab")


def test_more_tokens_than_rows_of_the_embedding(qwen3_metadata):
    with pytest.raises(
        ModelFileError, match="151936 tokens, but the embedding has only 151935 rows"
    ) as caught:
        Tokenizer(qwen3_metadata, vocab_size=151935)
    assert caught.value.code == "E_TOKENIZER"


def test_the_files_metadata_is_checked_first(qwen3_metadata):
    with pytest.raises(ModelFileError, match=r"tokenizer\.ggml\.pre") as caught:
        Tokenizer(qwen3_metadata | {"tokenizer.ggml.pre": "llama-bpe"})
    assert caught.value.code == "E_TOKENIZER"


def test_merges_cannot_make_a_control_token(qwen3_metadata):
    tokens = list(qwen3_metadata["tokenizer.ggml.tokens"])
    tokens[0:2] = ["<|im_", "end|>"]  # whatever they were
    tokens[151669], tokens[151670] = "!", '"'
    types = list(qwen3_metadata["tokenizer.ggml.token_type"])
    types[151669] = types[151670] = 1
    changed = {"tokens": tokens, "token_type": types, "merges": ["<|im_ end|>"]}
    metadata = qwen3_metadata | {f"tokenizer.ggml.{key}": value for key, value in changed.items()}
    with pytest.raises(ModelFileError, match=r"im_end") as caught:
        Tokenizer(metadata).encode("<|im_end|>")
    assert caught.value.code == "E_TOKENIZER"


def test_building_is_lazy(qwen3_metadata):
    tokenizer = Tokenizer(qwen3_metadata)
    tokenizer.decode([1, 2])
    assert "_bpe" not in vars(tokenizer)
    tokenizer.encode("hi")
    assert "_bpe" in vars(tokenizer)


@pytest.mark.parametrize("text", ["a", " ", "\n", "<|im_end|>", "["], ids=repr)
def test_time_is_linear_in_hostile_text(qwen3_tokenizer, text):
    short, long = (text * (length // len(text)) for length in (25_000, 200_000))
    qwen3_tokenizer.encode(short)
    ratio = _cpu_seconds(lambda: qwen3_tokenizer.encode(long)) / _cpu_seconds(
        lambda: qwen3_tokenizer.encode(short)
    )
    assert ratio < 30  # 8 where time is linear, 64 where it is quadratic


def _cpu_seconds(action) -> float:
    """Of this process, so that others on the machine do not count; the best of three."""
    best = float("inf")
    for _ in range(3):
        start = time.process_time()
        action()
        best = min(best, time.process_time() - start)
    return best


def test_one_built_ahead_leaves_a_refusal_to_the_first_text(source, monkeypatch):
    assert "_bpe" in vars(Tokenizer.built(source.metadata))
    monkeypatch.setattr("tokenizers.models.BPE", lambda *_: 1 / 0)
    tokenizer = Tokenizer.built(source.metadata)
    with pytest.raises(ModelFileError, match="division by zero"):
        tokenizer.encode("x")
