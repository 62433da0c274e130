"""The terminal chat: its conversation, its commands, what it shows, and a session at a pseudo-terminal."""

import re
import subprocess
import sys

import pytest

from qwen3_moe_jax.commands.talk import clipboard, editor, screen, slash
from qwen3_moe_jax.commands.talk.conversation import Conversation, Turn
from qwen3_moe_jax.core import terminal
from qwen3_moe_jax.core.sampling import Sampling
from qwen3_moe_jax.testing.terminal import SECONDS, Terminal
from qwen3_moe_jax.text.stream import Piece
from tests.cli.scripted_chat import contents, start_chat

QUICK = ("--backend", "reference", "--no-gate")


def test_turns_are_sent_again_and_undone(capsys):
    chat, model = start_chat("one", "two", "three")
    for text in ("a", "b", "/undo", "c"):
        chat.take(text)
    assert contents(model) == ["a", "one", "c"]
    captured = capsys.readouterr()
    assert captured.out == "one\ntwo\nthree\n"
    assert captured.err == "undone: b\n"
    assert all(options["reuse"] for _, options in model.asked)


def test_a_retry_takes_the_next_seed_and_a_failed_one_keeps_the_answer(capsys):
    chat, model = start_chat("one", "two", "three")
    for text in ("a", "/retry", "/retry"):
        chat.take(text)
    assert [options["sampling"].seed for _, options in model.asked] == [5, 6, 7]
    assert [turn.answer for turn in chat.conversation.turns] == ["three"]
    model.open_stream = lambda *_, **__: (_ for _ in ()).throw(ValueError("raise max_context"))
    chat.take("/retry")
    assert [turn.answer for turn in chat.conversation.turns] == ["three"]
    assert "raise --context" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            RuntimeError("RESOURCE_EXHAUSTED: 5 GB"),
            "out of memory: RESOURCE_EXHAUSTED: 5 GB; a smaller --context",
        ),
        (RuntimeError("the wgpu device gave no result"), "the wgpu device gave no result"),
        (MemoryError(), "out of memory; a smaller --context or another machine may do"),
    ],
)
def test_what_ends_an_answer_does_not_end_the_conversation(error, line, capsys):
    chat, model = start_chat("one", "two")
    chat.take("a")
    asked, answer = model.asked, model.open_stream

    def fails(*_, **__):
        model.open_stream = answer
        raise error

    model.open_stream = fails
    chat.take("b")
    assert line in capsys.readouterr().err
    chat.take("c")
    assert [message["content"] for message in asked[-1][0]] == ["a", "one", "c"]


def test_a_system_without_settings_of_terminals_shows_the_keys(monkeypatch):
    """Windows has no termios."""
    monkeypatch.setitem(sys.modules, "termios", None)
    with editor.keys_unseen():
        pass


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("/sett x", "there is no command /sett; did you mean /set or /stats?"),
        ("/zzz", "there is no command /zzz; /help lists them"),
        ("/undo it", "/undo takes nothing after it"),
        ("/set warmth 1", "/set: there is no setting warmth: temperature, top_k"),
        ("/set temperture 1", "did you mean temperature?"),
        ("/set top_p 2", "/set: must be above 0 and at most 1"),
        ("/set seed -7", "/set: -7: it must be from 0"),
        ("/thinking maybe", "'maybe' is none of on, off, auto, show, fold, hide"),
        ("/load /no/such", "/load: /no/such cannot be read: No such file"),
        ("/load", "/load: is empty"),
        ("/save", "/save: is empty"),
        ("/copy", "/copy: there is nothing to copy"),
    ],
)
def test_a_wrong_command_is_a_line_of_error_and_reaches_no_model(text, line, capsys):
    chat, model = start_chat()
    chat.take(text)
    assert line in capsys.readouterr().err
    assert model.asked == []


def test_a_slash_that_is_no_command_is_sent():
    chat, model = start_chat("x", "x", "x")
    for text in ("//help me", "/etc/hosts holds what?", "/ is division"):
        chat.take(text)
    assert contents(model)[::2] == ["/help me", "/etc/hosts holds what?", "/ is division"]


def test_settings_hold_for_the_next_answer(capsys):
    chat, model = start_chat("x", "x")
    settings = ("temp 0", "top-p 0.5", "seed 9", "max_tokens 7", "thinking off", "stop a\\nb", "verbose on")
    for text in (*(f"/set {setting}" for setting in settings), "/system Be brief.", "hi"):
        chat.take(text)
    messages, options = model.asked[0]
    assert messages[0] == {"role": "system", "content": "Be brief."}
    assert options["sampling"] == Sampling(temperature=0, top_p=0.5, seed=9)
    assert (options["max_tokens"], options["thinking"], options["stop"]) == (7, False, ["a\nb"])
    assert "context: 4 of 1,000 tokens in use" in capsys.readouterr().err
    chat.take("/system -")
    chat.take("/reset")
    chat.take("hi")
    assert contents(model) == ["hi"]


