"""Clients that cost too much for the test suite: coding agents, lm-eval, a fuzzer, many schemas, a soak.

    python -m scripts.check_clients agents --node DIR      (npm install --prefix DIR @openai/codex ...)
    python -m scripts.check_clients lm-eval schemathesis --python DIR/bin/python
    python -m scripts.check_clients schemas
    python -m scripts.check_clients soak --minutes 15
    ... --receipt docs/receipts/serve_clients.json

agents        Codex, Claude Code, Qwen Code and OpenCode, each with a home of its own, answer one question.
              The engine says a fixed text: this checks protocols. ``--record DIR`` keeps what they send.
lm-eval       local-completions with the server as its tokenizer: its sums are those of ``Model.logits``
schemathesis  requests made from our own openapi.json: no answer is a server error
schemas       200 random schemas on the embedded model: what ends validates
soak          valid, invalid and given-up requests on the scripted model: memory of front and engine

The last line is JSON; a receipt keeps the parts of earlier runs.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import psutil

from qwen3_moe_jax.loader import embedded_model
from qwen3_moe_jax.serve.http import state
from qwen3_moe_jax.serve.settings import Settings
from qwen3_moe_jax.testing.fake_engine import FakeEngine
from qwen3_moe_jax.testing.http_server import Running, quick_start, running
from qwen3_moe_jax.testing.random_schemas import random_schema
from qwen3_moe_jax.testing.scripted_model import build_scripted_model
from qwen3_moe_jax.text.tokenizer import Tokenizer

ANSWER = "The answer is forty-two."
QUESTION = "What is the answer? Say it and stop."


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="+", choices=sorted(PARTS))
    parser.add_argument("--node", type=Path, help="where npm has installed the agents")
    parser.add_argument("--python", default=sys.executable, help="a Python that has lm-eval and schemathesis")
    parser.add_argument("--record", type=Path, help="a folder for the requests of agents")
    parser.add_argument("--minutes", type=float, default=15, help="of the soak")
    parser.add_argument("--count", type=int, default=200, help="schemas")
    parser.add_argument("--receipt", type=Path)
    return parser.parse_args()


@contextlib.contextmanager
def scripted_file() -> Iterator[Path]:
    """The scripted model as a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scripted.gguf"
        path.write_bytes(build_scripted_model())
        yield path


# -- agents


