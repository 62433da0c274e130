"""What a cluster is to serve: the options of ``qwen3-moe serve`` by their names, and how many engines."""

import dataclasses
import math
from pathlib import Path

import msgspec

from qwen3_moe_jax import loader
from qwen3_moe_jax.core.errors import OptionError
from qwen3_moe_jax.core.mesh import AUTO_MESH
from qwen3_moe_jax.hub import names
from qwen3_moe_jax.serve.engine.frames import Start
from qwen3_moe_jax.serve.engine.places import devices_of
from qwen3_moe_jax.serve.keys import read_keys
from qwen3_moe_jax.serve.settings import Settings

GPU_SLOTS = 32
"""Rows that an engine on a GPU opens unless asked for another number, memory allowing."""


class Options(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Options of the application, as text or as values.

    Attributes:
      model: a path that every host has, or a name on a hub; None is the embedded model.
      replicas: engines; with ``max_replicas``, how many there are always.
      max_replicas: engines while many requests wait; None keeps ``replicas``.
      fronts: processes that take requests; each takes a processor.
      gpus: of each engine; None: as many as ``mesh`` has devices, or none where the cluster has no GPU.
      cpus: processors of each engine.
      api_key_file: a path on the hosts of fronts; without it a host serves its own clients alone.
      allow_host, allow_origin: names and addresses, with commas between them.
      slots, context: of each engine; without a GPU both must be given.
      max_queue: requests that wait at each front.

    The others are those of ``qwen3-moe serve``.
    """

    model: str | None = None
    replicas: int = 1
    max_replicas: int | None = None
    fronts: int = 1
    gpus: float | None = None
    cpus: int = 4
    mesh: str | None = None
    backend: str = "auto"
    dtype: str | None = None
    kv_cache: str | None = None
    kernels: str = "auto"
    no_gate: bool = False
    slots: int | None = None
    context: int | None = None
    cache_ram: float = 0.0
    step_ms: float = 50.0
    no_warm_up: bool = False
    name: str | None = None
    api_key_file: str | None = None
    allow_host: str = ""
    allow_origin: str = ""
    no_page: bool = False
    strict_fields: bool = False
    strict_model: bool = False
    max_queue: int = 256
    max_queue_tokens: int = 1 << 20
    drain_timeout: float = 30.0

    @property
    def waves(self) -> int:
        """Requests that an engine has at a time: those in its slots, and as many that wait there."""
        return 2 * self.target

    @property
    def target(self) -> int:
        """Requests that keep an engine busy."""
        return self.slots or GPU_SLOTS

    @property
    def room(self) -> int:
        """Requests that all engines together have at a time, when there are as many as there may be."""
        return self.waves * (self.max_replicas or self.replicas)

    def start(self) -> Start:
        """What each engine loads; the model is looked for where it runs."""
        return Start(
            model=self.model,
            backend=self.backend,
            dtype=self.dtype,
            kv_cache=self.kv_cache,
            kernels=self.kernels,
            mesh=self.mesh,
            gate=not self.no_gate,
            context=self.context,
            slots=self.slots,
            prefix_bytes=int(self.cache_ram * 1e9),
            step_ms=self.step_ms,
            warm_up=not self.no_warm_up,
            max_queue=self.max_queue,
            max_queue_tokens=self.max_queue_tokens,
        )

    def settings(self) -> Settings:
        """Of engines, which ask for no key."""
        return Settings(
            name=self.name,
            page=not self.no_page,
            strict_fields=self.strict_fields,
            strict_model=self.strict_model,
            max_queue=self.max_queue,
            max_queue_tokens=self.max_queue_tokens,
            drain_seconds=self.drain_timeout,
            hosts=_listed(self.allow_host),
            origins=_listed(self.allow_origin),
        )

    def front_settings(self) -> Settings:
        """Of a front, with its host's keys.

        Raises:
          OptionError: the file of keys cannot be read, or has none.
        """
        keys = read_keys(self.api_key_file)
        host = "0.0.0.0" if keys else "127.0.0.1"  # with keys, any address of this host may be called
        return dataclasses.replace(self.settings(), api_keys=keys, host=host)


def _listed(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def options_of(given: dict[str, object], *, cluster_gpus: float) -> Options:
    """Checked options.

    Args:
      given: names to values, or to their texts.
      cluster_gpus: of all hosts together.

    Raises:
      OptionError: one is not known, or has a value that it cannot have.
    """
    try:
        options = msgspec.convert(given, Options, strict=False)
    except msgspec.ValidationError as error:
        raise OptionError(f"{error} (known: {', '.join(Options.__struct_fields__)})") from None
    _check_numbers(options)
    _check_choices(options)
    try:
        needed = devices_of(options.mesh)
    except ValueError as error:
        raise OptionError(str(error)) from None
    if options.gpus is None:
        options.gpus = float(needed if cluster_gpus else 0)
    if options.gpus and options.mesh and options.mesh != AUTO_MESH and options.gpus < needed:
        raise OptionError(f"gpus={options.gpus:g}: mesh={options.mesh} takes {needed} of each engine")
    if not options.gpus and (options.slots is None or options.context is None):
        raise OptionError(
            "without a GPU give slots and context: engines of one host would each count its memory as free"
        )
    return options


def _check_numbers(o: Options) -> None:
    limits = {"replicas": 1, "fronts": 1, "cpus": 1, "slots": 1, "context": 2, "max_queue": 1, "gpus": 0}
    limits |= {"cache_ram": 0, "step_ms": 1, "drain_timeout": 0, "max_queue_tokens": 0}
    limits["max_replicas"] = o.replicas
    for name, minimum in limits.items():
        value = getattr(o, name)
        if value is not None and not minimum <= value < math.inf:
            raise OptionError(f"{name}={value}: it must be {minimum} or more")


def _check_choices(o: Options) -> None:
    choices = {"backend": ("auto", *loader.BACKENDS), "dtype": loader.DTYPES, "kv_cache": loader.KV_CACHES}
    for name, known in choices.items():
        value = getattr(o, name)
        if value is not None and value not in known:
            raise OptionError(f"{name}={value}: it must be one of {', '.join(known)}")
    if o.backend == "wgpu":
        raise OptionError("backend=wgpu: it runs one engine on its own host: use qwen3-moe serve")
    if o.model is not None and names.parse(o.model) is None and not Path(o.model).is_absolute():
        raise OptionError(f"model={o.model}: give the whole path, which must be the same on every host")
