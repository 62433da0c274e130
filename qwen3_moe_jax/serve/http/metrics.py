"""Counts and gauges for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from qwen3_moe_jax.serve.engine.client import EngineClient
from qwen3_moe_jax.serve.engine.replicas import Engine
from qwen3_moe_jax.serve.generation import Usage

_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The server's metrics, in a registry of their own."""

    def __init__(self):
        self.registry = kept = CollectorRegistry()
        self.requests = Counter(
            "qwen3_moe_requests", "Requests by path and status", ["path", "status"], registry=kept
        )
        self.tokens = Counter(
            "qwen3_moe_tokens",
            "Tokens: prompt, cached, completion, reasoning",
            ["kind"],
            registry=kept,
        )
        self.answers = Counter(
            "qwen3_moe_answers", "Answers by the reason of their end", ["reason"], registry=kept
        )
        self.first_token = Histogram(
            "qwen3_moe_first_token_seconds",
            "From the request to the first token",
            buckets=_BUCKETS,
            registry=kept,
        )
        self.unknown_fields = Counter(
            "qwen3_moe_unknown_fields", "Fields of requests that are not known", registry=kept
        )
        self.engine = Gauge("qwen3_moe_engine", "What the engine says of itself", ["name"], registry=kept)
        self.restarts = Gauge(
            "qwen3_moe_engine_restarts", "How often the engine was started again", registry=kept
        )
        self.replica = Gauge(
            "qwen3_moe_replica",
            "What each engine process says of itself; up: it takes requests",
            ["replica", "name"],
            registry=kept,
        )

    def answered(self, usage: Usage, reason: str) -> None:
        """Counts an answer."""
        self.answers.labels(reason).inc()
        for kind in ("prompt", "cached", "completion", "reasoning"):
            self.tokens.labels(kind).inc(getattr(usage, kind))

    def text(self, engine: Engine) -> bytes:
        """In Prometheus' text format."""
        for name, value in engine.counters.items():
            self.engine.labels(name).set(value)
        self.engine.labels("active").set(engine.active)
        self.restarts.set(engine.restarts)
        for number, one in enumerate(engine.engines, 1):
            for name, value in _figures(one).items():
                self.replica.labels(str(number), name).set(value)
        return generate_latest(self.registry)


def _figures(engine: EngineClient) -> dict[str, float]:
    """Of one engine process."""
    seen = {"up": engine.health == "ok", "active": engine.active, "restarts": engine.restarts}
    return {**engine.counters, **seen}
