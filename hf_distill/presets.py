"""Stage and Preset: the objectives and arguments of one training, and of all trainings of a paper."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from hf_distill._types import Keywords
from hf_distill.errors import SettingError, check_choice
from hf_distill.layer_map import LayerMap
from hf_distill.objectives import AttentionMatch, CosineEmbedding, HiddenMatch, Objective, RelationMatch
from hf_distill.objectives.attention import Heads
from hf_distill.objectives.hidden import Projection
from hf_distill.objectives.layers import Layers

Factory = Callable[[], Sequence[Objective]]
Overrides: TypeAlias = Mapping[str, bool | int | float | str | None]


@dataclass(frozen=True)
class Stage:
    """The objectives and arguments of one training.

    Args:
        name: name of its folder.
        objectives: a function that makes them, or objectives, which are copied for each run so that two runs share no
            learned parameters.
        arguments: fields of `DistillationArguments` that override those of the run.
        keywords: keywords of the trainer (`train_dataset`, ...) that override those of the run.

    >>> Stage("logits", arguments={"alpha": 1.0}).make_objectives()
    []
    """

    name: str
    objectives: Factory | Sequence[Objective] = ()
    arguments: Keywords = field(default_factory=dict)
    keywords: Keywords = field(default_factory=dict)

    def make_objectives(self) -> list[Objective]:
        """Return new objectives on each call."""
        return list(self.objectives() if callable(self.objectives) else copy.deepcopy(tuple(self.objectives)))


@dataclass(frozen=True)
class Preset:
    """The trainings of a paper. A preset of one stage is for a trainer, one of several for `train_in_stages`.

    Args:
        source: the paper and its sections.
        stages: the stages in order.
        differences: how it differs from the paper and its code, a sentence each.
        paper: the citation key of the paper in `hub/papers.bib`, or None.

    Raises:
        SettingError: if `objectives` or `arguments` is read of a preset with several stages.

    >>> preset = Preset("plain", "Hinton et al. 2015, section 2", (Stage("plain", arguments={"alpha": 0.9}),))
    >>> preset.arguments, preset.objectives
    ({'alpha': 0.9}, [])
    """

    name: str
    source: str
    stages: tuple[Stage, ...]
    differences: tuple[str, ...] = ()
    paper: str | None = None

    @property
    def objectives(self) -> list[Objective]:
        """Return new objectives, for a trainer's `objectives=`."""
        return self._only_stage("objectives").make_objectives()

    @property
    def arguments(self) -> Keywords:
        """Return the arguments, for `DistillationArguments`."""
        return dict(self._only_stage("arguments").arguments)

    def _only_stage(self, what: str) -> Stage:
        if len(self.stages) != 1:
            names = ", ".join(stage.name for stage in self.stages)
            raise SettingError(
                f"{self.name} has {len(self.stages)} stages ({names}), each with its own {what}. Run them with "
                f"train_in_stages({self.name}(), model=..., teacher_model=..., args=...), or take a stage: "
                f"{self.name}().stages[0].make_objectives()."
            )
        return self.stages[0]

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.source}"]
        for stage in self.stages:
            lines.append(f"  {stage.name}: {', '.join(f'{k}={v}' for k, v in stage.arguments.items())}")
            for objective in stage.make_objectives():
                weight = objective.weight(0.0)
                lines.append("    " + ("" if weight == 1 else f"{weight:.4g} × ") + repr(objective))
        return "\n".join([*lines, *(f"  difference: {sentence}" for sentence in self.differences)])


_PADDING = "Means do not include padding."


def _one_stage(
    name: str, paper: str, source: str, objectives: Factory, arguments: Keywords, *differences: str
) -> Preset:
    return Preset(name, source, (Stage(name, objectives, arguments),), differences, paper)


def distilbert(*, temperature: float = 2.0) -> Preset:
    """Return DistilBERT's preset: logits, labels and the direction of the last hidden state, weighted 5/7, 2/7 and 1/7.

    Sanh et al. 2019, section 2 (the loss) and 3 (the training), and their code, whose weights are 5 (logits, T = 2), 2
    (masked LM) and 1 (cosine).

    Args:
        temperature: temperature of the logits.
    """
    return _one_stage(
        "distilbert",
        "sanh2019distilbert",
        "Sanh et al. 2019, DistilBERT, sections 2 and 3",
        lambda: [CosineEmbedding(weight=1 / 7)],
        {"alpha": 5 / 7, "temperature": temperature},
        "The loss is 1/7 of the paper's (5/7, 2/7 and 1/7 instead of 5, 2 and 1), so alpha is the teacher's share. "
        "This does not affect Adam, but it affects gradient clipping: the paper's max_grad_norm of 5 is 5/7 here.",
        "A masked LM compares logits at masked tokens; the paper's code compares them at all tokens but padding.",
        "If the widths differ, a projection is learned; the paper has equal widths.",
    )


