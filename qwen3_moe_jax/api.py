"""The model as a Python object: text in, text out; and ``load``, which makes it."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import Any, Unpack

from qwen3_moe_jax import loader
from qwen3_moe_jax.convert.config import Qwen3MoeConfig
from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.convert.progress import ProgressCallback
from qwen3_moe_jax.convert.source import ModelSource
from qwen3_moe_jax.core import notebook
from qwen3_moe_jax.core.arguments import check_count, check_list, check_switch, wrong_kind
from qwen3_moe_jax.core.errors import (
    BackendUnavailableError,
    KindError,
    ModelClosedError,
    NumericalError,
)
from qwen3_moe_jax.core.lookup import Drafts
from qwen3_moe_jax.core.options import GenerateOptions, SamplingOptions, shows
from qwen3_moe_jax.core.runner import Runner
from qwen3_moe_jax.core.sampling import Sampling, random_seed, recommended_sampling
from qwen3_moe_jax.machine import processes
from qwen3_moe_jax.machine.environment import check_environment
from qwen3_moe_jax.machine.kernels import AUTO
from qwen3_moe_jax.machine.processes import Processes
from qwen3_moe_jax.parity.gate import check_once, first_forward
from qwen3_moe_jax.research import Messages, Research
from qwen3_moe_jax.text.answer import Answer
from qwen3_moe_jax.text.prompts import Opened, check_room, encoded
from qwen3_moe_jax.text.rendered_chat import RenderedChat
from qwen3_moe_jax.text.request import Request, check_alone, check_request, lookup_for, whole
from qwen3_moe_jax.text.stream import StopStrings, TextStream, stop_texts
from qwen3_moe_jax.text.tokenizer import StreamDecoder, Tokenizer


class Model(Research):
    """A loaded model. Use it as a context manager, or call ``close``: later calls raise ModelClosedError.

    Attributes:
      source: the open file or checkpoint.
      tokenizer: the file's own.
      backend_reason: why this backend was chosen, in words.
      chat_template: Jinja source in place of the file's own, or None.
      prompt_lookup: whether what repeats is guessed (``open_stream``), unless a call says.
    """

    def __init__(
        self,
        source: ModelSource,
        runner: Runner,
        *,
        backend_reason: str = "as asked",
        tokenizer: Tokenizer | None = None,
    ):
        self.source = source
        self._runner = runner
        self.tokenizer = tokenizer or Tokenizer(source.metadata, vocab_size=source.config.vocab_size)
        self.backend_reason = backend_reason
        self.chat_template: str | None = None
        self.prompt_lookup = False

    @property
    def runner(self) -> Runner:
        """The backend that holds the weights. Raises ModelClosedError after ``close``."""
        if self.is_closed:
            raise ModelClosedError
        return self._runner

    @property
    def is_closed(self) -> bool:
        """Whether ``close`` has been called, or its runner's."""
        return self._runner.is_closed

    @property
    def config(self) -> Qwen3MoeConfig:
        """The model's hyper-parameters."""
        return self.source.config

    def __repr__(self) -> str:
        c = self.config
        state = "closed" if self.is_closed else f"{self.runner.name}, max_context={self.runner.max_context}"
        state += f", {self.source.nbytes / 1e9:.3g} GB of weights"
        return (
            f"<Model {self.source.path.name}: {c.num_hidden_layers} layers, {c.num_experts} experts, {state}>"
        )

    def prompt(
        self,
        prompt: str | Messages,
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        thinking: bool | None = None,
        prefill: str = "",
        special: bool = False,
    ) -> tuple[list[int], RenderedChat | None]:
        """Token ids of a prompt; a list of messages goes through the chat template.

        Args:
          prompt, tools, thinking: as ``open_stream``.
          prefill: the beginning of the answer to messages; with a text it is a part of the text.
          special: make control tokens of their names in a text (``<|fim_prefix|>``).
        """
        _ = self.runner  # a closed model says so
        return encoded(
            prompt,
            self.source.metadata,
            self.tokenizer,
            template=self.chat_template,
            tools=tools,
            thinking=thinking,
            prefill=prefill,
            special=special,
        )

    def default_sampling(self, *, thinking: bool | None = None) -> tuple[Sampling, str]:
        """The sampling that the file or its model family recommends, and where that comes from."""
        _ = self.runner
        return recommended_sampling(self.source.metadata, thinking=thinking)

    def sampling(self, *, thinking: bool | None = None, seed: int | None = None, **given: float) -> Sampling:
        """The recommended sampling with the fields that are given in place of its own.

        Args:
          thinking: as ``default_sampling``.
          seed: None draws one.
          **given: fields of ``Sampling``: ``temperature=0`` is greedy and keeps the recommended penalties,
            here and with the command's ``--temperature 0``.

        Raises:
          ValueError: a field is out of its range.
        """
        recommended = self.default_sampling(thinking=thinking)[0]
        return replace(recommended, seed=random_seed() if seed is None else seed, **given)

    @shows(SamplingOptions)
    def open_stream(
        self,
        prompt: str | Messages,
        *,
        max_tokens: int | None = None,
        sampling: Sampling | None = None,
        stop: Sequence[str] | None = (),
        tools: Sequence[dict[str, Any]] | None = None,
        thinking: bool | None = None,
        prefill: str = "",
        special: bool = False,
        reuse: bool = False,
        prompt_lookup: bool | None = None,
        **overrides: Unpack[SamplingOptions],
    ) -> TextStream:
        """Text pieces as they come, with the reason of the end and token counts.

        Args:
          prompt: text, or messages (``[{"role": "user", "content": "hi"}]``).
          max_tokens: at most this many new tokens; None fills the context.
          sampling: None takes ``self.sampling(...)``: what is recommended, with a random seed.
          stop: strings that end the answer; they are not part of it.
          tools: function definitions for the chat template.
          thinking: the template's thinking switch; None leaves its default.
          prefill: the beginning of the answer, which the model goes on from; it is not given back.
          special: make control tokens of their names in a text (``<|fim_prefix|>``).
          reuse: read only what the prompt has beyond the last stream's, where the backend can. The same
            prompt's logits may then differ by rounding.
          prompt_lookup: guess what comes next where the text repeats itself, and check several tokens at
            once: the same answer, sooner where it quotes or edits. None is the model's ``prompt_lookup``.
          **overrides: fields of ``Sampling`` in place of the sampling's own: ``temperature=0``, ``seed=1``.

        Raises:
          BackendUnavailableError: prompt lookup could change an answer's bits here.
          ContextOverflowError: the prompt does not fit the context.
          ValueError: max_tokens is below 1, the prompt is empty, or an option is out of its range.
        """
        stop = stop_texts(stop)
        lookup = lookup_for(self.prompt_lookup if prompt_lookup is None else prompt_lookup)
        r = self._request(
            prompt, max_tokens, sampling, tools, thinking, prefill=prefill, special=special, **overrides
        )
        stop_ids = self.tokenizer.stop_ids
        tokens = self.runner.stream(
            r.token_ids,
            max_tokens=r.max_tokens,
            sampling=r.sampling,
            stop_ids=stop_ids,
            reuse=reuse,
            lookup=lookup,
        )
        return self._text_stream(r, tokens, stop, lookup and lookup.drafts)

    def _request(
        self,
        prompt: str | Messages,
        max_tokens: int | None = None,
        sampling: Sampling | None = None,
        tools: Sequence[dict[str, Any]] | None = None,
        thinking: bool | None = None,
        *,
        prefill: str = "",
        special: bool = False,
        **overrides: Any,
    ) -> Request:
        """What ``open_stream`` is asked for, checked."""
        tools = None if tools is None else check_list("tools", tools)  # a generator is gone through once
        check_request(max_tokens, sampling, thinking, overrides)
        if sampling is None:
            sampling = self.sampling(thinking=thinking, **overrides)
        elif overrides:
            sampling = replace(sampling, **overrides)
        token_ids, chat = self.prompt(
            prompt, tools=tools, thinking=thinking, prefill=prefill, special=special
        )
        if not token_ids:
            raise ValueError("the prompt is empty: give at least one character")
        room = check_room(len(token_ids), self.runner.max_context)
        limit = room if max_tokens is None else min(max_tokens, room)
        return Request(token_ids, limit, sampling, chat)

    def _text_stream(
        self, r: Request, tokens: Iterable[int], stop: Sequence[str] | None, drafts: Drafts | None = None
    ) -> TextStream:
        return TextStream(
            self.tokenizer,
            tokens,
            stop=stop,
            max_tokens=r.max_tokens,
            prompt_tokens=len(r.token_ids),
            starts_in_reasoning=r.chat is not None and r.chat.starts_in_reasoning,
            notes=r.chat.notes if r.chat else (),
            seed=r.sampling.seed,
            drafts=drafts,
        )

    @shows(GenerateOptions)
    def stream(self, prompt: str | Messages, **options: Unpack[GenerateOptions]) -> Iterator[str]:
        """Text pieces as they come; options as ``open_stream``."""
        return iter(self.open_stream(prompt, **options))

    @shows(GenerateOptions)
    def generate(self, prompt: str | Messages, **options: Unpack[GenerateOptions]) -> Answer:
        """The whole text, a ``str`` that has ``finish_reason``, ``tokens``, ``seed`` and ``notes``.

        Options and errors as ``open_stream``.
        """
        return whole(self.open_stream(prompt, **options))

    answer = generate

    @shows(GenerateOptions)
    def generate_batch(
        self, prompts: Sequence[str | Messages], *, stop: str | Sequence[str] | None = (), **options: Any
    ) -> list[Answer]:
        """Answers to several prompts, in their order; options as ``open_stream``.

        The jax backend writes many at a time (up to 16, as memory allows), the others one after the
        other. Every prompt has the same sampling and seed, so it gets the answer it would get alone,
        but for what rounding decides.

        Raises:
          ValueError: ``prompts`` is one text, ``prompt_lookup`` is asked for, or as ``open_stream``.
          NumericalError: logits of a prompt were not finite.
        """
        if isinstance(prompts, str | bytes):
            raise KindError("prompts is one text: give a list of prompts")
        prompts, stop = check_list("prompts", prompts), stop_texts(stop)
        check_alone(options)
        if options.get("tools") is not None:
            options["tools"] = check_list("tools", options["tools"])
        if options.get("sampling") is None and options.get("seed") is None:
            options["seed"] = random_seed()
        run = self.runner.generate_batch
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
            answers.append(whole(self._text_stream(r, result.tokens, stop)))
        return answers

    def close(self) -> None:
        """Gives back the memory of weights and cache, and closes the file; a second call does nothing."""
        self._runner.close()
        self.source.close()

    def __reduce_ex__(self, protocol: object) -> Any:
        raise TypeError("a model cannot be copied or pickled: share it, or load it in each process")

    def __enter__(self) -> "Model":
        _ = self.runner
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def load(
    path: str | os.PathLike[str] | None = None,
    *,
    backend: str = "auto",
    max_context: loader.Context = None,
    dtype: str | None = None,
    kv_cache: str | None = None,
    kernels: str = AUTO,
    adapter: str | None = None,
    mesh: str | None = None,
    prompt_lookup: bool = False,
    distributed: Processes | None = None,
    gate: bool = True,
    strict: bool = False,
    progress: ProgressCallback | bool | None = None,
    first_prompt: int | None = None,
    before_weights: Callable[[Opened], object] | None = None,
) -> Model:
    """Loads a model.

    Args:
      path: a ``.gguf`` file (any shard of a split one), a packed checkpoint folder, a folder with one model,
        ``"hf:OWNER/REPO:Q4_K_M"`` (downloaded if need be), or None for the embedded model.
      backend: "auto", "jax", "wgpu" or "reference". auto is JAX with an NVIDIA
        GPU, else a hardware WebGPU adapter, else JAX on the CPU.
      max_context: tokens of the KV cache; None is 4,096, or the model's own, if less; "fit" is what the
        file and the memory allow.
      dtype: "float32" or "bfloat16" operands (jax); None is bfloat16 on a GPU; on a CPU it is activations of
        15 bits where the native kernels run, else float32. wgpu computes in float32, but rounds the
        activations of long prompts to 16 bits on NVIDIA GPUs, unless "float32" is asked for.
      kv_cache: "float32", "float16", "bfloat16" or "int8" keys and values (jax); None is float16 on a
        GPU, float32 on the CPU. int8 takes about a quarter of float32's memory.
      kernels: "hopper", "portable", "native" or "xla" (jax); "auto" is the fastest that the device has.
      adapter: part of a WebGPU adapter's name (wgpu).
      mesh: how to split the model over devices (jax): "tp=2,ep=1", or "auto" for as many as it can use;
        None is one device. ``ep`` splits the experts by expert, ``tp`` each expert's width.
      prompt_lookup: the model's own ``prompt_lookup`` (jax), whose programs are then made with the others.
      distributed: this process is one of several that share the model (jax, with ``mesh``), on one host or
        more: ``Processes("10.0.0.1:7000", count=2, index=0)``. All make the same calls in the same order.
      gate: check a few tokens against the reference when this backend first
        meets this file (remembered afterwards).
      strict: raise where something would fall back: a GPU that JAX cannot use,
        a quantization type without a kernel on the GPU.
      progress: called with bytes done and bytes in all; True shows a bar, False nothing; None a bar in
        notebooks alone.
      first_prompt: about how many tokens the first prompt has (jax): programs for it that are not on disk
        are compiled while the weights are loaded. None is not known.
      before_weights: called with the open file, when all other arguments have been checked: what it raises
        ends the load, before it takes long.

    Raises:
      ModelFileError: the file cannot be used.
      KindError: an argument is of a wrong kind.
      ValueError: an empty path, or a value that does not exist.
      MemoryPlanError: the model does not fit the memory.
      BackendUnavailableError: the backend cannot run on this machine, or (strict) only in part.
      SettingError: an environment variable has a value that it cannot have.
      ParityError: the backend's logits are wrong on this machine.
      OptionError: processes that do not have the same file, versions and options.
    """
    check_switch("gate", gate)
    check_switch("strict", strict)
    check_switch("prompt_lookup", prompt_lookup)
    if progress is not None and not isinstance(progress, bool) and not callable(progress):
        raise wrong_kind("progress", progress, "a function, True or False")
    if before_weights is not None and not callable(before_weights):
        raise wrong_kind("before_weights", before_weights, "a function")
    if not isinstance(distributed, Processes | None):
        raise wrong_kind("distributed", distributed, "a Processes")
    if first_prompt is not None:
        check_count("first_prompt", first_prompt)
    check_environment()
    if distributed is not None:
        processes.join(distributed)
    found = loader.model_path(path)
    with notebook.progress(progress, "loading") as report, ExitStack() as undo:
        pool = undo.enter_context(ThreadPoolExecutor(2, thread_name_prefix="ahead"))
        if mesh is None and backend in ("auto", "jax"):
            pool.submit(loader.start_gpu)
        source = undo.enter_context(open_model(found))
        if processes.count() > 1:
            given = {"backend": backend, "mesh": mesh, "dtype": dtype, "kernels": kernels, "gate": gate}
            given |= {"context": max_context, "cache of keys and values": kv_cache}
            processes.check_all_have({"model file": source.content, **given}, what="what is loaded")
        tokenizer: list[Future[Tokenizer]] = []

        def build_tokenizer() -> Future[Tokenizer]:
            if not tokenizer:
                vocab_size = source.config.vocab_size
                tokenizer.append(pool.submit(Tokenizer.built, source.metadata, vocab_size=vocab_size))
            return tokenizer[0]

        def told(done: int, total: int) -> None:
            """Builds the tokenizer while weights are read, which leaves the interpreter to others."""
            if build_tokenizer().done():
                tokenizer[0].result()  # one that cannot be built ends the load
            if report:
                report(done, total)

        def check(max_context: int) -> None:
            if before_weights is not None:
                before_weights(Opened(source, max_context, lambda: build_tokenizer().result()))

        chosen, reason, fallbacks = (
            loader.choose_backend(kernels, mesh, adapter) if backend == "auto" else (backend, "as asked", ())
        )
        if strict and fallbacks:
            raise BackendUnavailableError(f"strict: {fallbacks[0]}")
        runner = loader.make_runner(
            source,
            chosen,
            max_context=max_context,
            dtype=dtype,
            kv_cache=kv_cache,
            kernels=kernels,
            adapter=adapter,
            mesh=mesh,
            prompt_lookup=prompt_lookup,
            progress=told,
            check=check,
            first_prompt=first_prompt,
            first_forward=first_forward(source) if gate else None,
        )
        undo.enter_context(closing(runner))
        build_tokenizer()
        left_out = runner.describe()["fallbacks"]
        if strict and isinstance(left_out, list) and left_out:
            raise BackendUnavailableError(f"strict: {left_out[0]}")
        if gate:
            check_once(runner, source)
        model = Model(source, runner, backend_reason=reason, tokenizer=tokenizer[0].result())
        model.prompt_lookup = prompt_lookup
        undo.pop_all()
        pool.shutdown()
        return model
