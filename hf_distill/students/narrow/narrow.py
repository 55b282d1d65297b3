"""One projection of a teacher's width from start to end: is it possible, what does the data say, the tensors."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedModel

from hf_distill.errors import SettingError, TeacherError, did_you_mean
from hf_distill.students.checks import check_teacher, without_ties
from hf_distill.students.narrow.axes import Layout, all_sizes, along, changed, layout_of
from hf_distill.students.narrow.build import built, thinner
from hf_distill.students.narrow.calibration import Calibration, Components
from hf_distill.students.narrow.dataflow import Dataflow
from hf_distill.students.narrow.importance import check_importance, keep_best
from hf_distill.students.narrow.projection import Projected, check_projection, projected
from hf_distill.students.narrow.stream import Stream, find_stream
from hf_distill.students.narrow.units import Cut, check_exchangeable, find_groups
from hf_distill.students.report import NarrowReport, with_report
from hf_distill.students.trimming import TrimmedVocabulary
from hf_distill.vocabulary import read_the_same_ids, reads_trimmed_ids


class Rotation:
    """Made and checked before the data is read; `components` see the data; then `projected` gives the tensors.

    The config of the layout is that of a model with a head of its own, where the teacher's was tied and a config can
    say so.
    """

    def __init__(self, calibration: Calibration, layout: Layout, stream: Stream, width: int) -> None:
        self.teacher, self.stream, self.width = calibration.teacher, stream, width
        if layout.head_setting is None:
            raise TeacherError(
                f"narrow: width='projection': {type(self.teacher.config).__name__} cannot say how large a head is, so "
                "its heads follow hidden=, and no width can be tried by itself. Say width='importance'."
            )
        self.apart = stream.tied(self.teacher)
        if self.apart:
            layout.config = without_ties(layout.config)
        settings = layout.sizes["hidden"].settings
        new = {one: width for main in settings for one in (main, *along("hidden", main, layout.config))}
        config = changed(layout.config, new)
        self.factors = check_projection(
            self.teacher, stream, lambda: built(self.teacher, config, self.apart), width, calibration.first
        )
        self.components = Components(self.teacher, stream.norms, stream.width)

    def projected(self) -> Projected:
        """The teacher's tensors in the basis that the data gave."""
        basis, share = self.components.leading(self.width)
        parameters = self.teacher.named_parameters(remove_duplicate=False)
        tensors = {name: parameter.detach() for name, parameter in parameters}
        return Projected(projected(tensors, self.stream, basis, self.factors), share, self.apart)


logger = logging.getLogger(__name__)
Batches = Iterable[Mapping[str, Any]]