def tinybert(
    *,
    layers: Layers = "skip",
    heads: Heads | None = None,
    temperature: float = 1.0,
    intermediate: Overrides | None = None,
    prediction: Overrides | None = None,
) -> Preset:
    """Return TinyBERT's preset: attention scores, hidden states and embeddings without labels, then predictions.

    Jiao et al. 2020, section 3.1 (equations 7 to 10) and 4.2 (20 epochs at 5e-5, then 3 epochs at 3e-5).

    Args:
        layers: layers whose attention and hidden states are matched, as in `LayerObjective`.
        heads: as in `AttentionMatch`.
        temperature: temperature of the second stage.
        intermediate: arguments of the first stage that override the paper's (`num_train_epochs`, `learning_rate`).
        prediction: the same for the second stage.
    """
    first = {"alpha": None, "num_train_epochs": 20, "learning_rate": 5e-5, **(intermediate or {})}
    second = {"alpha": 1.0, "temperature": temperature, "num_train_epochs": 3, "learning_rate": 3e-5}
    return Preset(
        "tinybert",
        "Jiao et al. 2020, TinyBERT, sections 3.1 and 4.2",
        (
            Stage(
                "intermediate",
                lambda: [
                    AttentionMatch(layers, heads=heads),
                    HiddenMatch(layers, projection="shared"),
                    HiddenMatch(None, embeddings=True, name="embeddings"),
                ],
                first,
            ),
            Stage("prediction", (), {**second, **(prediction or {})}),
        ),
        (
            "The prediction stage is a KL divergence, which is the paper's soft cross-entropy minus the teacher's "
            "entropy. The gradient is the same, and 0 means agreement.",
            _PADDING,
            "Regression learns the teacher's value; the paper's code learns the label.",
            "General distillation is not included: run the intermediate stage on a corpus first, with a teacher that "
            "is not fine-tuned. For augmented data see hf_distill.augment.",
            "Hidden states and embeddings have their own matrices, as in the paper; the paper's code shares one, "
            "with a bias.",
        ),
        "jiao2020tinybert",
    )


def pkd(
    student_layers: int,
    teacher_layers: int,
    *,
    variant: Literal["skip", "last"] = "skip",
    beta: float = 100.0,
    alpha: float = 0.5,
    temperature: float = 10.0,
    width: int = 768,
    projection: Projection = "none",
) -> Preset:
    """Return PKD's preset: labels, logits, and the direction of [CLS] in every layer but the last.

    Sun et al. 2019, sections 3.1 (logits) and 3.2 (equations 7 and 8). The paper searches beta from 10 to 1000, alpha
    from 0.2 to 0.7, and T from 5 to 20.

    Args:
        student_layers: number of layers of the student.
        teacher_layers: number of layers of the teacher.
        variant: "skip" (teacher layers k, 2k, ... counted from 1) or "last" (the last layers without the last one).
        beta: weight as in the paper's code, for a mean over layers and width.
        alpha: weight of the logits' term.
        temperature: temperature of the logits.
        width: width of both models, to undo that mean.
        projection: as in `HiddenMatch`; the paper has equal widths.

    Raises:
        SettingError: for an unknown variant, a student of one layer, or a beta or width that is not allowed.
    """
    maps = {"skip": LayerMap.skip, "last": LayerMap.last}
    check_choice("pkd: variant", variant, maps)
    whole = maps[variant](student_layers, teacher_layers)
    if student_layers == 1 or not beta >= 0 or not width >= 1:
        raise SettingError(
            f"pkd: {student_layers} student layers, beta={beta!r}, width={width!r}. Needs at least 2 layers (the last "
            "is not matched), a beta of at least 0, and a width of at least 1."
        )
    layers = LayerMap(student_layers, teacher_layers, whole.links[:-1])
    weight = beta / ((student_layers - 1) * width)

    def patience() -> list[Objective]:
        distance = "normalized_squared"
        match = HiddenMatch(
            layers, distance=distance, pooling="first", projection=projection, weight=weight, name="patience"
        )
        return [match]

    return _one_stage(
        "pkd",
        "sun2019pkd",
        f"Sun et al. 2019, PKD-{variant.title()}, sections 3.1 and 3.2",
        patience,
        {"alpha": alpha, "temperature": temperature},
        f"The paper's code multiplies beta={beta:g} with a mean over {student_layers - 1} layers and {width} numbers. "
        f"Equation 7 of the paper, and this preset, sum over them, so the weight here is {weight:.4g}.",
        "The logits' term is a KL divergence times T². The paper has a cross-entropy without T², and its code also "
        "divides by the number of classes, so that its alpha has less effect.",
    )


