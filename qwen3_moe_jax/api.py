"""The model as a Python object: text in, text out, logits, and its own proof."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen3_moe_jax.convert.model_source import ModelSource
from qwen3_moe_jax.core.errors import ContextOverflowError, NumericalError
from qwen3_moe_jax.core.runner import Forward, Runner
from qwen3_moe_jax.core.sampling import Sampling, recommended_sampling
from qwen3_moe_jax.core.stages import STAGES
from qwen3_moe_jax.measure.perplexity import Perplexity, measure_perplexity
from qwen3_moe_jax.text.chat_template import RenderedChat, find_template, render_chat, special_tokens
from qwen3_moe_jax.text.stream import StopStrings, TextStream
from qwen3_moe_jax.text.tokenizer import StreamDecoder, Tokenizer

if TYPE_CHECKING:
    from qwen3_moe_jax.inspection.experts import ExpertUsage
    from qwen3_moe_jax.inspection.trace import Trace
    from qwen3_moe_jax.parity import Report
    from qwen3_moe_jax.parity.bisect import Departure

Messages = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Answer:
    """A finished generation.

    Attributes:
      text: what was written.
      finish_reason: "stop" (an end token or a stop string) or "length".
      prompt_tokens, new_tokens: how many.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class _Request:
    """A prompt's tokens and how it is answered."""

    token_ids: list[int]
    max_tokens: int
    sampling: Sampling
    starts_in_reasoning: bool