def narrow(
    teacher: PreTrainedModel,
    *,
    hidden: int | None = None,
    heads: int | None = None,
    key_value_heads: int | None = None,
    intermediate: int | None = None,
    vocabulary: TrimmedVocabulary | None = None,
    data: Batches | None = None,
    importance: str = "activation",
    width: str = "importance",
) -> PreTrainedModel:
    """A new model of the teacher's class that holds the teacher's most important heads, neurons and channels.

    Which axes of which tensors those are is found by experiment, and checked: exchanging two units must change nothing.
    The config says the new sizes, tied weights stay tied, dtype and device are the teacher's. The student is in
    evaluation mode, as after `from_pretrained`. The teacher and the random generators are left as they were.

    Args:
        hidden: channels of the hidden states. The same are kept everywhere; see `width`.
        heads: of each attention. A head keeps its size, so where a config cannot say a head's size (BERT, BART, GPT-2,
            ...) `hidden` must be `heads` times that size.
        key_value_heads: where several heads share one. As many as the teacher has, unless said; each then serves fewer.
        intermediate: neurons of each feed-forward layer.
        vocabulary: what `trim_vocabulary` gives: the tokens to keep.
        data: batches (dicts of tensors) on which importance is measured, and the wiring of the model is seen. Needed
            for all but `vocabulary`. With labels for importance="gradient".
        importance: "activation" (Minitron) or "gradient" (Michel et al. 2019); see `students.importance`.
        width: "importance": the best channels are kept. "projection": the hidden states are rotated to their principal
            components on `data`, and the leading ones are kept (SliceGPT, Ashkboos et al. 2024, section 3; there with
            a basis a block, here with one, so that the architecture stays). For models with an RMSNorm before each
            block: Llama, Qwen, Mistral, Gemma, T5. A tied head gets weights of its own.

    Raises:
        SettingError: for sizes that the teacher does not have or that do not fit together.
        DataError: for data without batches, or without what importance needs.
        TeacherError: for a teacher whose units cannot be told apart, or cannot be cut.

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
    check_importance(importance)
    sizes = {"hidden": hidden, "heads": heads, "groups": key_value_heads, "intermediate": intermediate}
    wanted = {kind: value for kind, value in sizes.items() if value is not None}
    _check_given(wanted, vocabulary, data)
    _check_width(width, hidden)
    student, report = _narrow(teacher, wanted, vocabulary, data, importance, width == "projection")
    if vocabulary is None:
        read_the_same_ids(student, teacher)
    else:
        reads_trimmed_ids(student, vocabulary.kept)
    logger.info("%s", report)
    return with_report(student, report)


def _narrow(
    teacher: PreTrainedModel,
    wanted: dict[str, int],
    vocabulary: TrimmedVocabulary | None,
    data: Batches | None,
    importance: str,
    project: bool,
) -> tuple[PreTrainedModel, NarrowReport]:
    cuts: list[Cut] = []
    values: dict[str, int] = {}
    projection = None
    if wanted:
        with Calibration(teacher, data or ()) as calibration:
            layout, cuts, values, projection = _chosen(calibration, wanted, importance, project)
    else:
        layout = layout_of(teacher, {"vocabulary"}, Dataflow())
    chosen = bool(cuts)
    if vocabulary is not None:
        layout, token_cut = _tokens(teacher, layout, vocabulary)
        cuts.append(token_cut)
        values["vocabulary"] = len(vocabulary.kept)
    return thinner(teacher, layout, cuts, values, vocabulary, importance if chosen else None, projection)


def _check_width(width: Any, hidden: int | None) -> None:
    if width not in ("importance", "projection"):
        hint = did_you_mean(width, ("importance", "projection"))
        raise SettingError(f"narrow: width={width!r}: allowed are importance and projection.{hint}")
    if width == "projection" and hidden is None:
        raise SettingError("narrow: width='projection' says how hidden= is made smaller. Give hidden= with it.")


def _check_given(wanted: dict[str, int], vocabulary: Any, data: Any) -> None:
    if not wanted and vocabulary is None:
        raise SettingError("narrow: say what shall be smaller: hidden=, heads=, intermediate= and/or vocabulary=.")
    for kind, value in wanted.items():
        name = "key_value_heads" if kind == "groups" else kind
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise SettingError(f"narrow: {name}={value!r}: give a whole number from 1.")
    if vocabulary is not None and not isinstance(vocabulary, TrimmedVocabulary):
        raise SettingError(
            f"narrow: vocabulary= is a {type(vocabulary).__name__}. Give students.trim_vocabulary(tokenizer, texts), "
            "which also makes the matching tokenizer."
        )
    if wanted and data is None:
        raise SettingError(
            f"narrow: {', '.join(sorted(wanted))}: which units matter is measured on data. Pass data=, some batches "
            "(dicts of tensors) as the teacher reads them."
        )
    if "groups" in wanted and "heads" not in wanted:
        raise SettingError("narrow: key_value_heads= goes with heads=: each key-value head serves some heads.")


def _chosen(
    calibration: Calibration, wanted: dict[str, int], importance: str, project: bool
) -> tuple[Layout, list[Cut], dict[str, int], Projected | None]:
    teacher, kinds = calibration.teacher, set(wanted) - {"groups"}
    all_sizes(teacher, kinds)  # before anything is computed
    dataflow = calibration.dataflow()
    layout = layout_of(teacher, kinds, dataflow)
    values = _fitting(teacher, layout, wanted)
    groups = find_groups(layout, dataflow, kinds)
    rotation = None
    if project:
        (channels,) = (group for group in groups if group.kind == "hidden")
        groups.remove(channels)
        rotation = Rotation(calibration, layout, find_stream(teacher, channels, dataflow), values["hidden"])
    for group in groups:
        if group.parts > 1 and values["hidden"] % group.parts:
            raise SettingError(
                f"narrow: hidden={values['hidden']}: a convolution of {type(teacher).__name__} works in {group.parts} "
                f"groups, so hidden must be a multiple of {group.parts}."
            )
    if groups:
        check_exchangeable(teacher, groups, calibration.first)
    scores = calibration.scores(groups, importance, rotation.components if rotation else None)
    blocks = values.get("groups", 1)
    cuts = [
        (group, keep_best(score, group, values[group.kind], blocks))
        for group, score in zip(groups, scores, strict=True)
    ]
    return layout, cuts, values, rotation.projected() if rotation else None


def _fitting(teacher: PreTrainedModel, layout: Layout, wanted: dict[str, int]) -> dict[str, int]:
    """The student's sizes, or SettingError where they are too large or do not fit together."""
    values = dict(wanted)
    for kind, value in wanted.items():
        if kind not in layout.sizes or (kind == "groups" and not layout.groups):
            raise SettingError(f"narrow: {type(teacher).__name__} has no key-value heads that several heads share.")
        name = "key_value_heads" if kind == "groups" else kind
        for setting, largest in layout.sizes[kind].values.items():
            if value > largest:
                raise SettingError(f"narrow: {name}={value}: the teacher has {largest} ({setting}). Say at most that.")
    if "heads" in layout.sizes and {"hidden", "heads"} & wanted.keys():
        if layout.head_setting is None:
            _check_head_size(teacher, layout, wanted)
        if "heads" in wanted and layout.groups:
            values["groups"] = _key_value_heads(layout, wanted)
    return values


