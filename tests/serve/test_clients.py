"""What OpenAI's and Anthropic's own clients make of every endpoint: their types parse every reply."""

import json

import pytest

from qwen3_moe_jax.testing.scripted_model import FIM
from qwen3_moe_jax.testing.scripts import HELLO, scripts
from tests.tolerances import TOKEN_SCORES

pytest.importorskip("openai")
pytest.importorskip("anthropic")

WEATHER = {
    "name": "get_current_weather",
    "description": "",
    "parameters": {"type": "object", "properties": {"location": {"type": "string"}}},
}
TOOLS = [{"type": "function", "function": WEATHER}]
ALL_TOOLS = [
    {"type": "function", "function": {"name": n, "parameters": {"type": "object", "properties": p}}}
    for n, p in {
        "get_current_weather": {"location": {"type": "string"}, "unit": {"type": "string"}},
        "write": {"path": {"type": "string"}, "content": {"type": "string"}},
    }.items()
]


@pytest.fixture(scope="module")
def openai(server):
    from openai import OpenAI

    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def anthropic(server):
    from anthropic import Anthropic

    return Anthropic(base_url=server.url, api_key="none", max_retries=0)


def user(text):
    return [{"role": "user", "content": text}]


def test_models(openai, anthropic):
    assert [m.id for m in openai.models.list()] == ["scripted"]
    assert openai.models.retrieve("scripted").id == "scripted"
    assert [m.id for m in anthropic.models.list()] == ["scripted"]


def test_chat(openai):
    reply = openai.chat.completions.create(model="any", messages=user("[[hello]]"))
    choice = reply.choices[0]
    assert (choice.message.content, choice.finish_reason) == (HELLO, "stop")
    usage = reply.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens >= 0


def joined(stream):
    """What a stream's chunks say together."""
    content, reasoning, calls, reason, usage = "", "", [], None, None
    for chunk in stream:
        if not chunk.choices:
            usage = chunk.usage
            continue
        delta = chunk.choices[0].delta
        assert "content" in delta.model_fields_set
        content += delta.content or ""
        reasoning += getattr(delta, "reasoning_content", None) or ""
        for call in delta.tool_calls or ():
            if call.id:
                assert call.index == len(calls)
                calls.append([call.function.name, ""])
            calls[call.index][1] += call.function.arguments or ""
        reason = chunk.choices[0].finish_reason or reason
    return content, reasoning, calls, reason, usage


@pytest.mark.parametrize("name", ["hello", "thinking", "two_calls", "think_tool", "tags", "write_code"])
def test_a_stream_says_what_the_whole_says(openai, name):
    script = scripts("hermes")[name]
    options = {"model": "any", "messages": user(f"[[{name}]]"), "tools": ALL_TOOLS}
    whole = openai.chat.completions.create(**options).choices[0]
    stream = openai.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    content, reasoning, calls, reason, usage = joined(stream)
    assert content == (whole.message.content or "") == script.content
    assert reasoning == (getattr(whole.message, "reasoning_content", None) or "") == script.reasoning
    assert [(n, json.loads(a)) for n, a in calls] == [(n, dict(a)) for n, a in script.calls]
    assert [c.function.name for c in whole.message.tool_calls or ()] == [n for n, _ in script.calls]
    assert reason == whole.finish_reason == ("tool_calls" if script.calls else "stop")
    assert usage.completion_tokens > 0


def test_both_names_of_reasoning(openai):
    message = openai.chat.completions.create(model="m", messages=user("[[thinking]]")).choices[0].message
    assert message.reasoning_content == message.reasoning == "First I think of 17, then of 4."


def test_calls_in_xml(coder_server):
    from openai import OpenAI

    client = OpenAI(base_url=f"{coder_server.url}/v1", api_key="none", max_retries=0)
    reply = client.chat.completions.create(model="m", messages=user("[[two_calls]]"), tools=ALL_TOOLS)
    calls = reply.choices[0].message.tool_calls
    assert [json.loads(c.function.arguments) for c in calls] == [
        {"location": "Rome"},
        {"location": "Oslo", "unit": "celsius"},
    ]


