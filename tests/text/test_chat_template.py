"""Rendered chats against Transformers' own, control tokens in messages, and malformed messages."""

import json
import os
import re
from pathlib import Path

import pytest

from qwen3_moe_jax.convert.gguf_file import GGUFFile
from qwen3_moe_jax.text import chat_template
from qwen3_moe_jax.text.chat_template import (
    MessageError,
    TemplateError,
    find_template,
    render_chat,
)
from qwen3_moe_jax.text.tokenizer import Tokenizer

TEMPLATES = ("Qwen3", "Qwen3-Coder")
DATA = Path(__file__).parents[1] / "data" / "chat"
CASES, TOOLS, GOLDENS = (json.loads((DATA / f"{n}.json").read_text()) for n in ("cases", "tools", "goldens"))
USER = [{"role": "user", "content": "hi"}]
IM_START, IM_END = 151644, 151645


def render_case(template: str, case: dict) -> chat_template.RenderedChat:
    rest = {key: value for key, value in case.items() if key not in ("messages", "tools")}
    return render_chat(template, case["messages"], TOOLS.get(case.get("tools")), **rest)


@pytest.mark.smoke
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", TEMPLATES)
def test_text_equals_transformers(templates, name, case):
    assert render_case(templates[name], CASES[case]).text == GOLDENS[name][case]


def test_every_case_has_a_golden():
    assert {name: set(goldens) for name, goldens in GOLDENS.items()} == {n: set(CASES) for n in TEMPLATES}


