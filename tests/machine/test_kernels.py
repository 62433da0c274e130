"""Which kernels a device gets: the choice, what is refused, and what the doctor expects of them."""

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

import qwen3_moe_jax as q3
from qwen3_moe_jax import loader
from qwen3_moe_jax.cli import COMMANDS, main
from qwen3_moe_jax.commands import doctor
from qwen3_moe_jax.convert.config import PRESETS
from qwen3_moe_jax.core.errors import BackendUnavailableError
from qwen3_moe_jax.kernels_pallas import implementations
from qwen3_moe_jax.machine import estimate
from qwen3_moe_jax.machine.datasheets import peak_bandwidth
from qwen3_moe_jax.machine.kernels import KERNELS, choose_kernels, is_before_ampere, reason_against
from qwen3_moe_jax.machine.limits import step_nbytes
from qwen3_moe_jax.machine.nvidia import NvidiaGpu
from qwen3_moe_jax.machine.probe import Machine
from scripts.bench_mixes import Mixture

RECEIPTS = Path(__file__).parents[2] / "docs" / "receipts"
NEW, OLD = (0, 11, 2), (0, 10, 2)


@pytest.mark.parametrize(
    ("capability", "version", "name", "reason"),
    [
        ("9.0", NEW, "hopper", "9.0"),
        ("8.0", NEW, "portable", "8.0"),
        ("8.9", NEW, "portable", "8.9"),
        ("12.0", NEW, "portable", "12.0"),
        ("7.5", NEW, "xla", "8.0 (Ampere) or later, and this is 7.5"),
        ("9.0", OLD, "xla", "JAX 0.11"),
        ("", NEW, "xla", "NVIDIA GPU"),
        ("gfx942", NEW, "xla", "NVIDIA GPU"),
    ],
)
def test_auto_is_the_fastest_that_the_device_has(capability, version, name, reason):
    chosen = choose_kernels("auto", capability, version)
    assert chosen.name == name
    assert reason in chosen.reason


def test_what_a_device_does_not_run_is_refused_with_the_reason():
    with pytest.raises(BackendUnavailableError, match=r"hopper do not .* 9.0 \(Hopper\), and this is 8.9"):
        choose_kernels("hopper", "8.9", NEW)
    assert choose_kernels("portable", "9.0", NEW) == ("portable", "as asked")
    assert choose_kernels("xla", "9.0", OLD).name == "xla"
    assert all(reason_against(name, "9.0", NEW) is None for name in KERNELS)


def test_only_cards_before_ampere_are():
    names = ("7.0", "7.5", "8.0", "9.0", "12.0", "", "unknown")
    assert [name for name in names if is_before_ampere(name)] == ["7.0", "7.5"]


def test_a_card_before_ampere_runs_through_webgpu_where_that_is_hardware(monkeypatch):
    card = SimpleNamespace(platform="gpu", compute_capability="7.5", device_kind="Tesla T4")
    monkeypatch.setattr(loader, "nvidia_gpus", lambda: ("a card",))
    monkeypatch.setattr(loader, "cards_are_hidden_by", lambda: "")
    monkeypatch.setattr(loader, "jax_devices", lambda: [card])
    adapters = [SimpleNamespace(software=False, summary="Tesla T4 via Vulkan")]
    monkeypatch.setattr(loader, "list_adapters", lambda: adapters)
    choice = loader.choose_backend()
    assert choice.backend == "wgpu"
    assert "7.5" in choice.reason
    assert loader.choose_backend("xla") == ("jax", "kernels xla are asked for", ())
    adapters[0].software = True
    assert loader.choose_backend().backend == "jax"
    assert "no WebGPU hardware" in loader.choose_backend().reason
    card.compute_capability, adapters[0].software = "8.6", False
    assert loader.choose_backend().backend == "jax"


def test_a_path_that_this_machine_does_not_run_ends_a_command_with_one_line(capsys):
    for name in ("hopper", "portable"):
        assert main(["generate", "x", "-n", "1", "--backend", "jax", "--kernels", name, "--no-gate"]) == 1
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith(
            f"qwen3-moe: kernels {name} do not run on this device: they need an NVIDIA GPU"
        )