def minilm(*, student_layer: int = -1, teacher_layer: int = -1, relation_heads: int | None = None) -> Preset:
    """Return MiniLM's preset: attention, and relations of the values, in the last layer.

    Wang et al. 2020, sections 3.1 (attention) and 3.2 (values). Both models need the same number of attention heads.

    Args:
        student_layer: counted from 0; the paper's is the last.
        teacher_layer: counted from 0; the paper's is the last.
        relation_heads: number of relation heads; None means the attention heads, as in the paper.
    """
    layers = ((student_layer, teacher_layer),)
    return _one_stage(
        "minilm",
        "wang2020minilm",
        "Wang et al. 2020, MiniLM, sections 3.1 and 3.2",
        lambda: [
            AttentionMatch(layers, distance="probabilities"),
            RelationMatch(layers, relations=("values",), relation_heads=relation_heads),
        ],
        {"alpha": None},
        _PADDING,
        "A teacher assistant (section 3.3) is a second run, with the assistant as teacher.",
    )


def minilmv2(*, teacher_layer: int = -1, relation_heads: int = 48, student_layer: int = -1) -> Preset:
    """Return MiniLMv2's preset: relations of the queries, the keys and the values in one layer.

    Wang et al. 2021, section 3.1 (relations) and 3.2 (which layer of a large teacher). The numbers of heads may differ.

    Args:
        teacher_layer: counted from 0: the last of a base-size teacher; 20 of BERT-large, 18 of RoBERTa-large (21 and 19
            counted from 1).
        relation_heads: 48 for a base-size teacher, 64 for a large one; must divide both widths.
        student_layer: counted from 0.
    """
    return _one_stage(
        "minilmv2",
        "wang2021minilmv2",
        "Wang et al. 2021, MiniLMv2, sections 3.1 and 3.2",
        lambda: [RelationMatch(((student_layer, teacher_layer),), relation_heads=relation_heads)],
        {"alpha": None},
        _PADDING,
    )


def distilhubert(*, teacher_layers: Sequence[int] = (3, 7, 11), cosine_weight: float = 1.0) -> Preset:
    """Return DistilHuBERT's preset: the student's last layer predicts three of the teacher's, each through a matrix.

    Chang et al. 2022, section 2.2 (equation 1). The matrices are discarded after training, as the paper's heads are.

    Args:
        teacher_layers: counted from 0: the paper's 4, 8 and 12 counted from 1.
        cosine_weight: λ of equation 1.
    """
    layers = tuple((-1, layer) for layer in teacher_layers)
    settings = {"cosine_weight": cosine_weight}
    return _one_stage(
        "distilhubert",
        "chang2022distilhubert",
        "Chang et al. 2022, DistilHuBERT, section 2.2",
        lambda: [
            HiddenMatch(layers, distance="l1_cosine", distance_kwargs=settings, projection="linear", name="heads")
        ],
        {"alpha": None},
        "A prediction head is a matrix; in the paper's code it is two layers with biases and a GELU between them.",
        "The student, the teacher's convolutions and first two layers, is not made here: use students.inherit.",
        _PADDING,
    )


PRESETS: dict[str, Callable[..., Preset]] = {
    "distilbert": distilbert,
    "tinybert": tinybert,
    "pkd": pkd,
    "minilm": minilm,
    "minilmv2": minilmv2,
    "distilhubert": distilhubert,
}

__all__ = ["PRESETS", "Preset", "Stage", "distilbert", "distilhubert", "minilm", "minilmv2", "pkd", "tinybert"]