def test_one_call_where_no_parallel_ones_are_wanted(openai):
    reply = openai.chat.completions.create(
        model="m", messages=user("[[two_calls]]"), tools=ALL_TOOLS, parallel_tool_calls=False
    )
    assert len(reply.choices[0].message.tool_calls) == 1
    assert reply.choices[0].finish_reason == "tool_calls"


def test_tools_are_text_without_a_choice(openai):
    reply = openai.chat.completions.create(
        model="m", messages=user("[[two_calls]]"), tools=ALL_TOOLS, tool_choice="none"
    )
    assert "<tool_call>" in reply.choices[0].message.content


def test_stop_strings_and_limits(openai):
    make = lambda **o: openai.chat.completions.create(model="m", messages=user("[[hello]]"), **o).choices[0]
    assert make(stop="script").message.content == HELLO.split("script")[0]
    assert make(stop=["known", "I am"]).message.content == "Hello! "
    cut = make(max_tokens=3)
    assert cut.finish_reason == "length"
    assert HELLO.startswith(cut.message.content)
    assert make(max_tokens=500, max_completion_tokens=3).finish_reason == "length"


def test_several_choices_and_seeds(openai):
    make = lambda seed, n: [
        c.message.content
        for c in openai.chat.completions.create(
            model="m", messages=user("[[coin]]"), n=n, seed=seed, temperature=1, top_p=1
        ).choices
    ]
    sides = [side for seed in range(0, 64, 16) for side in make(seed, 16)]
    assert {"#heads", "#tails"} <= set(sides) <= {"#heads", "#tails", "#edge"}
    assert make(-(2**63), 3) == make(-(2**63), 3)


def test_logprobs(openai):
    reply = openai.chat.completions.create(
        model="m", messages=user("[[coin]]"), logprobs=True, top_logprobs=3, temperature=0
    )
    (token, *_) = reply.choices[0].logprobs.content
    assert token.token == "#heads"
    assert bytes(token.bytes) == b"#heads"
    assert [round(2.718281828**t.logprob, 2) for t in token.top_logprobs] == [0.7, 0.2, 0.1]


def test_thinking_is_cut_at_its_budget(openai):
    for budget in (4, 7):
        reply = openai.chat.completions.create(
            model="m",
            messages=user("[[thinking]]"),
            max_tokens=60,
            extra_body={"thinking_budget": budget, "enable_thinking": True},
        )
        assert reply.usage.completion_tokens_details.reasoning_tokens == budget
        assert "First I think of 17, then of 4.".startswith(reply.choices[0].message.reasoning_content or "")
    free = openai.chat.completions.create(
        model="m", messages=user("[[thinking]]"), extra_body={"thinking_budget": 100, "enable_thinking": True}
    )
    assert free.choices[0].message.content == "The sum is 21."


def test_completions(openai):
    reply = openai.completions.create(model="m", prompt="xya", max_tokens=40, temperature=0)
    assert reply.choices[0].text == "bcdefghijklmnopqrstuvwxyz"
    both = openai.completions.create(model="m", prompt=["a", "w"], max_tokens=2, temperature=0)
    assert [c.text for c in both.choices] == ["bc", "xy"]
    ids = openai.completions.create(model="m", prompt=[[ord("a")], [ord("w")]], max_tokens=2, temperature=0)
    assert [c.text for c in ids.choices] == ["bc", "xy"]
    stream = openai.completions.create(model="m", prompt="a", max_tokens=5, temperature=0, stream=True)
    assert "".join(c.choices[0].text for c in stream) == "bcdef"


def test_echo_and_logprobs(openai):
    reply = openai.completions.create(model="m", prompt="abz", max_tokens=0, echo=True, logprobs=1)
    scored = reply.choices[0].logprobs
    assert reply.choices[0].text == "abz"
    assert (scored.tokens, scored.text_offset) == (["a", "b", "z"], [0, 1, 2])
    assert scored.token_logprobs[0] is None
    assert scored.token_logprobs[1] == pytest.approx(0, abs=1e-6)
    assert scored.token_logprobs[2] < -30
    assert scored.top_logprobs[2].keys() == {"c"}