def test_a_conversation_is_saved_loaded_and_not_written_over_another_file(tmp_path, capsys):
    chat, _ = start_chat("hm|yes", args=("--system", "S"))
    chat.conversation.system = "S"
    chat.take("you?")
    path, other = tmp_path / "talk.json", tmp_path / "notes.md"
    other.write_text("mine")
    for text in (f"/save {path}", f"/save {path}", f"/save {other}"):
        chat.take(text)
    assert other.read_text() == "mine"
    assert f"{other} exists: name another file, or /save -f {other}" in capsys.readouterr().err
    chat.take(f"/save -f {other}")
    assert other.read_text() == "## System\n\nS\n\n## User\n\nyou?\n\n## Assistant\n\nyes\n"
    found, settings = Conversation.load(path)
    assert (found.system, found.turns) == ("S", [Turn("you?", "yes", "hm")])
    assert settings["temperature"] == 0.7


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[1]",
        '[{"role": "user", "content": "x"}]',
        '{"a": 1}',
        '[{"role": "user"}]',
        '{"messages": [], "settings": 3}',
        '[{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "y"}]',
        '[{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "reasoning_content": 5}]',
    ],
)
def test_a_file_that_is_no_conversation_is_refused(content, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        Conversation.load(path)


def test_a_full_context_drops_the_oldest_turns_until_half_is_free(capsys):
    chat, model = start_chat(*["w " * 18] * 5, context=100, args=("--system", "S"))
    chat.conversation.system = "S"
    for number in range(4):
        chat.take(f"question {number}")
    assert "81 of 100 tokens in use (81%)" in (said := capsys.readouterr().err)
    assert said.count("in use") == 1
    chat.take("question " * 10)
    assert contents(model)[:2] == ["S", "question 3"]
    assert "the oldest 3 turns are not sent any more (left: 1)" in capsys.readouterr().err
    assert len(chat.conversation.turns) == 5


def test_a_message_that_never_fits_drops_no_turn(capsys):
    chat, model = start_chat(*["w " * 18] * 2, context=100)
    chat.take("first")
    assert chat.conversation.make_room("q " * 100, chat._count, 100, None) == 0
    assert "not sent any more" not in capsys.readouterr().err
    chat.take("second")
    assert contents(model)[0] == "first"


def test_a_full_context_refuses_the_message_if_asked_to(capsys):
    chat, model = start_chat(*["w " * 88] * 2, context=100, args=("--context-full", "stop"))
    chat.take("a")
    chat.take("b")
    assert len(model.asked) == 1
    assert "the context is full (90 of 100 tokens with this message): /undo or" in capsys.readouterr().err


def test_what_is_left_after_an_undo_is_sent():
    conversation = Conversation("S", [Turn("a", "b"), Turn("c", "d")], first=2)
    conversation.undo()
    assert conversation.first == 1
    assert [m["content"] for m in conversation.messages("q")] == ["S", "q"]


# What is shown


@pytest.mark.parametrize(
    ("view", "shown"), [("show", "<think>\nhm\n</think>\n\nyes\n"), ("fold", "yes\n"), ("hide", "yes\n")]
)
def test_a_pipe_gets_the_text_and_the_thinking_that_is_asked_for(view, shown, capsys):
    chat, _ = start_chat("hm|yes", args=("--reasoning", view))
    chat.take("?")
    assert capsys.readouterr().out == shown
    assert chat.conversation.turns[0].reasoning == "hm"
    chat.take("/thinking")
    assert capsys.readouterr().err == "hm\n"


@pytest.mark.parametrize(
    ("text", "closed"),
    [
        ("a\nb", ""),
        ("# H\n\na", "# H"),
        ("a\n\n```py\nx\n\ny", "a"),
        ("```py\nx\n```\nb", "```py\nx\n```"),
        ("- a\n\n- b", ""),
        ("a\n\n| x | y |\n|---|---|\n| 1 | 2 |", "a"),
    ],
)
def test_a_block_is_closed_when_another_one_follows(text, closed):
    found, rest = screen.closed_blocks(text)
    assert found == closed
    assert (found + rest).replace("\n", "") == text.replace("\n", "")


def rendered(*pieces: Piece, view: str = "show", monkeypatch, capsys) -> str:
    monkeypatch.setattr(terminal, "output_on_terminal", lambda: True)
    monkeypatch.setattr(screen, "SECONDS_PER_FRAME", 0.0)
    shown = screen.StyledScreen(view)
    for piece in pieces:
        shown.take(piece)
    shown.finish()
    return capsys.readouterr().out


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_markdown_is_rendered_and_control_characters_are_not(monkeypatch, capsys):
    text = "# Title\n\nsome *words* \x1b[31m\n\n- [x](http://a)\n"
    shown = rendered(*(Piece("content", c) for c in text), monkeypatch=monkeypatch, capsys=capsys)
    assert "\x1b[31m" not in shown
    assert "\\x1b[31m" in plain(shown)
    assert "*words*" not in plain(shown)
    assert "http://a" in plain(shown)


def test_a_long_block_is_drawn_by_its_end_and_kept_whole(monkeypatch, capsys):
    code = "```\n" + "".join(f"line {n}\n" for n in range(200)) + "```\n"
    pieces = [Piece("content", code[i : i + 100]) for i in range(0, len(code), 100)]
    shown = rendered(*pieces, monkeypatch=monkeypatch, capsys=capsys)
    text = plain(shown)
    last = text[text.rindex("line 0\n") if "line 0\n" in text else text.rindex("line 0 ") :]
    assert re.findall(r"line (\d+)", last) == [str(n) for n in range(200)]
    assert len(re.findall(r"line 0\b", text)) < 10


def test_thinking_is_dim_folded_or_hidden(monkeypatch, capsys):
    pieces = (Piece("reasoning", "hm hm"), Piece("content", "yes"))
    shown = {
        view: rendered(*pieces, view=view, monkeypatch=monkeypatch, capsys=capsys) for view in slash.VIEWS
    }
    assert "\x1b[2;3mhm hm" in shown["show"]
    assert "hm" not in shown["fold"]
    assert "thought for" in shown["fold"]
    assert "thought" not in plain(shown["hide"])
    assert all("yes" in text for text in shown.values())


# The editor


def test_three_quotes_hold_a_message_of_several_lines():
    assert editor.unquoted('"""\na\n\nb\n"""') == "a\n\nb"
    assert editor.unquoted('say """x"""') == 'say """x"""'
    assert editor.unquoted('"""') == '"""'


def test_commands_settings_and_files_are_completed(tmp_path):
    words = lambda text: [word for word, _ in slash.complete(text)]
    assert words("/s") == ["/system", "/set", "/save", "/stats"]
    assert words("/set to") == ["top_k", "top_p"]
    assert words("/thinking f") == ["fold"]
    (tmp_path / "a.json").touch()
    assert words(f"/load {tmp_path}/a") == [f"{tmp_path}/a.json"]
    assert words("hello /s") == words("/s\n/s") == []


def test_the_last_block_of_code_is_found():
    assert clipboard.last_code("x\n```py\na\n```\ny\n~~~\nb\n```\n~~~\n") == "b\n```\n"
    assert clipboard.last_code("none") is None


def test_a_session_at_a_terminal(tmp_path):
    """Paste, history of two runs, Alt-Enter, Ctrl-C and Ctrl-D at the prompt; the history is its owner's."""
    environment = {
        "TERM": "xterm-256color",
        "PROMPT_TOOLKIT_NO_CPR": "1",
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "PYTHONIOENCODING": "utf-8",
    }
    ready = r"\x1b\[\?2004h[^>]*>[^\n]*\x1b\[\?25h"
    talk = Terminal("chat", "-q", "-n", "2", *QUICK, **environment)
    talk.until(ready)
    talk.press("\x1b[200~/system one\ntwo\x1b[201~")
    talk.until("two")
    talk.press("\x1b\rthree\r")
    talk.until(r"system: one\\ntwo\\nthree")
    talk.until(ready)
    talk.press("x = \r")
    talk.until(ready)
    talk.press("abc\x03")
    talk.until("Ctrl-C again, Ctrl-D or /exit leaves")
    talk.until(ready)
    talk.press("\x04")
    assert talk.exit_code() == 0
    (history,) = (tmp_path / "state").rglob("chat-history")
    assert history.stat().st_mode & 0o777 == 0o600
    assert "+/system one\n+two\n+three\n" in history.read_text()
    again = Terminal("chat", "-q", "-n", "2", *QUICK, **environment)
    again.until(ready)
    again.press("\x1b[A")
    again.until("x =")
    again.press("\x03")
    again.until("leaves")
    again.until(ready)
    again.press("\x03")
    assert again.exit_code() == 130


def test_a_pipe_gets_no_escape_codes_and_commands_work():
    done = subprocess.run(
        [sys.executable, "-m", "qwen3_moe_jax.cli", "chat", "-n", "3", "-q", *QUICK],
        input="def f(x):\n/stats\n/nothing\n/exit\nnever\n",
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0
    assert "\x1b" not in done.stdout + done.stderr
    figures, context, fault = done.stderr.splitlines()
    assert "prompt tokens" in figures
    assert context.endswith("of 4,096 tokens in use (0%)")
    assert "there is no command /nothing" in fault
