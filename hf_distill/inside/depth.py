"""Rewriting a config for another number of layers: the count, and what it says of each layer. It builds nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from hf_distill.errors import TeacherError

# What configs call the number of blocks. For a stack that the user names, every whole number is tried.
DEPTH_NAMES = (
    "num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth", "num_blocks",
    "encoder_layers", "num_encoder_layers", "encoder_num_hidden_layers",
    "decoder_layers", "num_decoder_layers", "decoder_num_hidden_layers",
)  # fmt: skip


@dataclass(frozen=True)
class DepthSetting:
    """A number in a config: `holder` are the names of the configs inside configs that lead to it."""

    holder: tuple[str, ...]
    name: str

    def __str__(self) -> str:
        return ".".join(("config", *self.holder, self.name))

    def of(self, config: PreTrainedConfig) -> Any:
        """The config that holds the setting."""
        for name in self.holder:
            config = getattr(config, name)
        return config

    def value(self, config: PreTrainedConfig) -> int:
        """What it is now."""
        return int(getattr(self.of(config), self.name))


def usual_depths(config: PreTrainedConfig) -> list[DepthSetting]:
    """The settings with a usual name, each once: an alias is left out."""
    return [setting for setting in _whole_numbers(config) if setting.name in DEPTH_NAMES]


def any_depths(config: PreTrainedConfig, length: int) -> list[DepthSetting]:
    """Every whole number that equals `length`, those with a usual name first."""
    found = [setting for setting in _whole_numbers(config) if setting.value(config) == length]
    return sorted(found, key=lambda setting: setting.name not in DEPTH_NAMES)


def _whole_numbers(config: PreTrainedConfig, holder: tuple[str, ...] = ()) -> Iterator[DepthSetting]:
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from _whole_numbers(value, (*holder, name))
        elif isinstance(value, int) and not isinstance(value, bool) and value > 0 and not name.startswith("_"):
            yield DepthSetting(holder, name)


def with_layers(config: PreTrainedConfig, setting: DepthSetting, chosen: Sequence[int]) -> PreTrainedConfig:
    """A copy of `config` for the layers `chosen` (which may repeat), with its lists of one entry a layer to match."""
    new = copy.deepcopy(config)
    holder = setting.of(new)
    old = setting.value(config)
    for name, values in _per_layer_lists(holder, setting, old):
        setattr(holder, name, [values[i] for i in chosen])
    setattr(holder, setting.name, len(chosen))
    _recut_stages(holder, old, chosen)
    return new


def _per_layer_lists(config: Any, setting: DepthSetting, layers: int) -> list[tuple[str, list[Any]]]:
    return [
        (name, list(value))
        for name, value in vars(config).items()
        if isinstance(value, (list, tuple)) and len(value) == layers and _speaks_of_layers(name, setting)
    ]


def _speaks_of_layers(name: str, setting: DepthSetting) -> bool:
    if name == "attention_window":  # Longformer; LED's is of the encoder
        return "decoder" not in setting.name
    other = {"encoder": "decoder", "decoder": "encoder"}
    return "layer" in name and not any(side in setting.name and other[side] in name for side in other)


def _recut_stages(config: Any, layers: int, chosen: Sequence[int]) -> None:
    """A vision backbone's config names what comes in and what each layer puts out, and which of them are handed out.

    Those of layers that are left behind are handed out no more; when none is left, the last layer's is.
    """
    names = vars(config).get("stage_names")
    if (
        not isinstance(names, list)
        or len(names) != layers + 1
        or not hasattr(config, "set_output_features_output_indices")
    ):
        return
    out = {index % len(names) for index in config.out_indices}
    sources = [0, *(layer + 1 for layer in chosen)]
    config.stage_names = [names[0], *(f"stage{number}" for number in range(1, len(sources)))]
    kept = [index for index, source in enumerate(sources) if source in out] or [len(chosen)]
    config.set_output_features_output_indices(out_features=None, out_indices=kept)


def check_it_can_be_read_back(config: PreTrainedConfig) -> None:
    """Raise TeacherError where a config says something else after it was written and read."""
    written = config.to_dict()
    try:
        read = type(config).from_dict(copy.deepcopy(written)).to_dict()
    except (ValueError, TypeError, KeyError, IndexError, StrictDataclassError) as error:
        raise TeacherError(
            f"inherit: {type(config).__name__} for the student cannot be read back from what it writes: "
            f"{' '.join(str(error).split())}. "
            "Its layers are described by a setting that cannot be cut to the student's layers."
        ) from error
    changed = sorted(name for name in written if read.get(name) != written[name])
    if changed:
        raise TeacherError(
            f"inherit: {type(config).__name__} for the student reads back with other values in {', '.join(changed)}. "
            "Its layers are described by a setting that cannot be cut to the student's layers."
        )
