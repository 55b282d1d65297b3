"""The errors users meet, as one tree; `did_you_mean`, for names that do not exist; and `require`, for optional parts.

```
HfDistillError (ValueError)
├── SettingError       a setting has a value that is not allowed, or contradicts another one
├── DataError          a batch or a dataset lacks what the run needs
├── TeacherError       the teacher cannot be loaded, cannot teach this student, or its outputs are not finite
├── TrainingError      the student's loss or gradient is not finite
└── MissingExtraError  (also ImportError) an optional part is not installed
```
Every message says what was given, what is allowed and what to do.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any, TypeGuard


class HfDistillError(ValueError):
    """The base class of all errors that this library raises on purpose."""


class SettingError(HfDistillError):
    """A setting has a value that is not allowed, or contradicts another one."""


class DataError(HfDistillError):
    """A batch or a dataset lacks what the run needs."""


class TeacherError(HfDistillError):
    """The teacher cannot be loaded, cannot teach this student, or its outputs are not finite."""


class TrainingError(HfDistillError):
    """The loss or the gradient of an optimizer step is not finite, and neither teacher nor data are the cause."""


class MissingExtraError(HfDistillError, ImportError):
    """An optional part is not installed; the message names the extra."""


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional module; raise an error that names its extra if it is missing.

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
    """Return a sentence that proposes the closest known name, after a space; empty if none is close.

    Args:
        name: the unknown name; nothing is proposed if it is not a string.
        known: the names that exist.
        also: other names that people use, in lower case with underscores, and the known name for each.

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


def check_choice(setting: str, value: object, allowed: Iterable[str], also: Mapping[str, str] | None = None) -> None:
    """Raise SettingError if a setting's value is not one of the allowed names; `also` is as for `did_you_mean`."""
    if value not in (names := list(allowed)):
        hint = did_you_mean(value, names, also)
        raise SettingError(f"{setting}={value!r}: allowed are {', '.join(names)}.{hint}")


def is_whole(value: object) -> TypeGuard[int]:
    """Return whether a value is a whole number; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a value is a whole number or a float; True and False are not."""
    return is_whole(value) or isinstance(value, float)


def check_whole_number(setting: str, value: object, *, least: int = 1) -> None:
    """Raise SettingError unless a setting is a whole number of at least `least`."""
    if not is_whole(value) or value < least:
        raise SettingError(f"{setting}={value!r}: must be a whole number of at least {least}.")


def check_below_one(setting: str, value: object) -> None:
    """Raise SettingError unless a setting is a number in [0, 1)."""
    if not is_number(value) or not 0 <= value < 1:
        raise SettingError(f"{setting}={value!r}: must lie in [0, 1).")


def check_keywords(
    function: Callable[..., Any],
    given: Iterable[str],
    *,
    called: str,
    also: Mapping[str, str] | None = None,
    elsewhere: Mapping[str, str] | None = None,
) -> None:
    """Check the keywords of a call, so that the error for a misspelt one proposes the right one.

    Args:
        function: the function to call; one that takes any keyword is not checked.
        given: the keywords.
        called: the function's name, for the message.
        also: as for `did_you_mean`.
        elsewhere: keywords that belong elsewhere, each with a sentence that says where.

    Raises:
        TypeError: as Python raises it, with the closest keyword.
    """
    parameters = inspect.signature(function).parameters
    if any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        return
    for name in given:
        if name not in parameters:
            hint = f" {elsewhere[name]}" if elsewhere and name in elsewhere else did_you_mean(name, parameters, also)
            raise TypeError(f"{called}() got an unexpected keyword argument {name!r}.{hint}")
