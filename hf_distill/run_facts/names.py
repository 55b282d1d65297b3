"""Names that may be shown in public: a Hub id, and a text without local paths. Asks no Hub."""

from __future__ import annotations

import os
import re

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

HIDDEN_PATH = "(local path)"
# Absolute, home and dot paths; not URLs ("https://a/b"), not names ("loss/labels", "org/model").
_PATH = re.compile(
    r"file://[^\s'\"`)|,;]+"
    r"|(?<![\w./])(?:(?:~[A-Za-z_]?\w*|\.\.?)/|/(?=[A-Za-z_.]))[^\s'\"`)|,;]*"
    r"|\b[A-Za-z]:\\[^\s'\"`)|,;]+"
)
_WHOLE_PATH = re.compile(r"/(?=[A-Za-z_.])|~[A-Za-z_/]|\.\.?[/\\]|[A-Za-z]:[/\\]|\\\\|file://")


def is_path(text: str) -> bool:
    """True for a text that is spelled as a path: absolute, from home, from a dot, or a drive."""
    return text in ("~", ".", "..") or _WHOLE_PATH.match(text) is not None


def has_hub_spelling(name: object) -> bool:
    """True for `name` or `org/name` with the letters that the Hub allows."""
    if not isinstance(name, str) or not name or name.startswith((".", "~")):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def looks_like_hub_id(name: object) -> bool:
    """True for a name in the Hub's spelling, when no file or folder here is so called.

    >>> looks_like_hub_id("google-bert/bert-base-uncased"), looks_like_hub_id("~/student")
    (True, False)
    """
    return has_hub_spelling(name) and not os.path.exists(str(name))


def without_paths(text: str) -> str:
    """The text with each local path in it replaced.

    >>> without_paths("loss/labels from /home/me/run"), without_paths("see https://hf.co/a/b")
    ('loss/labels from (local path)', 'see https://hf.co/a/b')
    """
    if is_path(text):
        return HIDDEN_PATH
    return _PATH.sub(HIDDEN_PATH, text)