def test_fill_in_the_middle(openai, server):
    import httpx

    reply = openai.completions.create(model="m", prompt="def", suffix="x", max_tokens=50, temperature=0)
    assert reply.choices[0].text == FIM
    body = {"input_prefix": "def", "input_suffix": "x", "temperature": 0}
    assert httpx.post(f"{server.url}/infill", json=body, timeout=120).json()["content"] == FIM
    raw = "<|fim_prefix|>def<|fim_suffix|>x<|fim_middle|>"
    reply = openai.completions.create(model="m", prompt=raw, max_tokens=50, temperature=0)
    assert reply.choices[0].text == FIM


@pytest.mark.parametrize("name", ["hello", "thinking", "two_calls"])
def test_responses(openai, name):
    script = scripts("hermes")[name]
    tools = [{"type": "function", **t["function"]} for t in ALL_TOOLS] + [{"type": "web_search"}]
    options = {"model": "m", "input": f"[[{name}]]", "tools": tools, "instructions": "Be brief."}
    whole = openai.responses.create(**options)
    assert whole.output_text == script.content
    assert whole.status == "completed"
    calls = [(o.name, json.loads(o.arguments)) for o in whole.output if o.type == "function_call"]
    assert calls == [(n, dict(a)) for n, a in script.calls]
    with openai.responses.stream(**options) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert final.output_text == script.content
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"


def test_responses_take_a_whole_conversation(openai):
    items = [
        {"role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "input_text", "text": "weather?"}]},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]},
        {"type": "function_call", "call_id": "c1", "name": "get_current_weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "rain"},
    ]
    assert openai.responses.create(model="m", input=items).output_text == "The tool answered, and so do I."


@pytest.mark.parametrize("name", ["hello", "thinking", "two_calls", "think_tool"])
def test_messages(anthropic, name):
    script = scripts("hermes")[name]
    tools = [
        {"name": f["name"], "description": "", "input_schema": f["parameters"]}
        for f in (t["function"] for t in ALL_TOOLS)
    ]
    options = {"model": "m", "max_tokens": 200, "messages": user(f"[[{name}]]"), "tools": tools}
    whole = anthropic.messages.create(**options)
    with anthropic.messages.stream(**options) as stream:
        for _ in stream:
            pass
        final = stream.get_final_message()
    for message in (whole, final):
        blocks = {
            kind: [b for b in message.content if b.type == kind] for kind in ("text", "thinking", "tool_use")
        }
        assert "".join(b.text for b in blocks["text"]) == script.content
        assert "".join(b.thinking for b in blocks["thinking"]) == script.reasoning
        assert [(b.name, b.input) for b in blocks["tool_use"]] == [(n, dict(a)) for n, a in script.calls]
        assert message.stop_reason == ("tool_use" if script.calls else "end_turn")
        assert message.usage.output_tokens > 0


def test_messages_stop_sequence_and_limit(anthropic):
    make = lambda **o: anthropic.messages.create(model="m", messages=user("[[hello]]"), **o)
    cut = make(max_tokens=100, stop_sequences=["script"])
    assert (cut.stop_reason, cut.stop_sequence) == ("stop_sequence", "script")
    assert make(max_tokens=2).stop_reason == "max_tokens"


def test_count_tokens(anthropic):
    counted = anthropic.messages.count_tokens(model="m", messages=user("[[hello]]"))
    reply = anthropic.messages.create(model="m", max_tokens=1, messages=user("[[hello]]"))
    usage = reply.usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens


def test_what_claude_code_sends(anthropic):
    """Blocks of system text whose first changes, a system message among the others, results of tools."""
    system = [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1; cch=00a1f;"},
        {"type": "text", "text": "You are an agent.", "cache_control": {"type": "ephemeral"}},
    ]
    turns = [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "w", "input": {}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "rain"}]},
    ]
    counts = []
    for cch in ("00a1f", "1234567"):
        system[0]["text"] = f"x-anthropic-billing-header: cc_version=2.1; cch={cch};"
        reply = anthropic.messages.create(
            model="m", max_tokens=50, system=system, messages=turns, thinking={"type": "adaptive"}
        )
        assert reply.content[-1].text == "The tool answered, and so do I."
        counts.append(reply.usage.input_tokens + reply.usage.cache_read_input_tokens)
    assert counts[0] == counts[1]


