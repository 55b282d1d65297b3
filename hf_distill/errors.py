"""The errors users meet, as one tree; and `require`, for optional parts. It raises nothing by itself.

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

import importlib
from types import ModuleType


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
