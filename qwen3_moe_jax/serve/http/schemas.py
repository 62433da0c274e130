"""What requests may hold. Fields that are not named here are ignored and counted (``--strict-fields``)."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from qwen3_moe_jax.serve.settings import MAX_LOGPROBS, MAX_N

Int = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
TokenIds = list[Annotated[int, Field(ge=0, lt=2**31)]]


class Body(BaseModel):
    """Strict about the types of what it knows; keeps what it does not know apart."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, protected_namespaces=())

    @property
    def unknown(self) -> list[str]:
        """Names of fields that are not known."""
        return sorted(self.model_extra or ())


class Common(Body):
    """Of every request that is answered with text."""

    model: str | None = None
    stream: bool | None = False
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-100, le=100)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Int | None = None
    cache_prompt: bool | None = None
    cache_salt: Annotated[str, Field(max_length=256)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=1024)] | None = None
    enable_thinking: bool | None = None
    thinking_budget: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None


class StreamOptions(Body):
    include_usage: bool | None = False


class ChatRequest(Common):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = 1
    stop: str | list[str] | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=1024)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    modalities: list[str] | None = None
    audio: dict[str, Any] | None = None
    functions: list[dict[str, Any]] | None = None
    function_call: str | dict[str, Any] | None = None


class CompletionRequest(Common):
    """POST /v1/completions."""

    prompt: str | list[str] | TokenIds | list[TokenIds] = "<|endoftext|>"
    suffix: str | None = None
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = 16
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = 1
    best_of: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    stop: str | list[str] | None = None
    stream_options: StreamOptions | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = False


class InfillRequest(Common):
    """POST /infill."""

    input_prefix: str = ""
    input_suffix: str = ""
    prompt: str = ""
    n_predict: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    max_tokens: Count | None = None
    stop: str | list[str] | None = None


class ResponsesRequest(Common):
    """POST /v1/responses."""

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=1024)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: dict[str, Any] | None = None
    text: dict[str, Any] | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    background: bool | None = None
    include: Annotated[list[str], Field(max_length=32)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None


class CountTokensRequest(Body):
    """POST /v1/messages/count_tokens."""

    model: str | None = None
    messages: list[dict[str, Any]]
    system: str | list[dict[str, Any]] | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=1024)] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None


class MessagesRequest(Common):
    """POST /v1/messages."""

    messages: list[dict[str, Any]]
    max_tokens: Count
    system: str | list[dict[str, Any]] | None = None
    stop_sequences: list[str] | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=1024)] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None


class TokenizeRequest(Body):
    """POST /tokenize: ``content`` (llama-server's name) or ``prompt`` (vLLM's), or messages."""

    content: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    model: str | None = None
    add_generation_prompt: bool | None = True
    add_special_tokens: bool | None = None
    add_special: bool | None = None
    parse_special: bool | None = None
    with_pieces: bool | None = False
    return_token_strs: bool | None = False


class DetokenizeRequest(Body):
    """POST /detokenize."""

    tokens: TokenIds
    model: str | None = None


class ApplyTemplateRequest(Body):
    """POST /apply-template."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = True


class ExpertsRequest(Body):
    """POST /experts: a text whose experts are counted."""

    text: Annotated[str, Field(min_length=1, max_length=65536)]
