"""Foreign text in messages: one line, unprintable characters escaped, bounded length and cost."""

import reprlib
from typing import Any

MAX_LENGTH = 60  # characters of a value in a message


def shown(value: Any, most: int = MAX_LENGTH) -> str:
    """Text unchanged, anything else as its `repr`: on one line, at most `most` characters.

    Unprintable characters (line ends, escape codes, lone surrogates) are escaped. A value that is
    huge, deeply nested or that Python refuses to print costs no more than a small one.
    """
    if not isinstance(value, str):
        value = _short_repr(value, most)
    line = escaped(value[: most + 1])
    return line if len(line) <= most else f"{line[: most - 1]}…"


def escaped(text: str) -> str:
    """A text on one line, with unprintable characters escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def quoted(text: Any, most: int = MAX_LENGTH) -> str:
    """As `shown`, but text is quoted, for names within a sentence."""
    return f"'{shown(text, most)}'" if isinstance(text, str) else shown(text, most)


def listed(names: Any, most: int = 8) -> str:
    """Quoted foreign names: the first ones, and how many more there are."""
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(quoted(name) for name in names[:most]) + rest


def _short_repr(value: Any, most: int) -> str:
    writer = reprlib.Repr()
    writer.maxlevel = 3
    writer.maxlist = writer.maxtuple = writer.maxset = writer.maxfrozenset = writer.maxdict = 12
    writer.maxstring = writer.maxlong = writer.maxother = most
    try:
        return writer.repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return f"a {type(value).__name__} too long to print"