def test_tokens_there_and_back(server):
    import httpx

    post = lambda path, **body: httpx.post(f"{server.url}{path}", json=body, timeout=120).json()
    text = "Hi <|im_end|> 你好"
    tokens = post("/tokenize", prompt=text)["tokens"]
    assert post("/tokenize", content=text)["tokens"] == tokens
    assert post("/detokenize", tokens=tokens)["prompt"] == text
    info = httpx.get(f"{server.url}/tokenizer_info", timeout=120).json()
    assert len(post("/tokenize", prompt=info["eos_token"])["tokens"]) == 1
    pieces = post("/tokenize", content="ab", with_pieces=True)["tokens"]
    assert [p["piece"] for p in pieces] == ["a", "b"]
    prompt = post("/apply-template", messages=user("x"))["prompt"]
    assert prompt.startswith("<|im_start|>user\nx")


def test_experts_are_counted(server):
    import httpx

    found = httpx.post(f"{server.url}/experts", json={"text": "abcd"}, timeout=None).json()
    assert found["tokens"] == 4
    assert [sum(layer) for layer in found["counts"]] == [4]


def test_nonfinite_logits_hurt_their_own_request_alone(openai):
    from openai import InternalServerError

    with pytest.raises(InternalServerError) as caught:
        openai.chat.completions.create(model="m", messages=user("[[nonfinite]]"))
    assert "not finite" in str(caught.value)
    assert (
        openai.chat.completions.create(model="m", messages=user("[[hello]]")).choices[0].message.content
        == HELLO
    )


def test_log_probabilities_come_with_the_tokens(server):
    """In chats, completions and responses; a stream's parts are the whole's."""
    import httpx

    post = lambda path, **body: httpx.post(f"{server.url}{path}", json=body, timeout=600)
    options = {"temperature": 0, "max_tokens": 5}
    chat = {
        "messages": [{"role": "user", "content": "[[hello]]"}],
        "logprobs": True,
        "top_logprobs": 3,
        **options,
    }
    whole = post("/v1/chat/completions", **chat).json()["choices"][0]["logprobs"]["content"]
    assert [len(t["top_logprobs"]) for t in whole] == [3] * 5
    assert all(t["top_logprobs"][0]["logprob"] == t["logprob"] for t in whole), "greedy: the likeliest"
    parts = []
    for line in post("/v1/chat/completions", **chat, stream=True).text.splitlines():
        if line.startswith("data: {"):
            for choice in json.loads(line[6:])["choices"]:
                parts.append((choice["logprobs"] or {"content": []})["content"])
    assert [t for part in parts for t in part] == whole
    assert sum(bool(part) for part in parts) > 1, "as they come"
    completion = {"prompt": "xyabc", "logprobs": 2, **options}
    written = post("/v1/completions", **completion).json()["choices"][0]["logprobs"]
    echoed = post("/v1/completions", **completion, echo=True).json()["choices"][0]["logprobs"]
    assert echoed["token_logprobs"][0] is None
    assert echoed["tokens"][-5:] == written["tokens"]
    assert echoed["token_logprobs"][-5:] == written["token_logprobs"]
    again = post(
        "/v1/completions", prompt="xyabc" + "".join(written["tokens"]), max_tokens=0, echo=True, logprobs=2
    )
    found = again.json()["choices"][0]["logprobs"]
    assert found["tokens"] == echoed["tokens"]
    assert found["token_logprobs"][1:] == pytest.approx(echoed["token_logprobs"][1:], abs=TOKEN_SCORES)
    answer = post(
        "/v1/responses", input="[[hello]]", top_logprobs=2, temperature=0, max_output_tokens=4
    ).json()
    (part,) = answer["output"][0]["content"]
    assert [len(t["top_logprobs"]) for t in part["logprobs"]] == [2] * 4
