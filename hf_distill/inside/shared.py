"""Models whose layers share their weights (ALBERT): fewer layers there means the same weights, used fewer times."""

from __future__ import annotations

from transformers import PreTrainedConfig, PreTrainedModel

from hf_distill.errors import TeacherError
from hf_distill.inside.depth import DepthSetting

NOTE = "The layers share their weights: the student is faster than the teacher, and has as many parameters."


def shares_layers(teacher: PreTrainedModel) -> bool:
    """True for ALBERT's way: `num_hidden_groups` sets of weights, used `num_hidden_layers` times in all."""
    return isinstance(getattr(teacher.config, "num_hidden_groups", None), int)


def depth_of(config: PreTrainedConfig) -> DepthSetting:
    """Where the number of layers stands."""
    return DepthSetting((), config.attribute_map.get("num_hidden_layers", "num_hidden_layers"))


def check_groups(config: PreTrainedConfig, kept: tuple[int, ...]) -> None:
    """Raise TeacherError where a kept layer would use another group's weights than it did in the teacher.

    Layer i of n uses group int(i / (n / groups)), so with several groups not every choice of layers can be written.
    """
    groups, layers = config.num_hidden_groups, depth_of(config).value(config)
    used = [int(layer / (layers / groups)) for layer in kept]
    would_use = [int(layer / (len(kept) / groups)) for layer in range(len(kept))]
    if used != would_use:
        raise TeacherError(
            f"inherit: the teacher's {layers} layers share {groups} groups of weights. Its layers {list(kept)} use "
            f"groups {used}; a student of {len(kept)} layers uses {would_use}. Choose layers that use groups in that "
            "order."
        )