def test_other_backends_have_no_such_choice():
    with pytest.raises(BackendUnavailableError, match="kernels of its own"):
        q3.load(backend="reference", kernels="xla")
    with pytest.raises(ValueError, match="'triton' is not one of auto, hopper"):
        q3.load(backend="jax", kernels="triton")


def test_xla_is_taken_and_told():
    with q3.load(backend="jax", kernels="xla", max_context=32, gate=False) as model:
        facts = model.runner.describe()
        assert (facts["kernels"], facts["kernels_reason"]) == ("xla", "as asked")
        assert not facts["refused"], "nothing else was asked"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_loads_a_model_takes_kernels(command, capsys):
    main([command, "--help"])
    shown = capsys.readouterr().out
    assert ("--kernels" in shown) == ("--backend" in shown or command in ("bisect", "warm"))


def test_the_choice_leaves_its_own_implementation_and_xla():
    def refuse(x):
        raise NotImplementedError("no")

    run = lambda **found: implementations.run("op", None, found, 1)
    took = {"hopper": lambda x: "hopper", "portable": lambda x: "portable", "xla": lambda x: "xla"}
    assert run(**took) == "hopper"
    for name in took:
        with implementations.using(name):
            assert run(**took) == name
            assert run(**took | {name: refuse, "xla": took["xla"]}) == "xla"
    assert run(**took) == "hopper"


def test_networks_of_other_kernels_are_other_programs_and_ask_theirs(jax_runner):
    model, record = jax_runner.decoder.model, implementations.Record()
    hidden = jax.ShapeDtypeStruct((1, 1, model.config.hidden_size), jnp.float32)
    for kernels in ("hopper", "xla"):
        other = model.clone(kernels=kernels)
        assert other != model.clone(kernels="portable")
        with implementations.recording(record):
            jax.eval_shape(lambda p, h, m=other: m.bind(p).logits(h), jax_runner.params, hidden)
    asked, not_asked = record
    assert asked.refused[0].startswith("hopper: ")
    assert not not_asked.refused


def test_the_shares_are_those_of_the_receipts():
    model = Mixture.of("q4_k_m", PRESETS["Qwen3-30B-A3B"])
    share = lambda rate: rate * step_nbytes(model, 2, 1, 0) / peak_bandwidth("NVIDIA H100 80GB HBM3")
    (user,) = [row for row in _receipt("decode_user_h100")["figures"]["rows"] if row["row"] == "1:0"]
    cases = _receipt("decode_portable_full_h100")["runs"][-1]["cases"]
    (alone,) = [case for case in cases if case["work"] == "speed" and case["case"] == "1:0"]
    assert estimate.SHARES["jax hopper"] == pytest.approx(share(user["tok_s"]), abs=0.005)
    assert 0 < share(alone["tok_s"]) - estimate.SHARES["jax portable"] < 0.01, "sampling is 1 %"
    assert alone["tok_s"] < user["tok_s"], "auto takes Hopper's kernels on Hopper"


def _receipt(name):
    return json.loads((RECEIPTS / f"{name}.json").read_text())


CARDS = {
    "NVIDIA GeForce RTX 4090": ("8.9", "portable kernels: about 1"),
    "NVIDIA H100 80GB HBM3": ("9.0", "hopper kernels: about "),
    "NVIDIA GeForce RTX 2080": ("7.5", "no memory speed is known"),
    "NVIDIA A100-SXM4-80GB": ("8.0", "0.36 of 2.04 TB/s"),
}


@pytest.mark.parametrize("name", CARDS)
def test_the_doctor_expects_a_speed_and_says_that_it_is_an_estimate(name):
    capability, text = CARDS[name]
    card = NvidiaGpu(name, "580.1", capability, 24 << 30, 24 << 30)
    (found,) = doctor.expect_speed(None, Machine((3, 12), nvidia_gpus=(card,)))
    assert text in found.text
    assert "an estimate" in found.text or "no estimate" in found.text
    assert doctor.expect_speed(None, Machine((3, 12))) == []


def test_an_adapter_is_wgpus(source):
    assert loader.choose_backend(adapter="T4") == ("wgpu", "a WebGPU adapter is asked for: T4", ())
    for backend in ("reference", "jax"):
        with pytest.raises(BackendUnavailableError, match=f"the {backend} backend .* leave out adapter"):
            loader.make_runner(source, backend, adapter="T4")
