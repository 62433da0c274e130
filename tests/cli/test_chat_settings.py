"""Settings of a chat: saved with the conversation and taken up again, where the command line has none."""

import argparse
import json

import pytest

from qwen3_moe_jax.cli import main
from qwen3_moe_jax.commands import chat as chat_command
from qwen3_moe_jax.commands.talk import saved
from qwen3_moe_jax.commands.talk.conversation import Conversation
from qwen3_moe_jax.core.sampling import Sampling
from tests.cli.scripted_chat import Scripted, contents, start_chat

QUICK = ("--backend", "reference", "--no-gate")


def start_given(*answers: str, args: tuple[str, ...] = ()):
    """A chat that knows which options its command line has."""
    parser = argparse.ArgumentParser()
    chat_command.add_arguments(parser)
    parsed = parser.parse_args(["-q", *args])
    model = Scripted(*answers)
    conversation = Conversation(parsed.system)
    sampling = Sampling(temperature=0.7 if parsed.temperature is None else parsed.temperature)
    return chat_command.Chat(parsed, model, sampling, conversation, saved.given_options(parsed)), model


CHANGED = (
    "/system S",
    "/set temperature 0.25",
    "/set top_k 7",
    "/set seed 11",
    "/set max_tokens 9",
    "/set stop END",
    "/thinking off",
    "/thinking fold",
    "/set verbose on",
)


def test_what_was_saved_is_taken_up(tmp_path, capsys):
    chat, _ = start_chat("yes")
    for text in (*CHANGED, "you?"):
        chat.take(text)
    chat.template = "{{ messages }}"
    chat.take(f"/save {tmp_path / 'talk.json'}")
    other, model = start_chat("no")
    capsys.readouterr()
    other.take(f"/load {tmp_path / 'talk.json'}")
    said = capsys.readouterr().err
    assert said.startswith(
        "loaded 1 turn, the last: you?; new settings: temperature, top_k, seed, max_tokens,"
    )
    assert other.conversation == chat.conversation
    assert other.sampling == chat.sampling
    assert other.sampling.temperature == 0.25
    for name in ("max_tokens", "stop", "thinking", "reasoning", "verbose", "template"):
        assert getattr(other, name) == getattr(chat, name)
    other.take("more")
    assert contents(model) == ["S", "you?", "yes", "more"]
    assert (model.asked[-1][1]["stop"], model.asked[-1][1]["thinking"]) == (["END"], False)


def test_options_of_the_command_line_are_stronger_than_a_file(tmp_path, capsys):
    chat, _ = start_chat("yes")
    for text in (*CHANGED, "you?", f"/save {tmp_path / 'talk.json'}"):
        chat.take(text)
    given = ("--system", "T", "--temperature", "0.5", "--thinking", "on", "--stop", "END")
    other, _ = start_given(args=given)
    capsys.readouterr()
    other.take(f"/load {tmp_path / 'talk.json'}")
    note, loaded = capsys.readouterr().err.splitlines()
    assert note == "note: of the command line, not of the file: --system, --temperature, --thinking"
    assert "new settings: top_k, " in loaded
    assert (other.conversation.system, other.sampling.temperature, other.thinking) == ("T", 0.5, True)
    assert (other.stop, other.max_tokens, other.sampling.top_k) == (["END"], 9, 7)


def test_load_of_the_command_takes_up_the_settings(tmp_path, capsys, monkeypatch):
    path, asked = tmp_path / "talk.json", []
    turns = [{"role": "user", "content": "x = 1"}, {"role": "assistant", "content": "y"}]
    system = {"role": "system", "content": "S"}
    settings = {"temperature": 0, "max_tokens": 2, "thinking": False, "stop": ["END"], "seed": 3}
    path.write_text(json.dumps({"messages": [system, *turns], "settings": settings}))

    class Chat(chat_command.Chat):
        def run(self):
            asked.append(self)
            return 0

    monkeypatch.setattr(chat_command, "Chat", Chat)
    options = ["--load", str(path), "--temperature", "0.5", "-q", *QUICK]
    assert main(["chat", *options]) == 0
    (chat,) = asked
    assert (chat.sampling.temperature, chat.sampling.seed, chat.max_tokens) == (0.5, 3, 2)
    assert (chat.thinking, chat.stop, chat.conversation.system) == (False, ["END"], "S")
    said = capsys.readouterr().err
    assert "note: of the command line, not of the file: --temperature\n" in said
    assert "temperature 0.5 " in said or not said.count("sampling:")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "hot"),
        ("temperature", -1),
        ("temperature", float("nan")),
        ("top_k", 1.5),
        ("seed", True),
        ("max_tokens", 0),
        ("max_tokens", 2.5),
        ("stop", "END"),
        ("stop", [""]),
        ("thinking", "on"),
        ("thinking", 1),
        ("reasoning", "dance"),
        ("verbose", 1),
        ("chat_template", ""),
        ("chat_template", 3),
    ],
)
def test_a_setting_of_a_file_that_cannot_be_is_named_and_nothing_changes(tmp_path, capsys, name, value):
    path = tmp_path / "talk.json"
    path.write_text(json.dumps({"messages": [], "settings": {"top_p": 0.5, name: value}}))
    chat, _ = start_chat("one")
    chat.take("a")
    capsys.readouterr()
    chat.take(f"/load {path}")
    (line,) = capsys.readouterr().err.splitlines()
    assert f"setting {name}: " in line
    assert (len(chat.conversation.turns), chat.sampling.top_p) == (1, 1.0)


def test_settings_of_another_program_are_left_out_with_a_note(tmp_path, capsys):
    path = tmp_path / "talk.json"
    path.write_text(json.dumps({"messages": [], "settings": {"mirostat": 2, "top_p": 0.5}}))
    chat, _ = start_chat()
    chat.take(f"/load {path}")
    assert "note: settings that there are not are left out: mirostat\n" in capsys.readouterr().err
    assert chat.sampling.top_p == 0.5


def test_a_template_of_a_file_that_refuses_the_conversation_changes_nothing(tmp_path, capsys, monkeypatch):
    path = tmp_path / "talk.json"
    path.write_text(json.dumps({"messages": [], "settings": {"chat_template": "{% if %}", "top_p": 0.5}}))
    chat, model = start_chat()
    prompt = model.prompt

    def refusing(messages, **options):
        if model.chat_template == "{% if %}":
            raise ValueError("chat template, line 1: no")
        return prompt(messages, **options)

    monkeypatch.setattr(model, "prompt", refusing)
    chat.take(f"/load {path}")
    assert capsys.readouterr().err == "qwen3-moe: /load: chat template, line 1: no\n"
    assert (chat.template, chat.sampling.top_p) == (None, 1.0)
