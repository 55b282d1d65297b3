"""`narrow`: a thinner student of the teacher's architecture, with the teacher's most important units."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

import torch
from transformers import PreTrainedModel

from hf_distill._types import Batch
from hf_distill.errors import SettingError, TeacherError, did_you_mean
from hf_distill.students.building import check_teacher
from hf_distill.students.narrow.build import build_student
from hf_distill.students.narrow.calibration import Calibration
from hf_distill.students.narrow.dataflow import Dataflow
from hf_distill.students.narrow.importance import Importance, keep_best
from hf_distill.students.narrow.layout import Kind, Layout, find_layout, find_sizes
from hf_distill.students.narrow.projection import Projection
from hf_distill.students.narrow.residual_stream import find_residual_stream
from hf_distill.students.narrow.units import Axis, Cut, UnitGroup, check_permutations, find_groups
from hf_distill.students.report import with_report
from hf_distill.students.trimming import TrimmedVocabulary
from hf_distill.vocabulary import read_the_same_ids, reads_trimmed_ids

Width = Literal["importance", "projection"]


def narrow(
    teacher: PreTrainedModel,
    *,
    hidden: int | None = None,
    heads: int | None = None,
    key_value_heads: int | None = None,
    intermediate: int | None = None,
    vocabulary: TrimmedVocabulary | None = None,
    data: Iterable[Batch] | None = None,
    importance: Importance = "activation",
    width: Width = "importance",
) -> PreTrainedModel:
    """Return a new model of the teacher's class with the teacher's most important heads, neurons and channels.

    The axes of each unit are found by experiments and verified: permuting units must not change the outputs. The config
    has the new sizes; weight tying, dtype and device are the teacher's. The student is in evaluation mode, as after
    `from_pretrained`. The teacher and the random state do not change. `report_of(student)` lists the kept units.

    Args:
        hidden: number of channels of the hidden states, the same ones in all layers; see `width`.
        heads: number of heads of each attention. A head keeps its size; where a config cannot set a head's size (BERT,
            BART, GPT-2, ...), `hidden` must be `heads` times that size.
        key_value_heads: number of key-value heads that several heads share. None keeps the teacher's number.
        intermediate: number of neurons of each feed-forward layer.
        vocabulary: the tokens to keep, from `trim_vocabulary`.
        data: batches (dicts of tensors) that measure importance and show the dataflow of the model. Required for
            everything but `vocabulary`. importance="gradient" needs labels.
        importance: "activation" (Minitron) or "gradient" (Michel et al. 2019); see `students.narrow.importance`.
        width: "importance" keeps the best channels. "projection" rotates the hidden states to their principal
            components on `data` and keeps the leading ones (SliceGPT, Ashkboos et al. 2024, section 3; there with one
            basis for each block, here with one for all, so that the architecture does not change). It needs an RMSNorm
            before each block: Llama, Qwen, Mistral, Gemma, T5. A tied head gets its own weights.

    Raises:
        SettingError: if the teacher does not have these sizes, or they do not fit together.
        DataError: if the data has no batches, or lacks the columns that importance needs.
        TeacherError: if the teacher's units cannot be identified or cut.

    >>> import torch
    >>> from hf_distill.students import report_of
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(vocab_size=40, hidden_size=16, num_attention_heads=4, num_key_value_heads=2)
    >>> teacher = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, intermediate_size=32, **sizes))
    >>> data = [{"input_ids": torch.tensor([[3, 4, 5, 6]])}]
    >>> student = narrow(teacher, heads=2, intermediate=8, data=data)
    >>> [str(size) for size in report_of(student).sizes]
    ['config.num_attention_heads: 2 of 4', 'config.intermediate_size: 8 of 32']
    """
    check_teacher(teacher, "narrow")
    sizes: dict[Kind, int | None] = {
        "hidden": hidden, "heads": heads, "key_value_heads": key_value_heads, "intermediate": intermediate
    }  # fmt: skip
    wanted = {kind: value for kind, value in sizes.items() if value is not None}
    _check_arguments(wanted, vocabulary, data, importance, width)
    cuts: list[Cut] = []
    values: dict[Kind, int] = {}
    projection = None
    if wanted:
        with Calibration(teacher, data or ()) as calibration:
            layout, cuts, values, projection = _choose(calibration, wanted, importance, width)
    else:
        layout = find_layout(teacher, {"vocabulary"}, Dataflow())
    chosen_by = importance if cuts else None
    if vocabulary is not None:
        cuts.append(_tokens(teacher, layout, vocabulary))
        values["vocabulary"] = len(vocabulary.kept)
    student, report = build_student(teacher, layout, cuts, values, vocabulary, chosen_by, projection)
    if vocabulary is None:
        read_the_same_ids(student, teacher)
    else:
        reads_trimmed_ids(student, vocabulary.kept)
    return with_report(student, report)


def _check_arguments(
    wanted: dict[Kind, int],
    vocabulary: object,
    data: object,
    importance: str,
    width: str,
) -> None:
    problem = None
    for name, value, choices in (("importance", importance, get_args(Importance)), ("width", width, get_args(Width))):
        if value not in choices:
            hint = did_you_mean(value, choices)
            raise SettingError(f"narrow: {name}={value!r}: allowed are {' and '.join(choices)}.{hint}")
    for kind, size in wanted.items():
        if type(size) is not int or size < 1:
            problem = f"{kind}={size!r} is not a whole number of at least 1"
    if not wanted and vocabulary is None:
        problem = "pass a smaller size: hidden=, heads=, intermediate= and/or vocabulary="
    elif vocabulary is not None and not isinstance(vocabulary, TrimmedVocabulary):
        problem = f"vocabulary= is a {type(vocabulary).__name__}. Pass students.trim_vocabulary(tokenizer, texts)"
    elif wanted and data is None:
        problem = f"{', '.join(sorted(wanted))}: importance is measured on data. Pass data=, some batches of tensors"
    elif "key_value_heads" in wanted and "heads" not in wanted:
        problem = "key_value_heads= goes with heads=: each key-value head serves some heads"
    elif width == "projection" and "hidden" not in wanted:
        problem = "width='projection' goes with hidden="
    if problem:
        raise SettingError(f"narrow: {problem}.")


def _choose(
    calibration: Calibration, wanted: dict[Kind, int], importance: Importance, width: Width
) -> tuple[Layout, list[Cut], dict[Kind, int], Projection | None]:
    """Return the layout, the units to keep, the new sizes, and the projection if there is one."""
    teacher = calibration.teacher
    kinds = wanted.keys() - {"key_value_heads"}
    find_sizes(teacher, kinds)  # before anything is computed
    flow = calibration.dataflow()
    layout = find_layout(teacher, kinds, flow)
    values = _fitting_sizes(teacher, layout, wanted)
    groups = find_groups(layout, flow, kinds)
    projection = None
    if width == "projection":
        (channels,) = (group for group in groups if group.kind == "hidden")
        groups.remove(channels)
        stream = find_residual_stream(teacher, channels, flow)
        projection = Projection(calibration, layout, stream, values["hidden"])
        layout.config = projection.config
    for group in groups:
        if values[group.kind] % group.parts:
            raise SettingError(f"narrow: hidden= must be a multiple of {group.parts}, the groups of a convolution.")
    if groups:
        check_permutations(teacher, groups, calibration.first)
    scores = calibration.scores(groups, importance, projection.components if projection else None)
    shared = values.get("key_value_heads", 1)
    cuts = [
        (group, keep_best(score, group, values[group.kind], shared))
        for group, score in zip(groups, scores, strict=True)
    ]
    return layout, cuts, values, projection


def _fitting_sizes(teacher: PreTrainedModel, layout: Layout, wanted: dict[Kind, int]) -> dict[Kind, int]:
    """Return the student's sizes. Raises SettingError if they are too large or do not fit together."""
    if "key_value_heads" in wanted and not layout.axes["key_value_heads"]:
        raise SettingError(f"narrow: {type(teacher).__name__} has no key-value heads that several heads share.")
    for kind, value in wanted.items():
        for setting, largest in layout.sizes[kind].values.items():
            if value > largest:
                raise SettingError(f"narrow: {kind}={value}: the teacher has {largest} ({setting}).")
    if {"hidden", "heads"} & wanted.keys() and "heads" in layout.sizes and layout.head_setting is None:
        _check_head_size(layout, wanted)
    if "heads" in wanted and layout.axes["key_value_heads"]:
        return {**wanted, "key_value_heads": _key_value_heads(layout, wanted)}
    return wanted


