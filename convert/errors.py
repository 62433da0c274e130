"""The one exception for every fault of a model file.

A file is refused with a code that programs can test, one line that a person
can act on, and where known the name (tensor, metadata key, file) and the byte
offset of the fault. Text that comes from the file is escaped, so a hostile
name can neither break the line nor send control codes to a terminal.

==============  ============================================================
code            meaning
==============  ============================================================
E_OPEN          not there, not readable, or not a regular file
E_MAGIC         not a GGUF file (or a big-endian one)
E_VERSION       a GGUF version that is not 2 or 3
E_SHORT_READ    the file ends before what it declares (partial download)
E_CHANGED       the file changed while it was being read
E_METADATA      a malformed metadata entry
E_TENSOR        a tensor that is malformed, missing, extra or misshapen
E_QTYPE         a tensor type that is unknown or not supported
E_SPLIT         shards of a split file that do not fit together
E_ARCH          not the architecture that this project runs
E_HPARAM        a hyper-parameter that is missing or out of range
E_TOKENIZER     a malformed vocabulary
E_NONFINITE     a NaN or infinite weight or scale
E_CHECKPOINT    a packed checkpoint that is damaged or not ours
==============  ============================================================
"""

_LONGEST_LINE = 1000

_ADVICE = {
    "E_OPEN": "check the path and its permissions",
    "E_MAGIC": "give a GGUF file of the model",
    "E_CHANGED": "wait until the file is written, then try again",
    "E_QTYPE": "take the Q4_K_M, Q5_K_M, Q6_K or Q8_0 file of this model",
    "E_ARCH": "take a file of a Qwen3-MoE model",
    "E_HPARAM": "take another file of this model, or convert it again",
    "E_TOKENIZER": "take another file of this model, or convert it again",
    "E_SPLIT": "put all shards of one model into one folder",
    "E_CHECKPOINT": "convert the model again",
}


def printable(text: str, limit: int = _LONGEST_LINE) -> str:
    """``text`` on one line: control characters escaped, cut in its middle to ``limit`` of them."""
    if len(text) > limit:
        tail = limit // 3  # advice stands at the end of a message
        return f"{printable(text[: limit - tail])}...{printable(text[-tail:])}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def quote(text: str) -> str:
    """``text`` from a file, short, escaped and in quotes, for use in a message."""
    return f"'{printable(text, 80)}'"


class ModelFileError(ValueError):
    """A model file cannot be used.

    Attributes:
      code: one of the codes of this module's table.
      name: the tensor, metadata key or file at fault, or None.
      offset: where in the file the fault lies, in bytes, or None.
    """

    def __init__(self, code: str, message: str, *, name: str | None = None, offset: int | None = None):
        self.code = code
        self.message = printable(message)
        self.name = name
        self.offset = offset
        where = "" if offset is None else f" (at byte {offset})"
        super().__init__(f"{code}: {self.message}{where}")

    @property
    def advice(self) -> str:
        """What to do, in a few words."""
        return _ADVICE.get(self.code, "download the file again")

    def __reduce__(self):
        return _rebuild, (self.code, self.message, self.name, self.offset)


def _rebuild(code: str, message: str, name: str | None, offset: int | None) -> ModelFileError:
    return ModelFileError(code, message, name=name, offset=offset)
