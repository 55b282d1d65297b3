"""The errors users meet, as one tree; `did_you_mean`, for names that do not exist; and `require`, for optional parts.

```
HfDistillError (ValueError)
├── SettingError       a knob has a value that it cannot have, or two knobs contradict each other
├── DataError          a batch or a dataset lacks what the run needs
├── TeacherError       the teacher cannot be loaded, cannot teach this student, or said something that is no number
├── TrainingError      the student's loss or gradient is not finite
└── MissingExtraError  (also ImportError) an optional part is not installed
```
Every message says what came, what is allowed and what to do next.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any


class HfDistillError(ValueError):
    """The root: catch it to catch everything this library raises on purpose."""


class SettingError(HfDistillError):
    """A setting has a value that it cannot have, or contradicts another one."""


class DataError(HfDistillError):
    """A batch or a dataset lacks what the run needs."""


class TeacherError(HfDistillError):
    """The teacher cannot be loaded, cannot teach this student, or gave logits that are no numbers."""


class TrainingError(HfDistillError):
    """The loss or the gradient of an optimizer step is not finite, and neither teacher nor data are the cause."""


class MissingExtraError(HfDistillError, ImportError):
    """An optional part is not installed; the message names the extra."""


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional module, or say which extra brings it.

    >>> require("json", extra="report").__name__
    'json'
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f'{module} is not installed. It is an optional part of hf-distill: pip install "hf-distill[{extra}]"'
        ) from error


def did_you_mean(name: Any, known: Iterable[str], also: Mapping[str, str] | None = None) -> str:
    """The sentence that proposes the nearest known name, after a space; empty where no name is near.

    Args:
        name: what came; nothing is proposed for what is no string.
        known: the names that exist.
        also: other names that people use, in lower case with underscores, and the known name that each stands for.

    >>> did_you_mean("forwrd_kl", ["forward_kl", "reverse_kl"])
    " Did you mean 'forward_kl'?"
    >>> did_you_mean("KL", ["forward_kl", "reverse_kl"], {"kl": "forward_kl"})
    " Did you mean 'forward_kl'?"
    """
    if not isinstance(name, str):
        return ""
    spelt = {one.lower(): one for one in known}
    plain = name.strip().lower().replace("-", "_").replace(" ", "_")
    if also is not None and plain in also:
        return f" Did you mean {also[plain]!r}?"
    near = difflib.get_close_matches(plain, spelt, 1)
    return f" Did you mean {spelt[near[0]]!r}?" if near else ""


def check_keywords(
    function: Callable[..., Any],
    given: Iterable[str],
    *,
    called: str,
    also: Mapping[str, str] | None = None,
    elsewhere: Mapping[str, str] | None = None,
) -> None:
    """Check the keywords of a call before it is made, so that a misspelt one is answered with the right one.

    Args:
        function: what will be called; one that takes any keyword is not checked.
        given: the keywords.
        called: its name, for the message.
        also: as for `did_you_mean`.
        elsewhere: keywords that belong to something else, each with a sentence on where it belongs.

    Raises:
        TypeError: as Python itself raises it, with the nearest keyword.
    """
    parameters = inspect.signature(function).parameters
    if any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        return
    for name in given:
        if name not in parameters:
            hint = f" {elsewhere[name]}" if elsewhere and name in elsewhere else did_you_mean(name, parameters, also)
            raise TypeError(f"{called}() got an unexpected keyword argument {name!r}.{hint}")