def _check_head_size(teacher: PreTrainedModel, layout: Layout, wanted: dict[str, int]) -> None:
    size, name = layout.head_size or 1, type(teacher.config).__name__
    hidden = wanted.get("hidden", layout.sizes["hidden"].value)
    heads = wanted.get("heads", layout.sizes["heads"].value)
    if hidden == heads * size:
        return
    why = f"A head keeps its size of {size}, and {name} cannot say another one than hidden / heads"
    if "hidden" in wanted and hidden % size:
        below = max(hidden // size, 1) * size
        raise SettingError(f"narrow: hidden={hidden} is no multiple of {size}. {why}. Say hidden={below}, say.")
    if "hidden" in wanted:
        raise SettingError(f"narrow: hidden={hidden} with {heads} heads. {why}. Say heads={hidden // size} with it.")
    raise SettingError(f"narrow: heads={heads} with hidden={hidden}. {why}. Say hidden={heads * size} with it.")


def _key_value_heads(layout: Layout, wanted: dict[str, int]) -> int:
    """How many key-value heads the student has: those of the teacher, or one a head where they were one a head."""
    heads, groups = layout.sizes["heads"].value, layout.sizes["groups"].value
    asked = wanted.get("groups", wanted["heads"] if heads == groups else groups)
    if heads == groups and asked != wanted["heads"]:
        raise SettingError(f"narrow: key_value_heads={asked}: in the teacher each head has its own. Leave it out.")
    if wanted["heads"] % asked:
        fits = [n for n in range(1, min(groups, wanted["heads"]) + 1) if wanted["heads"] % n == 0]
        raise SettingError(
            f"narrow: heads={wanted['heads']} cannot share {asked} key-value heads equally. Say key_value_heads= one "
            f"of {', '.join(map(str, fits))}, or heads= a multiple of {asked}."
        )
    if wanted["heads"] // asked > heads // groups:
        raise SettingError(
            f"narrow: heads={wanted['heads']} on {asked} key-value heads are {wanted['heads'] // asked} each, and in "
            f"the teacher only {heads // groups} use the same one. Say heads={asked * (heads // groups)} at most."
        )
    return asked


def _tokens(teacher: PreTrainedModel, layout: Layout, vocabulary: TrimmedVocabulary) -> tuple[Layout, Cut]:
    tokens = layout_of(teacher, {"vocabulary"}, Dataflow())
    layout.sizes.update(tokens.sizes)
    layout.vocabulary = tokens.vocabulary
    return layout, vocabulary.cut(layout)
