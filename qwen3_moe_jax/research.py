"""What research asks of a loaded model: logits, its own proof, stages, experts, gradients."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from qwen3_moe_jax.convert.source import ModelSource
from qwen3_moe_jax.core.arguments import check_count, check_list, check_text
from qwen3_moe_jax.core.options import shows
from qwen3_moe_jax.core.runner import Forward, ForwardOptions, Runner
from qwen3_moe_jax.core.stages import STAGES
from qwen3_moe_jax.measure.perplexity import DEFAULT_CONTEXT as DEFAULT_WINDOW
from qwen3_moe_jax.measure.perplexity import Perplexity, cut_text, measure_perplexity
from qwen3_moe_jax.text.rendered_chat import RenderedChat
from qwen3_moe_jax.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from qwen3_moe_jax.inspection.experts import ExpertUsage
    from qwen3_moe_jax.inspection.trace import Trace
    from qwen3_moe_jax.measure.divergence import Divergence
    from qwen3_moe_jax.parity import Report
    from qwen3_moe_jax.parity.bisect import Departure

Messages = Sequence[dict[str, Any]]


class Research(ABC):
    """The methods of ``api.Model`` that look inside; the model itself writes text."""

    source: ModelSource
    tokenizer: Tokenizer

    @property
    @abstractmethod
    def runner(self) -> Runner:
        """The backend that holds the weights."""

    @abstractmethod
    def prompt(self, prompt: str | Messages) -> tuple[list[int], RenderedChat | None]:
        """Token ids of a prompt; a list of messages goes through the chat template."""

    @shows(ForwardOptions)
    def forward(self, token_ids: Sequence[int], **options: Unpack[ForwardOptions]) -> Forward:
        """Logits, expert choices and captured stages of a prompt; options as ``Runner.forward``.

        Raises:
          ValueError: what ``core.runner_arguments.checked_forward`` refuses: an unknown id, say.
        """
        return self.runner.forward(token_ids, **options)

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """Logits of every position: float32 [T, V]."""
        return self.forward(token_ids).logits

    def perplexity(
        self, text: str, *, context: int = DEFAULT_WINDOW, stride: int | None = None
    ) -> Perplexity:
        """Perplexity of a text, with its standard error; errors as ``perplexity.estimates``.

        Args:
          text: read in windows.
          context: tokens of a window.
          stride: None scores the second half of each window, as llama-perplexity does; a number is
            Hugging Face's strided recipe.
        """
        check_text("text", text)
        return measure_perplexity(self.runner, self.tokenizer, text, context=context, stride=stride)

    def divergence(
        self, base: "Research", text: str, *, context: int = DEFAULT_WINDOW, stride: int | None = None
    ) -> "Divergence":
        """How far this model's distributions are from those of ``base``, another file of it.

        ``.kl`` is the mean KL(base || this) in nats per token, ``.top_1`` the share of tokens whose
        likeliest token agrees; both models are held. Arguments and errors as :meth:`perplexity`.
        """
        from qwen3_moe_jax.measure import divergence as measure

        check_text("text", text)
        cut = cut_text(self.runner.max_context, self.tokenizer, text, context, stride)
        measure.check_same_vocabulary(cut, self.tokenizer, base.tokenizer, text, str(base.source.path))
        sources = (measure.runner_logits(model.runner, cut) for model in (self, base))
        *_, last = measure.divergences(cut, *sources)
        return last

    def verify(
        self,
        *,
        text_tokens: int | None = None,
        clauses: Sequence[str] = (),
        progress: Callable[..., None] | None = None,
        begins: Callable[..., None] | None = None,
    ) -> "Report":
        """Runs the parity contract on this machine.

        Args:
          text_tokens: of the text that is run; None for the contract's.
          clauses: ids of those to run; none for all.
          progress, begins: as ``parity.verify``.
        """
        from qwen3_moe_jax.parity import verify

        clauses = check_list("clauses", clauses)
        options: dict[str, Any] = {"text_tokens": text_tokens, "clauses": clauses or None}
        options |= {"progress": progress, "begins": begins}
        given = {key: value for key, value in options.items() if value is not None}
        return verify(self.source, [self.runner], **given)

    @shows(ForwardOptions)
    def trace(
        self,
        prompt: str | Messages,
        stages: Collection[str] | None = None,
        **options: Unpack[ForwardOptions],
    ) -> "Trace":
        """Every stage of every layer for a prompt, or only the named ones; options as ``Runner.forward``.

        ``.forward.stages["l_out", 3]`` is an array [T, ...], ``.figures()`` are norms, ranges and
        non-finite counts, ``.experts()`` each token's experts and weights; ``.save`` writes it all.
        """
        from qwen3_moe_jax.inspection import trace

        wanted = check_list("stages", stages or ()) or tuple(STAGES)
        return trace.trace(self.runner, self._some_ids(prompt), wanted, **options)

    def bisect(self, prompt: str | Messages | None = None) -> "Departure | None":
        """The first stage that departs from the reference, with its cause; None for a right backend."""
        from qwen3_moe_jax.parity import bisect
        from qwen3_moe_jax.parity.recorded import parity_text

        ids = self._some_ids(parity_text() if prompt is None else prompt)
        return bisect.bisect(self.source, self.runner, ids)

    def experts(self, text: str | Messages, *, window: int | None = None) -> "ExpertUsage":
        """How often every expert of every layer is chosen; ``.save_picture`` draws it layer by expert."""
        from qwen3_moe_jax.inspection import experts

        if window is not None:
            check_count("window", window)
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

        runner: Any = self.runner  # another backend is refused
        return research.logit_gradient(
            runner, self._some_ids(prompt), token=token, stage=stage, layer=layer, position=position
        )

    def _some_ids(self, prompt: str | Messages) -> list[int]:
        token_ids = self.prompt(prompt)[0]
        if not token_ids:
            raise ValueError("the prompt is empty: give at least one character")
        return token_ids
