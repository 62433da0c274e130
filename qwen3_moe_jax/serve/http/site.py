"""The chat page and its files, from memory, under a strict content security policy."""

from functools import cache
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response

from qwen3_moe_jax.serve.http.errors import ApiError

FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/markdown.js": ("markdown.js", "text/javascript; charset=utf-8"),
    "/heatmap.js": ("heatmap.js", "text/javascript; charset=utf-8"),
}
PAGE_PATHS = frozenset(FILES)

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; form-action 'none'; frame-ancestors 'none'; base-uri 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


@cache
def _content(name: str) -> bytes:
    return (files("qwen3_moe_jax.serve") / "page" / name).read_bytes()


async def page(request: Request) -> Response:
    """A file of the page."""
    found = FILES.get(request.url.path)
    if found is None:
        raise ApiError(404, "there is no such path")
    name, kind = found
    return Response(_content(name), headers={**HEADERS, "content-type": kind})