def _check_head_size(layout: Layout, wanted: dict[Kind, int]) -> None:
    size = layout.head_size or 1
    hidden = wanted.get("hidden", layout.sizes["hidden"].value)
    heads = wanted.get("heads", layout.sizes["heads"].value)
    if hidden == heads * size:
        return
    hint = f"heads={hidden // size}"
    if hidden % size:
        hint = f"hidden={max(hidden // size, 1) * size}"
    elif "hidden" not in wanted:
        hint = f"hidden={heads * size}"
    raise SettingError(f"narrow: hidden={hidden} with heads={heads}: a head has the fixed size of {size}. Try {hint}.")


def _key_value_heads(layout: Layout, wanted: dict[Kind, int]) -> int:
    """Return the student's number of key-value heads: the teacher's, or that of the heads if each has its own."""
    heads, before, after = layout.sizes["heads"].value, layout.sizes["key_value_heads"].value, wanted["heads"]
    number = wanted.get("key_value_heads", after if heads == before else before)
    problem = None
    if heads == before and number != after:
        problem = "in the teacher each head has its own. Leave it out"
    elif after % number:
        fitting = [n for n in range(1, min(before, after) + 1) if after % n == 0]
        problem = f"they must divide heads={after}. Pass one of {', '.join(map(str, fitting))}"
    elif after // number > heads // before:
        limit = heads // before
        problem = f"that is {after // number} heads each, in the teacher {limit}. Pass heads={number * limit} or fewer"
    if problem:
        raise SettingError(f"narrow: heads={after}, key_value_heads={number}: {problem}.")
    return number


def _tokens(teacher: PreTrainedModel, layout: Layout, vocabulary: TrimmedVocabulary) -> Cut:
    """Add the tokens to the layout, and return those to keep."""
    tokens = find_layout(teacher, {"vocabulary"}, Dataflow())
    layout.sizes |= tokens.sizes
    units = tokens.sizes["vocabulary"].value
    if vocabulary.kept[-1] >= units:
        raise TeacherError(
            f"narrow: vocabulary= has ids up to {vocabulary.kept[-1]}, but the teacher has {units} tokens. Is it the "
            "teacher's tokenizer?"
        )
    axes = [Axis(name, dim, blocks=length // units) for (name, dim), length in tokens.axes["vocabulary"].items()]
    return UnitGroup("vocabulary", "tokens", units, axes), torch.tensor(vocabulary.kept)