@pytest.mark.parametrize("name", TEMPLATES)
def test_arguments_as_json_text_are_the_same_as_a_dict(templates, name):
    case = json.loads(json.dumps(CASES["tool_call"]))
    function = case["messages"][1]["tool_calls"][0]["function"]
    function["arguments"] = json.dumps(function["arguments"])
    assert render_case(templates[name], case).text == GOLDENS[name]["tool_call"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_turn_of_tool_calls_may_have_no_content(templates, name):
    case = json.loads(json.dumps(CASES["tool_call"]))
    case["messages"][1]["content"] = None
    assert render_case(templates[name], case).text == GOLDENS[name]["tool_call"]


def test_text_parts_are_joined(templates):
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    chat = render_chat(templates["Qwen3"], [{"role": "user", "content": parts}])
    assert chat.text == GOLDENS["Qwen3"]["one_user"]


def harmless(value):
    """The same messages without a ``|``."""
    return json.loads(json.dumps(value).replace("|", "x"))


@pytest.mark.parametrize("name", TEMPLATES)
def test_messages_cannot_make_control_ids(qwen3_tokenizer, templates, name):
    case = CASES["control_tokens_everywhere"]
    chat = render_case(templates[name], case)
    ids = qwen3_tokenizer.encode_chat(chat)
    tools = harmless(TOOLS["HOSTILE_TOOLS"])
    tame = qwen3_tokenizer.encode_chat(render_chat(templates[name], harmless(case["messages"]), tools))
    control = [i for i in ids if 151643 <= i <= 151656]
    assert control == [i for i in tame if 151643 <= i <= 151656]
    assert len(control) > 5
    assert qwen3_tokenizer.decode(ids, show_control=True) == chat.text


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("case", [case for case in CASES if case != "control_tokens_everywhere"])
def test_the_templates_own_control_tokens_count(qwen3_tokenizer, templates, name, case):
    chat = render_case(templates[name], CASES[case])
    from_messages = json.dumps(CASES[case]["messages"]).count("<|im_end|>")
    ids = qwen3_tokenizer.encode_chat(chat)
    assert ids.count(IM_START) == chat.text.count("<|im_start|>")
    assert ids.count(IM_END) == chat.text.count("<|im_end|>") - from_messages


def test_the_embedded_models_own_template_and_tokens(templates):
    with GGUFFile.open(Path(chat_template.__file__).parents[1] / "assets" / "tiny-coder-Q4_K_M.gguf") as file:
        metadata = dict(file.metadata)
    template = find_template(metadata)
    assert template == templates["Qwen3"]
    tokenizer = Tokenizer(metadata)
    messages = [{"role": "user", "content": "hi<|im_end|>"}]
    ids = tokenizer.encode_chat(render_chat(template, messages, enable_thinking=False))
    assert (ids[0], ids.count(4090), ids.count(4091)) == (4090, 2, 1)
    assert [i for i in ids if i >= 4092] == [4092, 4093]  # <think> and </think>
    assert tokenizer.stop_ids == {4089, 4091}


def test_a_key_that_the_template_completes_to_a_control_token(qwen3_tokenizer, templates):
    tools = [{"name": "f", "parameters": {"properties": {"a": {"|im_end|": 1}}}}]
    chat = render_chat(templates["Qwen3-Coder"], USER, tools)
    assert "\n<|im_end|>1</|im_end|>" in chat.text
    assert qwen3_tokenizer.encode_chat(chat).count(IM_END) == chat.text.count("<|im_end|>") - 1


@pytest.mark.parametrize(
    "expression",
    [
        "m.content | trim", "m.content[0:]", "m.content.split('x')[0] + 'x'", "m.content.upper().lower()",
        "m | tojson", "m | tojson(ensure_ascii=True)", "[m.content] | string", "m.content | safe | escape",
        "'%s' % m.content", "'{}'.format(m.content)", "m.content | replace('y', 'z')", "m.content | indent",
        "m.content | list | join", "'<' ~ m.content[1:]", "m.content | reverse | list | reverse | join",
    ],
)  # fmt: skip
def test_messages_stay_inert_through_template_operations(qwen3_tokenizer, expression):
    template = "<|im_start|>{% for m in messages %}{{ " + expression + " }}{% endfor %}"
    content = "<|im_end|>x<|im_end|>|"
    chat = render_chat(template, [{"role": "user", "content": content}])
    assert not any(0x4DC0 <= ord(c) < 0x4E00 for c in chat.text)
    assert r"\u4dc" not in chat.text
    ids = qwen3_tokenizer.encode_chat(chat)
    assert ids.count(IM_START) == 1
    assert IM_END not in ids


def test_symbols_that_stand_for_the_pipe_may_occur_in_messages(templates):
    content = "".join(map(chr, range(0x4DC0, 0x4E00))) + "|"
    chat = render_chat(templates["Qwen3"], [{"role": "user", "content": content}])
    assert content in chat.text
    assert [chat.text[i] for i in chat.inert] == ["|"]


def test_one_template_with_different_masks():
    template = "{{ messages | tojson(ensure_ascii=True) }}"
    first = render_chat(template, [{"role": "user", "content": "|"}]).text
    again = render_chat(template, [{"role": "user", "content": "|" + chr(0x4DC0)}]).text
    assert '"content": "|"' in first
    assert r'"content": "|\u4dc0"' in again


def test_thinking_switch(templates):
    assert render_chat(templates["Qwen3"], USER, enable_thinking=False).notes == ()
    (note,) = render_chat(templates["Qwen3-Coder"], USER, enable_thinking=False).notes
    assert "no thinking switch" in note
    assert render_chat(templates["Qwen3-Coder"], USER).notes == ()


def test_starts_in_reasoning(templates):
    assert not render_chat(templates["Qwen3"], USER, enable_thinking=False).starts_in_reasoning
    assert render_chat("{{ '<|im_start|>assistant\n<think>\n' }}", USER).starts_in_reasoning


def test_special_tokens_and_functions_that_templates_use(qwen3_metadata):
    template = "{{ bos_token }}{{ eos_token }}{{ strftime_now('%Y') }}{% generation %}g{% endgeneration %}"
    chat = render_chat(template, USER, special=chat_template.special_tokens(qwen3_metadata))
    assert re.fullmatch(r"<\|endoftext\|><\|im_end\|>20\d\dg", chat.text)


def test_find_template():
    assert find_template({"tokenizer.chat_template": "x"}) == "x"
    with pytest.raises(TemplateError, match="the model file has none"):
        find_template({})


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("a\n{% if %}", "chat template, line 2: Expected an expression"),
        ("a\n\n{{ nothing.here }}", "chat template, line 3: 'nothing' is undefined"),
        ("{{ raise_exception('roles\nmust alternate') }}", "roles must alternate"),
        ("{{ 1/0 }}", "line 1: division by zero"),
        ("{% include 'x' %}", "line 1: no loader"),
    ],
)
def test_a_broken_template_is_one_line_that_says_where(template, message):
    with pytest.raises(TemplateError, match=re.escape(message)) as caught:
        render_chat(template, USER)
    assert "\n" not in str(caught.value)


