"""What known papers train with: `preset.objectives` and `preset.arguments`, or stages for `train_in_stages`."""

from collections.abc import Callable

from hf_distill.presets.base import Preset, Stage
from hf_distill.presets.papers import distilbert, distilhubert, minilm, minilmv2, pkd, tinybert

PRESETS: dict[str, Callable[..., Preset]] = {
    "distilbert": distilbert,
    "tinybert": tinybert,
    "pkd": pkd,
    "minilm": minilm,
    "minilmv2": minilmv2,
    "distilhubert": distilhubert,
}

__all__ = ["PRESETS", "Preset", "Stage", "distilbert", "distilhubert", "minilm", "minilmv2", "pkd", "tinybert"]