def agent_commands(url: str, node: Path) -> dict[str, tuple[list[str], dict[str, str]]]:
    """The command of each agent and its environment."""
    run = lambda name: str(node / "node_modules" / ".bin" / name)
    provider = f'{{name="local",base_url="{url}/v1",wire_api="responses"}}'
    codex = [run("codex"), "exec", "--skip-git-repo-check", "-m", "scripted"]
    codex += ["-c", "model_provider=local", "-c", f"model_providers.local={provider}", QUESTION]
    openai = {"OPENAI_BASE_URL": f"{url}/v1", "OPENAI_API_KEY": "none", "OPENAI_MODEL": "scripted"}
    claude = {"ANTHROPIC_BASE_URL": url, "ANTHROPIC_AUTH_TOKEN": "none", "ANTHROPIC_MODEL": "scripted"}
    claude |= {"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "ANTHROPIC_SMALL_FAST_MODEL": "scripted"}
    return {
        "codex": (codex, {}),
        "claude": ([run("claude"), "-p", QUESTION], claude),
        "qwen": ([run("qwen"), "--auth-type", "openai", "-p", QUESTION], openai),
        "opencode": ([run("opencode"), "run", "-m", "local/scripted", QUESTION], {}),
    }


def opencode_settings(url: str) -> dict[str, Any]:
    """What OpenCode reads of its providers."""
    options = {"baseURL": f"{url}/v1", "apiKey": "none"}
    models = {"scripted": {"name": "scripted", "limit": {"context": 200_000, "output": 32_000}}}
    return {
        "$schema": "https://opencode.ai/config.json",
        "provider": {"local": {"npm": "@ai-sdk/openai-compatible", "options": options, "models": models}},
    }


@contextlib.contextmanager
def recorded(folder: Path | None) -> Iterator[Callable[[str], None]]:
    """Keeps the body of every request; the function given back names whose they are."""
    whose, count, real = ["client"], [0], state.Service.parse

    def parse_and_keep(self: state.Service, request: Any, kind: Any) -> Any:
        if folder is not None:
            count[0] += 1
            name = f"{whose[0]}-{count[0]}{request.url.path.replace('/', '_')}.json"
            (folder / name).write_bytes(request.state.body)
        return real(self, request, kind)

    state.Service.parse = parse_and_keep  # type: ignore[method-assign]
    try:
        yield lambda name: whose.__setitem__(0, name)
    finally:
        state.Service.parse = real  # type: ignore[method-assign]


def agents(args: argparse.Namespace) -> dict[str, Any]:
    """Whether each agent prints the answer and ends well."""
    found: dict[str, Any] = {}
    with scripted_file() as path, recorded(args.record) as name_it:
        start = quick_start(path)
        settings = Settings(port=0, name="scripted")
        with running(settings, start, engine=speaking_engine(start)) as server:
            for name, (command, variables) in agent_commands(server.url, args.node).items():
                name_it(name)
                found[name] = run_agent(command, variables, server.url)
                print(f"{name}: {found[name]}", file=sys.stderr, flush=True)
    return {"ok": all(one["ok"] for one in found.values()), "agents": found}


def speaking_engine(start: Any) -> FakeEngine:
    """An engine that says the answer to everything, at once."""
    from qwen3_moe_jax.serve.text_model import TextModel

    tokenizer: Tokenizer = TextModel(start.model).tokenizer
    says = tuple(tokenizer.encode(ANSWER))
    return FakeEngine(start, slots=8, capacity=262_144, says=says, chunk=1 << 20)


def run_agent(command: list[str], variables: dict[str, str], url: str) -> dict[str, Any]:
    if not Path(command[0]).exists():
        return {"ok": False, "why": "not installed"}
    began = time.monotonic()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        (Path(home) / "opencode.json").write_text(json.dumps(opencode_settings(url)))
        environment = {"HOME": home, "PATH": os.environ["PATH"], "NO_COLOR": "1", "CI": "1", **variables}
        try:
            done = subprocess.run(
                command, cwd=home, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=400
            )
        except subprocess.TimeoutExpired:
            return {"ok": False, "why": "it does not end"}
    shown = (done.stdout + done.stderr).decode(errors="replace")
    is_ok = done.returncode == 0 and ANSWER in shown
    why = {} if is_ok else {"why": shown[-600:]}
    return {"ok": is_ok, "exit": done.returncode, "seconds": round(time.monotonic() - began, 1), **why}


# -- suites


def lm_eval(args: argparse.Namespace) -> dict[str, Any]:
    """Log-likelihoods by lm-eval's own client against those of the model."""
    from qwen3_moe_jax.api import load

    pairs = [("The cat sat on the", " mat"), ("def add(a, b):\n    return", " a + b"), ("1 2 3", " 4")]
    code = LM_EVAL.replace("PAIRS", repr(pairs))
    with running(Settings(port=0), quick_start(embedded_model(), slots=2, context=512)) as server:
        done = subprocess.run(
            [args.python, "-c", code, server.url], capture_output=True, text=True, timeout=900
        )
    if done.returncode:
        return {"ok": False, "why": done.stderr[-600:]}
    sums = json.loads(done.stdout.splitlines()[-1])
    with load(None, backend="jax", gate=False) as model:
        encode = model.tokenizer.encode
        wanted = [
            float(
                model.runner.log_likelihoods(encode(a + b), first=len(encode(a + b)) - len(encode(b))).sum()
            )
            for a, b in pairs
        ]
    worst = max(abs(a - b) for a, b in zip(sums, wanted, strict=True))
    return {"ok": worst <= 1e-4, "worst": worst, "pairs": len(pairs)}


LM_EVAL = """
import json, sys
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI
url = sys.argv[1]
model = LocalCompletionsAPI(base_url=url + "/v1/completions", model="m", tokenizer_backend="remote",
                            tokenized_requests=True, max_length=500)
requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(PAIRS)]
print(json.dumps([x[0] for x in model.loglikelihood(requests, disable_tqdm=True)]))
"""


def schemathesis(args: argparse.Namespace) -> dict[str, Any]:
    """A fuzzer that knows our openapi.json."""
    with scripted_file() as path:
        start = quick_start(path)
        engine = FakeEngine(start, slots=8, capacity=4096)
        with running(Settings(port=0, metrics=True), start, engine=engine) as server:
            command = [str(Path(args.python).parent / "schemathesis"), "run", f"{server.url}/openapi.json"]
            command += ["--checks", "not_a_server_error", "--max-examples", "30", "--phases", "fuzzing"]
            command += ["--seed", "1", "--no-color"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=1200, cwd=path.parent)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    print("\n".join(lines), file=sys.stderr)
    summary = lines[-8:]
    return {"ok": done.returncode == 0, "exit": done.returncode, "summary": summary}


def schemas(args: argparse.Namespace) -> dict[str, Any]:
    """Random schemas at temperature 1 on a model of noise."""
    rng, counts = random.Random(0), {"stop": 0, "length": 0, "refused": 0}
    start = quick_start(embedded_model(), slots=8, context=512)
    with running(Settings(port=0), start) as server:
        for number in range(args.count):
            wanted = random_schema(rng)
            reply = httpx.post(
                f"{server.url}/v1/chat/completions", json=schema_body(wanted, number), timeout=600
            )
            if reply.status_code == 400:
                counts["refused"] += 1
                continue
            choice = reply.raise_for_status().json()["choices"][0]
            counts[choice["finish_reason"]] += 1
            if choice["finish_reason"] == "stop":
                jsonschema.validate(json.loads(choice["message"]["content"]), wanted)
    return {"ok": True, "schemas": args.count, **counts}


def schema_body(wanted: dict[str, Any], seed: int) -> dict[str, Any]:
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": wanted}}
    sampling = {"temperature": 1, "top_p": 1, "top_k": 0, "seed": seed, "max_tokens": 90}
    return {"messages": [{"role": "user", "content": "hi"}], "response_format": form, **sampling}


# -- the soak


def soak(args: argparse.Namespace) -> dict[str, Any]:
    """Memory of many requests; slots in the end. The clients are a process of their own.

    An engine on a CPU compiles programs beside the first requests, each of which stays, and fills its store
    of prefixes: ``--minutes`` begin when it is full and no program has come for two minutes. Flat means: less
    than 2 % more between the first and the last quarter (medians) of the time in which no program came, or
    the longest of such times.
    """
    context = multiprocessing.get_context("spawn")
    is_over, count, answers = context.Event(), context.Value("q", 0), context.Queue()
    with scripted_file() as path:
        start = quick_start(path, slots=4, context=1024, prefix_bytes=STORE_BYTES)
        with running(Settings(port=0, max_queue=8), start) as server:
            clients = context.Process(target=soak_clients, args=(server.url, is_over, count, answers))
            clients.start()
            warm = sampled(server, count, WARM_MINUTES, every=10, until=is_warm)
            samples = sampled(server, count, args.minutes, every=1.5 * args.minutes)
            is_over.set()
            counts = answers.get(timeout=600)
            clients.join()
            time.sleep(5)
            engine = server.service.engine
            leaked = engine.active + engine.counters.get("running", 0)
    same = [list(group) for _, group in itertools.groupby(samples, key=lambda s: s["programs"])]
    flat = max(same, key=len)[1:]  # a compiler's own memory goes with it
    drift = {name: growth([s[name] for s in flat]) for name in ("front", "engine")}
    found: dict[str, Any] = {name: [s[name] for s in samples] for name in ("programs", "requests")}
    found["megabytes"] = {n: [round(s[n] / 1e6, 1) for s in samples] for n in ("front", "engine", "store")}
    found |= {"warm_seconds": 10 * len(warm), "flat_samples": len(flat), "drift": drift}
    found |= {"answers": counts, "left": leaked}
    is_ok = not leaked and len(flat) > 8 and max(drift.values()) < 0.02
    return {"ok": is_ok and not any(" 5" in name for name in counts), "minutes": args.minutes, **found}


def growth(values: list[int]) -> float:
    """From the first quarter to the last, as a share."""
    quarter = max(1, len(values) // 4)
    return statistics.median(values[-quarter:]) / statistics.median(values[:quarter]) - 1


STORE_BYTES = 1 << 20
"""Of prefixes: some hundred requests of the scripted model fill it."""

WARM_MINUTES, STILL = 30, 12
"""What a soak waits for programs, and samples without a new one that end that."""


def is_warm(samples: list[dict[str, int]]) -> bool:
    """Whether the store is full and no program came lately."""
    late = samples[-STILL:]
    is_still = len(late) == STILL and late[0]["programs"] == late[-1]["programs"]
    return is_still and late[-1]["store"] > 0.9 * STORE_BYTES


def sampled(
    server: Running,
    count: Any,
    minutes: float,
    *,
    every: float,
    until: Callable[[list[dict[str, int]]], bool] = lambda samples: False,
) -> list[dict[str, int]]:
    """What a server holds, each so many seconds, for so long or until something holds of the samples."""
    samples: list[dict[str, int]] = []
    end = time.monotonic() + 60 * minutes
    while time.monotonic() < end and not (samples and until(samples)):
        time.sleep(every)
        counters = server.service.engine.counters
        known = {"programs": int(counters.get("programs", 0)), "requests": count.value}
        known["store"] = int(counters.get("prefix_store_bytes", 0))
        samples.append(memory_of(server) | known)
        print(json.dumps(samples[-1]), file=sys.stderr, flush=True)
    return samples


def memory_of(server: Running) -> dict[str, int]:
    """Resident bytes."""
    resident = lambda number: psutil.Process(number).memory_info().rss
    return {"front": resident(os.getpid()), "engine": resident(server.service.engine.process_id or 0)}


def soak_clients(url: str, is_over: Any, count: Any, answers: Any) -> None:
    """Six at a time until it is over; then how many answers there were of each kind and status."""
    counts: dict[str, int] = {}
    threads = [threading.Thread(target=soak_client, args=(url, n, is_over, count, counts)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    answers.put(counts)


def soak_client(url: str, number: int, is_over: Any, count: Any, counts: dict[str, int]) -> None:
    rng = random.Random(number)
    with httpx.Client(base_url=url, timeout=600) as client:
        while not is_over.is_set():
            kind = rng.choice(["chat", "stream", "gone", "wrong", "schema", "tokens"])
            status = soak_request(client, rng, kind)
            with count.get_lock():
                count.value += 1
                counts[f"{kind} {status}"] = counts.get(f"{kind} {status}", 0) + 1


def soak_request(client: httpx.Client, rng: random.Random, kind: str) -> int:
    name = rng.choice(["hello", "thinking", "two_calls", "longer", "forever"])
    body: dict[str, Any] = {"messages": [{"role": "user", "content": f"[[{name}]] {rng.random()}"}]}
    body["max_tokens"] = rng.randrange(1, 60)
    if kind == "wrong":
        return client.post("/v1/chat/completions", json={**body, "n": -1}).status_code
    if kind == "tokens":
        return client.post("/tokenize", json={"prompt": "some words"}).status_code
    if kind == "schema":
        body["response_format"] = {"type": "json_schema", "json_schema": {"schema": {"type": "integer"}}}
    if kind == "chat" or kind == "schema":
        return client.post("/v1/chat/completions", json=body).status_code
    with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as reply:
        for _ in reply.iter_bytes():
            if kind == "gone":
                break
        return reply.status_code


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "agents": agents,
    "lm-eval": lm_eval,
    "schemathesis": schemathesis,
    "schemas": schemas,
    "soak": soak,
}


def main() -> None:
    args = parse()
    parts = {name: {**PARTS[name](args), "load": os.getloadavg()[0]} for name in args.parts}
    before: dict[str, Any] = {}
    if args.receipt and args.receipt.exists():
        before = json.loads(args.receipt.read_text())["parts"]
    found = {
        "what": "python -m scripts.check_clients",
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "parts": before | parts,
    }
    if args.receipt:
        args.receipt.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))
    raise SystemExit(not all(part["ok"] for part in parts.values()))


if __name__ == "__main__":
    main()