class Model:
    """A loaded model. Use it as a context manager, or call ``close``.

    Attributes:
      source: the open file or checkpoint.
      runner: the backend that holds the weights.
      tokenizer: the file's own.
      backend_reason: why this backend was chosen, in words.
    """

    def __init__(self, source: ModelSource, runner: Runner, *, backend_reason: str = "as asked"):
        self.source = source
        self.runner = runner
        self.tokenizer = Tokenizer(source.metadata, vocab_size=source.config.vocab_size)
        self.backend_reason = backend_reason

    @property
    def config(self):
        """The model's hyper-parameters."""
        return self.source.config

    def prompt(
        self,
        prompt: str | Messages,
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        thinking: bool | None = None,
    ) -> tuple[list[int], RenderedChat | None]:
        """Token ids of a prompt; a list of messages goes through the file's chat template."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt), None
        chat = render_chat(
            find_template(self.source.metadata),
            prompt,
            tools,
            enable_thinking=thinking,
            special=special_tokens(self.source.metadata),
        )
        return self.tokenizer.encode_chat(chat), chat

    def default_sampling(self, *, thinking: bool | None = None) -> tuple[Sampling, str]:
        """The sampling that the file or its model family recommends, and where that comes from."""
        return recommended_sampling(self.source.metadata, thinking=thinking)

    def open_stream(
        self,
        prompt: str | Messages,
        *,
        max_tokens: int | None = None,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        tools: Sequence[dict[str, Any]] | None = None,
        thinking: bool | None = None,
    ) -> TextStream:
        """Text pieces as they come, with the reason of the end and token counts.

        Args:
          prompt: text, or messages (``[{"role": "user", "content": "hi"}]``).
          max_tokens: at most this many new tokens; None fills the context.
          sampling: None takes ``default_sampling``.
          stop: strings that end the answer; they are not part of it.
          tools: function definitions for the chat template.
          thinking: the template's thinking switch; None leaves its default.

        Raises:
          ContextOverflowError: the prompt does not fit the context.
          ValueError: max_tokens is below 1, or the prompt is empty.
        """
        r = self._request(prompt, max_tokens, sampling, tools, thinking)
        tokens = self.runner.stream(
            r.token_ids, max_tokens=r.max_tokens, sampling=r.sampling, stop_ids=self.tokenizer.stop_ids
        )
        return self._text_stream(r, tokens, stop)

    def _request(
        self,
        prompt: str | Messages,
        max_tokens: int | None = None,
        sampling: Sampling | None = None,
        tools: Sequence[dict[str, Any]] | None = None,
        thinking: bool | None = None,
    ) -> "_Request":
        """What ``open_stream`` is asked for, checked."""
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens is {max_tokens}; it must be at least 1")
        token_ids, chat = self.prompt(prompt, tools=tools, thinking=thinking)
        if not token_ids:
            raise ValueError("the prompt is empty: give at least one character")
        room = self.runner.max_context - len(token_ids)
        if room < 1:
            raise ContextOverflowError(len(token_ids), self.runner.max_context)
        limit = room if max_tokens is None else min(max_tokens, room)
        starts_in_reasoning = chat is not None and chat.starts_in_reasoning
        sampling = sampling or self.default_sampling(thinking=thinking)[0]
        return _Request(token_ids, limit, sampling, starts_in_reasoning)

    def _text_stream(self, r: "_Request", tokens: Iterable[int], stop: Sequence[str]) -> TextStream:
        return TextStream(
            self.tokenizer,
            tokens,
            stop=stop,
            max_tokens=r.max_tokens,
            prompt_tokens=len(r.token_ids),
            starts_in_reasoning=r.starts_in_reasoning,
        )

    def stream(self, prompt: str | Messages, **options: Any) -> Iterator[str]:
        """Text pieces as they come; options as ``open_stream``."""
        return iter(self.open_stream(prompt, **options))

    def generate(self, prompt: str | Messages, **options: Any) -> str:
        """The whole text; options as ``open_stream``."""
        return self.answer(prompt, **options).text

    def answer(self, prompt: str | Messages, **options: Any) -> Answer:
        """The whole text with the reason of its end and token counts; options as ``open_stream``."""
        stream = self.open_stream(prompt, **options)
        text = "".join(stream)
        return Answer(text, stream.finish_reason, stream.prompt_tokens, stream.new_tokens)

    def generate_batch(
        self, prompts: Sequence[str | Messages], *, stop: Sequence[str] = (), **options: Any
    ) -> list[Answer]:
        """Answers to several prompts, in their order; options as ``open_stream``.

        The jax backend writes many at a time (up to 16, as memory allows), the others one after the
        other. Every prompt has the same sampling and seed, so it gets the answer it would get alone,
        but for what rounding decides.

        Raises:
          NumericalError: logits of a prompt were not finite.
        """
        run = getattr(self.runner, "generate_batch", None)
        if run is None:
            return [self.answer(prompt, stop=stop, **options) for prompt in prompts]
        requests = [self._request(prompt, **options) for prompt in prompts]
        watched = [(StreamDecoder(self.tokenizer), StopStrings(stop)) for _ in requests]

        def is_over(number: int, tokens: list[int]) -> bool:
            decoder, stops = watched[number]
            for token in tokens:
                stops.push(decoder.push(token))
            return stops.found is not None

        results = run(
            [r.token_ids for r in requests],
            max_tokens=[r.max_tokens for r in requests],
            sampling=[r.sampling for r in requests],
            stop_ids=self.tokenizer.stop_ids,
            is_over=is_over,
        )
        answers = []
        for number, (r, result) in enumerate(zip(requests, results, strict=True)):
            if result.finish_reason == "nonfinite":
                raise NumericalError(f"the logits of prompt {number} are not finite: run `qwen3-moe trace`")
            stream = self._text_stream(r, result.tokens, stop)
            text = "".join(stream)
            answers.append(Answer(text, stream.finish_reason, stream.prompt_tokens, stream.new_tokens))
        return answers

    def forward(self, token_ids: Sequence[int], **options: Any) -> Forward:
        """Logits, expert choices and captured stages of a prompt; options as ``Runner.forward``.

        Raises:
          ValueError: an id is not in the vocabulary, or there are none.
        """
        ids = np.asarray(token_ids)
        if ids.ndim != 1 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError("token_ids must be a non-empty list of integers")
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            bad = int(ids.min() if ids.min() < 0 else ids.max())
            raise ValueError(f"token id {bad} is not in 0..{self.config.vocab_size - 1}")
        return self.runner.forward(ids.astype(np.int32), **options)

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """Logits of every position: float32 [T, V]."""
        return self.forward(token_ids).logits

    def perplexity(self, text: str, **options: Any) -> Perplexity:
        """Perplexity of a text, with its standard error; options as ``perplexity.estimates``.

        Args:
          text: in windows of ``context`` tokens (512). ``stride=None`` scores the second half of
            each, as llama-perplexity does; a number is Hugging Face's strided recipe.
        """
        return measure_perplexity(self.runner, self.tokenizer, text, **options)

    def verify(self, **options: Any) -> "Report":
        """Runs the parity contract on this machine; options as ``parity.verify``."""
        from qwen3_moe_jax.parity import verify

        return verify(self.source, [self.runner], **options)

    def trace(self, prompt: str | Messages, stages: Collection[str] | None = None, **options: Any) -> "Trace":
        """Every stage of every layer for a prompt, or only the named ones; options as ``Runner.forward``.

        ``.forward.stages["l_out", 3]`` is an array [T, ...], ``.figures()`` are norms, ranges and
        non-finite counts, ``.experts()`` each token's experts and weights; ``.save`` writes it all.
        """
        from qwen3_moe_jax.inspection import trace

        return trace.trace(self.runner, self._some_ids(prompt), stages or tuple(STAGES), **options)

    def bisect(self, prompt: str | Messages | None = None) -> "Departure | None":
        """The first stage that departs from the reference, with its cause; None for a right backend."""
        from qwen3_moe_jax.parity import bisect
        from qwen3_moe_jax.parity.recorded import parity_text

        ids = self._some_ids(parity_text() if prompt is None else prompt)
        return bisect.bisect(self.source, self.runner, ids)

    def experts(self, text: str | Messages, *, window: int | None = None) -> "ExpertUsage":
        """How often every expert of every layer is chosen; ``.save_picture`` draws it layer by expert."""
        from qwen3_moe_jax.inspection import experts

        ids = self._some_ids(text)
        name = str(self.source.metadata.get("general.name", self.source.path.name))
        shown = text[:200] if isinstance(text, str) else ""
        return experts.expert_usage(self.runner, ids, model=name, text=shown, window=window)

    def logit_gradient(
        self,
        prompt: str | Messages,
        *,
        token: int,
        stage: str,
        layer: int | None = None,
        position: int = -1,
    ) -> tuple[float, np.ndarray]:
        """A logit and its gradient with respect to an activation, through the packed weights (jax).

        Args:
          prompt: text or messages, T tokens.
          token: id of the logit's token.
          stage: the activation, a float stage of ``stages.STAGES``.
          layer: its layer, or None outside the layers.
          position: of the logit.

        Returns:
          The logit, and float32 [T, ...] in the stage's shape.
        """
        from qwen3_moe_jax.inspection import interventions as research

        return research.logit_gradient(
            self.runner, self._some_ids(prompt), token=token, stage=stage, layer=layer, position=position
        )

    def _some_ids(self, prompt: str | Messages) -> list[int]:
        token_ids = self.prompt(prompt)[0]
        if not token_ids:
            raise ValueError("the prompt is empty: give at least one character")
        return token_ids

    def close(self) -> None:
        """Gives back the weights' memory and closes the file."""
        self.runner.close()
        self.source.close()

    def __enter__(self) -> "Model":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
