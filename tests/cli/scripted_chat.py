"""A chat with a model that says what it is told to, a word for a token."""

import argparse

from qwen3_moe_jax.commands import chat as chat_command
from qwen3_moe_jax.commands.talk.conversation import Conversation
from qwen3_moe_jax.core.sampling import Sampling
from qwen3_moe_jax.text.stream import Piece


class Scripted:
    """A model with a script; ``asked`` has the messages and options of each call."""

    def __init__(self, *answers: str, context: int = 1000):
        self.answers, self.asked = list(answers), []
        facts = {"name": "script", "max_context": context, "reused_tokens": 0, "compilation": lambda: None}
        self.runner = argparse.Namespace(**facts)
        self.config = argparse.Namespace(max_position_embeddings=4096)

    def prompt(self, messages, **_):
        return " ".join(m["content"] for m in messages).split(), None

    def open_stream(self, messages, **options):
        self.asked.append((messages, options))
        return Stream(self.answers.pop(0), len(self.prompt(messages)[0]))


class Stream:
    """An answer: what stands before "|" is reasoning."""

    def __init__(self, text: str, prompt_tokens: int):
        self.text, self.prompt_tokens, self.new_tokens = text, prompt_tokens, len(text.split())
        self.notes, self.finish_reason, self.drafts = (), None, None

    def pieces(self):
        reasoning, bar, content = self.text.partition("|")
        if bar:
            yield Piece("reasoning", reasoning)
        yield Piece("content", content if bar else reasoning)
        self.finish_reason = "stop"

    def close(self):
        pass


def start_chat(*answers: str, args: tuple[str, ...] = (), context: int = 1000):
    parser = argparse.ArgumentParser()
    chat_command.add_arguments(parser)
    model = Scripted(*answers, context=context)
    sampling = Sampling(seed=5, temperature=0.7)
    return chat_command.Chat(parser.parse_args(["-q", *args]), model, sampling, Conversation()), model


def contents(model: Scripted, number: int = -1) -> list[str]:
    return [message["content"] for message in model.asked[number][0]]
