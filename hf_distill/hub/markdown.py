"""Text of unknown origin made safe for Markdown, and numbers made readable. Knows no card."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

# An underscore inside a word means nothing in Markdown.
_SPECIAL = re.compile(r"([\\`*{}\[\]<>|~$]|(?<!\w)_|_(?!\w))")
_LINE_START = re.compile(r"^(\d*)([#+\-=.)])(?=\s|$)")


def escape(text: object) -> str:
    r"""The text as it is to be read, on one line, wherever it stands in Markdown or a table.

    >>> print(escape("a|b\n<c> *d*"))
    a\|b \<c\> \*d\*
    """
    one_line = " ".join(str(text).split())
    escaped = _SPECIAL.sub(r"\\\1", one_line)
    return _LINE_START.sub(r"\1\\\2", escaped)


def plain(text: object) -> str:
    """The text on one line without backticks: for a code span or a code block."""
    return " ".join(str(text).replace("`", "'").split())


def code(text: object) -> str:
    """A code span that is safe in a table: `text`."""
    return "`" + plain(text).replace("|", "\\|") + "`"


def number(value: object) -> str:
    """A number to read: 12,345; 0.9131; 5e-05.

    >>> number(12345), number(0.91314), number(5e-5), number(2.0)
    ('12,345', '0.9131', '5e-05', '2')
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return escape(value)
    if isinstance(value, int) or (value.is_integer() and abs(value) >= 1000):
        return f"{int(value):,}"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.1f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the cells are taken as they are, so escape them first."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