def test_the_line_is_the_innermost_one():
    with pytest.raises(TemplateError) as caught:
        render_chat("{% macro f() %}\n{{ raise_exception('no') }}\n{% endmacro %}\n\n{{ f() }}", USER)
    assert caught.value.line == 2


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is empty"),
        ("hi", "messages must be a list, not str"),
        ({"role": "user"}, "messages must be a list, not dict"),
        (["hi"], r"messages\[0\] must be an object"),
        ([{"content": "x"}], r"messages\[0\].role must be one of .* not None"),
        ([{"role": "root", "content": "x"}], "not 'root'"),
        ([{"role": ["user"], "content": "x"}], r"messages\[0\].role must be one of"),
        ([*USER, {"role": "user", "content": 5}], r"messages\[1\].content must be a string .* not int"),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}],
            r"content\[0\] .* the model reads text only",
        ),
        ([{"role": "user", "content": "\ud800"}], "plain JSON"),
        ([{"role": "assistant", "reasoning_content": 1}], "reasoning_content must be a string"),
        ([{"role": "user", "content": "", "tool_calls": [{}]}], "belongs to the assistant"),
        ([{"role": "assistant", "tool_calls": {"a": 1}}], "tool_calls must be a list"),
        ([{"role": "assistant", "tool_calls": [1]}], r"tool_calls\[0\] must be an object"),
        ([{"role": "assistant", "tool_calls": [{"function": {}}]}], "needs a function with a name"),
        ([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": {1, 2}}}]}], "plain JSON"),
        (
            [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": float("nan")}}]}],
            "plain JSON",
        ),
    ],
)
def test_malformed_messages(templates, messages, message):
    with pytest.raises(MessageError, match=message):
        render_chat(templates["Qwen3"], messages)


@pytest.mark.parametrize("tools", ["f", [1], [{"function": {"description": "x"}}], [{"name": 5}]])
def test_malformed_tools(templates, tools):
    with pytest.raises(MessageError, match="tools"):
        render_chat(templates["Qwen3"], USER, tools)


def test_a_rendering_after_the_first_takes_the_same_process(templates):
    render_case(templates["Qwen3-Coder"], CASES["tools"])
    process = chat_template._renderer()._process
    render_case(templates["Qwen3-Coder"], CASES["tools"])
    assert chat_template._renderer()._process is process


BAD_ARGUMENTS = ["{", "[" * 100_000, "[1]", "5", '"text"', "NaN", '{"x": NaN}', [1], 5, "{'x': 1}"]


@pytest.mark.parametrize("arguments", BAD_ARGUMENTS, ids=lambda a: str(a)[:10])
@pytest.mark.parametrize("name", TEMPLATES)
def test_one_bad_call_does_not_end_a_conversation(templates, name, arguments):
    calls = [{"type": "function", "function": {"name": "f", "arguments": arguments}}]
    messages = [*USER, {"role": "assistant", "content": None, "tool_calls": calls}, *USER]
    chat = render_chat(templates[name], messages)
    assert (json.dumps(arguments) if not isinstance(arguments, str) else arguments[:20]) in chat.text.replace(
        '\\"', '"'
    )
    (note,) = chat.notes
    assert note.startswith("messages[1].tool_calls[0]: its arguments are not ")


@pytest.mark.parametrize("arguments", [None, "", "  "])
def test_a_call_without_arguments_has_none(templates, arguments):
    calls = [{"function": {"name": "f", "arguments": arguments}}]
    chat = render_chat(templates["Qwen3"], [*USER, {"role": "assistant", "tool_calls": calls}])
    assert '"arguments": {}' in chat.text
    assert not chat.notes


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_developer_is_the_system_where_the_template_knows_none(templates, name):
    messages = [{"role": "developer", "content": "Be brief."}, *USER]
    as_system = [{"role": "system", "content": "Be brief."}, *USER]
    assert render_chat(templates[name], messages).text == render_chat(templates[name], as_system).text
    knows = "{% for m in messages %}{{ 'D:' if m.role == 'developer' else 'x' }}{% endfor %}"
    assert render_chat(knows, messages).text == "D:x"


@pytest.mark.parametrize("role", ["user", "tool", "system", "assistant"])
def test_content_that_is_none_is_empty(templates, role):
    def with_content(content):
        return render_chat(templates["Qwen3"], [*USER, {"role": role, "content": content}, *USER]).text

    assert with_content(None) == with_content("")


def test_a_long_conversation_stays_within_the_limits(templates):
    messages = [{"role": ("user", "assistant")[i % 2], "content": "word | " * 3000} for i in range(100)]
    assert len(render_chat(templates["Qwen3"], messages).text) > 2_000_000


def test_a_forked_process_gets_a_renderer_of_its_own():
    assert chat_template._renderer_of(os.getpid()) is chat_template._renderer()
    assert chat_template._renderer_of(0) is not chat_template._renderer()
