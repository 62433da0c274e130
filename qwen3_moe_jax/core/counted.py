"""Numbers of things, in words."""


def counted(count: int, word: str) -> str:
    """ "1 token", "1,024 tokens"."""
    return f"{count:,} {word}" + "s" * (count != 1)
