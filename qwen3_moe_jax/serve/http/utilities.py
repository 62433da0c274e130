"""Models, tokens, health, metrics, templates: what clients ask beside answers."""

import time
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from qwen3_moe_jax.serve import messages
from qwen3_moe_jax.serve.http import wishes
from qwen3_moe_jax.serve.http.errors import ApiError
from qwen3_moe_jax.serve.http.schemas import (
    ApplyTemplateRequest,
    Common,
    DetokenizeRequest,
    ExpertsRequest,
    TokenizeRequest,
)
from qwen3_moe_jax.serve.http.state import Service, in_thread
from qwen3_moe_jax.serve.http.streams import until_gone

STARTED = int(time.time())
STALLED_SECONDS = 60.0
"""An engine that runs sequences and says nothing for so long is not well."""


def _service(request: Request) -> Service:
    return request.app.state.service


def _model(service: Service) -> dict[str, object]:
    return {
        "id": service.name,
        "object": "model",
        "type": "model",
        "created": STARTED,
        "created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(STARTED)),
        "display_name": service.name,
        "owned_by": "qwen3-moe",
        "max_model_len": service.context,
        "context_length": service.context,
    }


async def models(request: Request) -> Response:
    """The one model, for OpenAI's clients and Anthropic's."""
    model = _model(_service(request))
    ends = {"first_id": model["id"], "last_id": model["id"], "has_more": False}
    return JSONResponse({"object": "list", "data": [model], **ends})


async def model(request: Request) -> Response:
    """One model by its name."""
    service = _service(request)
    if request.path_params["name"] != service.name:
        raise ApiError(404, "there is no such model here", code="model_not_found", param="model")
    return JSONResponse(_model(service))


async def tokenize(request: Request) -> Response:
    """Token ids of a text or of a chat; llama-server's and vLLM's form of the answer together."""
    service = _service(request)
    r = service.parse(request, TokenizeRequest)
    text = r.prompt if r.prompt is not None else r.content
    if r.messages is not None:
        tools, _ = messages.function_tools(r.tools)
        chat = messages.from_chat(r.messages)
        generation = r.add_generation_prompt is not False
        prompt = await in_thread(
            service.model.chat, chat, tools, thinking=None, add_generation_prompt=generation
        )
        ids = prompt.token_ids
    elif text is None:
        raise ApiError(400, "give content, prompt or messages")
    else:
        special = r.parse_special is not False
        ids = await in_thread(service.model.tokenizer.encode, text, parse_special=special)
    pieces = [service.model.token_text(i) for i in ids] if r.with_pieces or r.return_token_strs else None
    tokens: list[Any] = ids
    if pieces is not None and r.with_pieces:
        tokens = [{"id": i, "piece": p} for i, p in zip(ids, pieces, strict=True)]
    return JSONResponse(
        {"tokens": tokens, "count": len(ids), "max_model_len": service.context, "token_strs": pieces}
    )


async def detokenize(request: Request) -> Response:
    """The text of token ids, control tokens spelled out."""
    service = _service(request)
    r = service.parse(request, DetokenizeRequest)
    try:
        text = service.model.tokenizer.decode(r.tokens, show_control=True)
    except ValueError as error:
        raise ApiError(400, str(error), param="tokens") from None
    return JSONResponse({"prompt": text, "content": text})


async def tokenizer_info(request: Request) -> Response:
    """What a client needs that has no tokenizer of its own (vLLM's form)."""
    service = _service(request)
    t = service.model.tokenizer
    name = lambda i: None if i is None else service.model.token_text(i)
    return JSONResponse(
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "eos_token": name(t.eos_id),
            "bos_token": name(t.bos_id),
            "pad_token": name(service.model.metadata.get("tokenizer.ggml.padding_token_id")),
            "vocab_size": service.model.vocab_size,
            "model_max_length": service.context,
            "chat_template": service.model.template,
        }
    )


async def apply_template(request: Request) -> Response:
    """The prompt of a chat as text."""
    service = _service(request)
    r = service.parse(request, ApplyTemplateRequest)
    tools, _ = messages.function_tools(r.tools)
    think = wishes.thinking(Common(chat_template_kwargs=r.chat_template_kwargs))
    chat = messages.from_chat(r.messages)
    generation = r.add_generation_prompt is not False
    rendered = await in_thread(
        service.model.render, chat, tools, thinking=think.is_on, add_generation_prompt=generation
    )
    return JSONResponse({"prompt": rendered.text})


async def experts(request: Request) -> Response:
    """How often a text's tokens chose each expert, layer by expert: for the page's heatmap."""
    service = _service(request)
    r = service.parse(request, ExpertsRequest)
    ids = await in_thread(service.model.tokenizer.encode, r.text)
    ids = ids[-min(2048, service.context - 1) :]
    counts = await until_gone(request.receive, service.engine.experts(ids))
    return JSONResponse({"tokens": len(ids), "counts": counts})


async def livez(request: Request) -> Response:
    """200 while this process runs."""
    return JSONResponse({"status": "ok"})


async def health(request: Request) -> Response:
    """200 if requests are taken; 503 while loading or draining, or with a dead engine. With each replica."""
    engine = _service(request).engine
    state, found = engine.health, {}
    if len(engine.engines) > 1:
        found["replicas"] = [
            {"status": e.health, "active": e.active, "restarts": e.restarts} for e in engine.engines
        ]
    return JSONResponse({"status": state, **found}, 200 if state == "ok" else 503)


async def health_decode(request: Request) -> Response:
    """503 if sequences run and none has got a token for long."""
    engine = _service(request).engine
    silent = time.monotonic() - engine.last_token
    if engine.health != "ok":
        return JSONResponse({"status": engine.health}, 503)
    if not engine.active:
        return JSONResponse({"status": "idle"})
    is_stalled = silent > STALLED_SECONDS
    return JSONResponse({"status": "stalled" if is_stalled else "decoding"}, 503 if is_stalled else 200)


async def metrics(request: Request) -> Response:
    """Prometheus' text format; 501 unless the server was started with --metrics."""
    service = _service(request)
    if not service.settings.metrics:
        raise ApiError(501, "metrics are off: start the server with --metrics")
    return PlainTextResponse(
        service.metrics.text(service.engine), media_type="text/plain; version=0.0.4; charset=utf-8"
    )
