"""``qwen3-moe doctor``: what this machine can run, and the one thing to do about each problem."""

import argparse
import dataclasses

from qwen3_moe_jax import loader
from qwen3_moe_jax.commands.common import add_context, add_mesh, add_model
from qwen3_moe_jax.convert.errors import ModelFileError, printable
from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.convert.source import ModelSource
from qwen3_moe_jax.convert.tokenizer_metadata import check_tokenizer
from qwen3_moe_jax.core import terminal
from qwen3_moe_jax.core.errors import MemoryPlanError, OptionError
from qwen3_moe_jax.core.exit_codes import ExitCode
from qwen3_moe_jax.machine import probe as machine
from qwen3_moe_jax.machine.estimate import MAX_TOKENS, SHARES, Place, place_on
from qwen3_moe_jax.machine.jax_devices import all_devices, jax_devices
from qwen3_moe_jax.machine.kernels import AUTO, capability_of, choose_kernels, installed_jax
from qwen3_moe_jax.machine.memory import MemoryPlan
from qwen3_moe_jax.machine.probe import Diagnosis, Machine
from qwen3_moe_jax.wgpu_backend.adapter import list_adapters

MARKS = {"ok": "ok     ", "note": "note   ", "problem": "PROBLEM"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_context(parser, "tokens to plan memory for", loader.DEFAULT_CONTEXT)
    add_mesh(parser)
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(args: argparse.Namespace) -> int:
    if args.mesh is not None:
        loader.check_mesh(args.mesh, "jax")
    facts = machine.detect(list_adapters())
    findings = machine.diagnose(facts)
    findings += judge_model(args.model, args.context, facts)
    findings += judge_mesh(args.model, args.context, args.mesh)
    findings += judge_decoding(args.model)
    findings += expect_speed(args.model, facts)
    choice = loader.choose_backend(mesh=args.mesh)
    findings.append(Diagnosis("ok", "backend", f"auto is {choice.backend}: {choice.reason}"))
    if args.json:
        terminal.show_json([dataclasses.asdict(f) for f in findings], indent=2)
    else:
        for finding in findings:
            terminal.show(f"{MARKS[finding.level]}  {finding.subject}: {finding.text}")
            if finding.advice:
                terminal.show(f"         -> {finding.advice}")
    return ExitCode.FAULT if any(f.level == "problem" for f in findings) else ExitCode.DONE


def judge_model(path, context: int, facts: Machine) -> list[Diagnosis]:
    """The file's header, tensors and memory need; reads no weights."""
    path = loader.embedded_model() if path is None else path
    try:
        with open_model(loader.model_path(path)) as source:
            check_tokenizer(source.metadata, source.config.vocab_size)
            kinds = ", ".join(sorted({t.name for t in source.types.values()}))
            what = f"{path}: {len(source.types)} tensors ({kinds}), {source.nbytes / 1e9:.2f} GB"
            plan = MemoryPlan.of(source, min(context, source.config.max_position_embeddings), itemsize=4)
            return [Diagnosis("ok", "model", what), machine.judge_memory(facts, plan)]
    except ModelFileError as error:
        return [Diagnosis("problem", "model", f"{printable(str(path), 120)}: {error}", error.advice)]


def judge_mesh(path: str | None, context: int, mesh: str | None) -> list[Diagnosis]:
    """Whether the model can be split so, bytes per device and collectives per step; reads no weights."""
    if mesh is None:
        return []
    from qwen3_moe_jax.jax_backend.placement import Placement
    from qwen3_moe_jax.jax_backend.sharding import named_mesh

    try:
        with open_model(loader.model_path(path)) as source:
            place = Placement.of(source, named_mesh(mesh), all_devices())
            length = min(context, source.config.max_position_embeddings)
            what = place.describe(source) or "one device: nothing is split"
            place.plan(source, length, itemsize=2 if place.is_gpu else 4)
            return [Diagnosis("ok", "mesh", what)]
    except ModelFileError:
        return []  # ``judge_model`` has told it
    except (OptionError, MemoryPlanError) as error:
        return [Diagnosis("problem", "mesh", str(error))]


def judge_decoding(path: str | None) -> list[Diagnosis]:
    """In which ways the jax backend writes a token of this model on its GPU; reads no weights."""
    if not loader.jax_sees_gpu():
        return []
    from qwen3_moe_jax.jax_backend.decode_path import plan_decoding

    try:
        with open_model(loader.model_path(path)) as source:
            device = jax_devices()[0]
            kernels = choose_kernels(AUTO, capability_of(device), installed_jax()).name
            decoder = plan_decoding(source.config, dict(source.types), device, kernels)
    except ModelFileError:
        return []  # ``judge_model`` has told it
    ways = "; ".join(f"{name}: {what}" for name, what in decoder.describe().items())
    return [Diagnosis("ok" if decoder.is_batch_invariant else "note", "decoding", ways)]


def expect_speed(path: str | None, facts: Machine) -> list[Diagnosis]:
    """How fast one sequence of this model is written on each NVIDIA card: an estimate; reads no weights."""
    cards = [] if facts.hidden_cards else facts.nvidia_gpus
    if not cards:
        return []
    try:
        with open_model(loader.model_path(path)) as source:
            return [_expected(source, place_on(card)) for card in cards]
    except ModelFileError:
        return []


def _expected(source: ModelSource, place: Place) -> Diagnosis:
    rate, name = place.rate(source, 0), place.memory.where
    if rate is None or place.bandwidth is None:
        why = f"no memory speed is known for {name}" if place.bandwidth is None else "xla has no receipt"
        return Diagnosis("note", "speed", f"{name}: no estimate ({why})", "run `qwen3-moe bench`")
    how = f"{SHARES[place.way]:.2f} of {place.bandwidth / 1e12:.2f} TB/s"
    text = f"{name}, {place.kernels} kernels: about {rate:,.0f} tokens/s, an estimate: {how}"
    limit = ", and at most what launches allow" if rate >= MAX_TOKENS else ""
    return Diagnosis("ok", "speed", f"{text}, the share that an H100 reached{limit}; `bench` measures it")
