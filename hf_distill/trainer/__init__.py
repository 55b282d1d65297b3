"""What the trainer is made of, one idea a file; the public class stands in `hf_distill.trainer.mixin`."""

from collections.abc import Callable
from typing import Any

card_renderer: Callable[[Any, str], Any]  # writes a model card into a folder; `hf_distill/__init__.py` sets it
