"""The tables of ``docs/reference/scaling.md``, from ``docs/receipts/scaling_model.json``."""

from collections.abc import Iterator

from scripts._receipts import receipt, table, whole

WORK = {"decode 1": "decode, 1 sequence", "decode 64": "decode, 64 sequences", "prompt": "prompt of 2,048"}
USER, MESH = "decode_user_h100: 1 and 8 sequences", "mesh_h200: 64 sequences on one GPU, 1 on two"
PROMPTS = "prefill_h100: 512 and 2,048"
CONSTANTS = {
    "phase": ("us per layer of the decode kernel, beside its bytes", 1e6, USER),
    "kernel_rate": ("TB/s of weights and cache in the decode kernel", 1e-12, USER),
    "sampling": ("ms per step outside of the kernel", 1e3, "mesh_h200: 1 sequence on one H200"),
    "launches": ("us per layer, layer by layer, beside its bytes", 1e6, MESH),
    "layer_rate": ("TB/s layer by layer", 1e-12, MESH),
    "prompt_layer": ("us per layer of a chunk of a prompt, beside its products", 1e6, PROMPTS),
    "product_rate": ("10^12 operations/s of prompts", 1e-12, PROMPTS),
}


def _cells(link: str) -> list[dict]:
    return [cell for cell in receipt("scaling_model")["cells"] if cell["link"] == link]


def _machines(cells: list[dict]) -> list[tuple[int, int]]:
    return list(dict.fromkeys((cell["hosts"], cell["gpus"]) for cell in cells))


def _name(hosts: int, gpus: int) -> str:
    return f"{gpus} GPU{'s' * (gpus > 1)}" if hosts == 1 else f"{hosts} x {gpus}"


def _rates(link: str, hosts: tuple[int, ...]) -> str:
    """A row per work and model, a column per machine."""
    cells = [cell for cell in _cells(link) if cell["hosts"] in hosts]
    machines = _machines(cells)
    head = f"tokens/s, a model | | {' | '.join(_name(*machine) for machine in machines)}"
    by = {(cell["model"], cell["hosts"], cell["gpus"]): cell for cell in cells}
    models = list(dict.fromkeys(cell["model"] for cell in cells))

    def rows() -> Iterator[tuple]:
        for work, what in WORK.items():
            for model in models:
                own = [by[model, *machine] for machine in machines]
                yield (what, model, *(_cell(cell, work) for cell in own))

    return table(head, rows())


def _cell(cell: dict, work: str) -> str:
    if work not in cell:
        return "does not fit" if cell["planned"] else "cannot be split"
    shape = "" if cell[f"{work} by"] == "tp=1,ep=1" else f" ({cell[f'{work} by']})"
    return f"{whole(cell[work])}{shape}"


def one_host() -> str:
    """Up to eight GPUs of one host, with NVLink."""
    return _rates("NVLink 4", (1,))


def four_hosts() -> str:
    """Four hosts with as many GPUs each, InfiniBand between them."""
    return _rates("NVLink 4", (4,))


def without_nvlink() -> str:
    """Up to eight GPUs of one host, with PCI Express alone."""
    return _rates("PCIe 5", (1,))


def memory() -> str:
    """GB that the memory plan wants of each device."""
    cells = _cells("NVLink 4")
    machines = [machine for machine in _machines(cells) if machine[0] == 1 or machine[1] == 8]
    nbytes = {(cell["model"], cell["hosts"], cell["gpus"]): cell["planned"] for cell in cells}
    by = {key: f"{planned / 1e9:.1f}" if planned else "cannot be split" for key, planned in nbytes.items()}
    models = list(dict.fromkeys(cell["model"] for cell in cells))
    head = f"GB per GPU | {' | '.join(_name(*machine) for machine in machines)}"
    return table(head, ((model, *(by[model, *machine] for machine in machines)) for model in models))


def errors() -> str:
    """What two GPUs were measured to do, and what the model says."""
    rows = []
    for row in receipt("scaling_model")["checks"]:
        error = "a constant is from it" if row["is_used"] else f"{100 * row['error']:+.0f} %"
        rows.append((row["what"], f"{row['measured_ms']:.2f}", f"{row['model_ms']:.2f}", error))
    return table("two H200 | measured, ms | model, ms | error", rows)


def constants() -> str:
    """The model's constants, and where each was measured."""
    found = receipt("scaling_model")["constants"]
    rows = []
    for name, (what, factor, origin) in CONSTANTS.items():
        rows.append((f"`{name}`", f"{found[name] * factor:.3g}", what, origin))
    return table("constant | value | what | from", rows)
