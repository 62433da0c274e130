"""A program and its arguments as plain JSON, for a process that compiles it (``program_worker``).

Arguments are shapes and settings: dataclasses and enums of this package, tuples, numbers and texts. Nothing
else can be written down, and nothing else is read: no class of another package is named or made.
"""

import dataclasses
import enum
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_OWN = __name__.partition(".")[0]


def encode(value: Any) -> Any:
    """Returns ``value`` as what JSON can hold; arrays as their shapes.

    Raises:
      TypeError: it is made of something that another process cannot make again.
    """
    match value:
        case enum.Enum():
            return {"enum": [_name_of(type(value)), value.name]}
        case None | bool() | int() | float() | str():
            return value
        case np.dtype():
            return {"dtype": value.name}
        case jax.Array() | jax.ShapeDtypeStruct() | np.ndarray() | np.generic():
            is_weak = bool(getattr(value, "weak_type", False))
            return {"array": [list(value.shape), jnp.dtype(value.dtype).name, is_weak]}
        case Mapping():
            return {"map": [[encode(k), encode(v)] for k, v in value.items()]}
        case tuple() if type(value) is tuple:
            return {"tuple": [encode(v) for v in value]}
        case list():
            return {"list": [encode(v) for v in value]}
        case frozenset():
            return {"set": [encode(v) for v in sorted(value)]}
        case _:
            return _encode_object(value)


def _encode_object(value: Any) -> dict[str, Any]:
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        raise TypeError(f"{type(value).__qualname__} cannot be sent to another process")
    fields = {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    return {"object": [_name_of(type(value)), fields]}


def _name_of(kind: type) -> str:
    if kind.__module__.partition(".")[0] != _OWN:
        raise TypeError(f"{kind.__qualname__} is not of this package: it cannot be sent to another process")
    return f"{kind.__module__}:{kind.__qualname__}"


def decode(value: Any) -> Any:
    """The reverse of :func:`encode`; arrays are ``jax.ShapeDtypeStruct``.

    Raises:
      ValueError: not what ``encode`` writes.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if not isinstance(value, dict) or len(value) != 1:
        raise ValueError(f"a request holds a foreign {type(value).__name__}")
    [(kind, content)] = value.items()
    if kind not in _READERS:
        raise ValueError(f"a request holds a foreign {kind}")
    try:
        return _READERS[kind](content)
    except (TypeError, KeyError, AttributeError, IndexError) as error:
        raise ValueError(f"a request holds a damaged {kind}: {error}") from error


def _array(content: Any) -> jax.ShapeDtypeStruct:
    shape, dtype, is_weak = content
    return jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype), weak_type=is_weak)


def _enum(content: Any) -> enum.Enum:
    name, member = content
    kind = named(name)
    if not (isinstance(kind, type) and issubclass(kind, enum.Enum)):
        raise ValueError(f"{name} is no enum")
    return kind[member]


def _object(content: Any) -> Any:
    name, fields = content
    kind = named(name)
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        raise ValueError(f"{name} is no dataclass")
    return kind(**{field: decode(value) for field, value in fields.items()})


_READERS: dict[str, Callable[[Any], Any]] = {
    "enum": _enum,
    "dtype": jnp.dtype,
    "array": _array,
    "map": lambda content: {decode(k): decode(v) for k, v in content},
    "tuple": lambda content: tuple(decode(v) for v in content),
    "list": lambda content: [decode(v) for v in content],
    "set": lambda content: frozenset(decode(v) for v in content),
    "object": _object,
}


def named(name: str) -> Any:
    """What ``module:qualname`` names.

    Raises:
      ValueError: it is not of this package, or not there.
    """
    module, _, qualname = name.partition(":")
    if module.partition(".")[0] != _OWN:
        raise ValueError(f"{name} is not of this package")
    try:
        found: Any = importlib.import_module(module)
        for part in qualname.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"there is no {name}") from error
    if not (getattr(found, "__module__", None) or "").startswith(_OWN):
        raise ValueError(f"{name} is not of this package")
    return found
