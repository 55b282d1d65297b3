"""Objectives reject what they cannot compare before the first step, with a message that says what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from hf_distill import (
    AttentionMatch,
    CosineEmbedding,
    DataError,
    Distiller,
    HiddenMatch,
    LayerMap,
    RelationMatch,
    SimilarityMatch,
    Teacher,
    TeacherError,
)
from hf_distill.models.capture import ActivationCapture
from tests.heads import _BERT, HEADS, LABELS
from tests.objectives.by_hand import Shown, fitted, refused

HEAD = HEADS["bert_tokens"]


# At construction.


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: HiddenMatch(None), ("layers=None matches nothing", "embeddings=True")),
        (lambda: HiddenMatch(distance="l2"), ("distance='l2': allowed are", "mean_squared, cosine")),
        (lambda: HiddenMatch(distance_kwargs={"beta": 1.0}), ("mean_squared has no setting beta", "takes no settings")),
        (
            lambda: HiddenMatch(distance="smooth_l1", distance_kwargs={"betta": 1.0}),
            ("smooth_l1 has no setting betta", "it takes beta"),
        ),
        (lambda: HiddenMatch(distance="smooth_l1", distance_kwargs={"beta": 0.0}), ("beta=0.0: must lie in (0, inf)",)),
        (lambda: HiddenMatch(pooling="cls"), ("pooling='cls': allowed are first, last",)),
        (lambda: AttentionMatch(distance="kl"), ("distance='kl': allowed are scores, probabilities",)),
        (lambda: AttentionMatch(heads="mean"), ("heads='mean': give 'grouped', teacher heads, or lists",)),
        (lambda: RelationMatch(relations="values"), ("relations='values': name some of queries, keys, values",)),
        (lambda: RelationMatch(relations=()), ("relations=(): name some of",)),
        (lambda: RelationMatch(relations={"outputs": 1.0}), ("name some of queries, keys, values",)),
        (lambda: RelationMatch(relations={"keys": -1.0}), ("weight=-1.0", "at least 0")),
        (lambda: RelationMatch(relation_heads=0), ("relation_heads=0: give a whole number of at least 1",)),
        (
            lambda: SimilarityMatch(distance="rkd"),
            ("distance='rkd': allowed are similarity_preserving, distance_relations",),
        ),
        (lambda: SimilarityMatch(pooling="max"), ("pooling='max': allowed are mean, first, last",)),
    ],
)
def test_invalid_settings_are_rejected(make: Callable[[], Any], words: tuple[str, ...]) -> None:
    refused(make, *words)


@pytest.mark.parametrize("objective", [HiddenMatch, CosineEmbedding, AttentionMatch, RelationMatch, SimilarityMatch])
@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf"), True, "1", None, lambda progress: 0.5 - progress])
def test_invalid_weights_are_rejected(objective: Any, weight: Any) -> None:
    refused(lambda: objective(weight=weight), objective.__name__, "at least 0")


# When bound to the models.

TWO_OF_THREE = Shown(2, 16, 2), Shown(3, 16, 2)


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ([(0, 3)], ("teacher layer 3: out of range. The teacher has 3 layers: 0 to 2, or -3 to -1",)),
        ([(2, 0)], ("student layer 2: out of range. The student has 2 layers",)),
        ([(0, -4)], ("teacher layer -4: out of range",)),
        ([], ("the map is empty",)),
        ([(0, 0), (0, 0)], ("student layer 0 is linked to teacher layer 0 twice",)),
        ([(0, 0, 0.0)], ("has weight 0.0. Give a number above 0",)),
        ([(0,)], ("(0,) is no link",)),
        ("middle", ("'middle': no such map. Allowed: even, first, last, first_last, skip",)),
        (LayerMap.even(2, 12), ("the map is for 2 student and 12 teacher layers; there are 2 and 3",)),
        (3, ("3: give even,",)),
    ],
)
@pytest.mark.parametrize("objective", [HiddenMatch, AttentionMatch, RelationMatch])
def test_missing_layers_are_rejected(objective: Any, layers: Any, words: tuple[str, ...]) -> None:
    refused(lambda: fitted(objective(layers), *TWO_OF_THREE), f"{objective.__name__}: layers:", *words)


def test_a_student_deeper_than_its_teacher_requires_explicit_pairs() -> None:
    deeper = Shown(3, 16, 2), Shown(2, 16, 2)
    refused(lambda: fitted(HiddenMatch(), *deeper), "3 student layers cannot be taken from 2 teacher layers", "pairs")
    assert fitted(HiddenMatch([(2, 1)]), *deeper).layer_map.links


@pytest.mark.parametrize("objective", [HiddenMatch, CosineEmbedding])
def test_different_widths_require_a_projection(objective: Any) -> None:
    other = Shown(2, 16), Shown(2, 24)
    refused(
        lambda: fitted(objective(projection="none"), *other),
        "hidden states are 16 wide, the teacher's 24, and projection='none'",
        "or RelationMatch",
    )
    refused(lambda: fitted(objective(projection="mlp"), *other), "projection='mlp': allowed are auto, linear, shared")
    unknown: Any = Shown(2, None), Shown(2, 24)  # type: ignore[arg-type]  # no config says so
    refused(lambda: fitted(objective(), *unknown), "widths of the hidden states", "(student: None, teacher: 24)")


@pytest.mark.parametrize(
    ("heads", "numbers", "words"),
    [
        (None, (2, 4), ("the student has 2 attention heads, the teacher 4. Pass heads=", "use RelationMatch")),
        ("grouped", (2, 3), ("heads='grouped' cannot divide 3 teacher heads among 2 student heads",)),
        ([0], (2, 4), ("heads has 1 entries, the student 2 heads",)),
        ([0, 4], (2, 4), ("the teacher's 4 heads are 0 to 3, not [4]",)),
        ([[0], []], (2, 4), ("name at least one teacher head for each student head",)),
    ],
)
def test_unmatchable_head_counts_are_rejected(heads: Any, numbers: tuple[int, int], words: tuple[str, ...]) -> None:
    ours, theirs = (Shown(1, 24, number) for number in numbers)
    refused(lambda: fitted(AttentionMatch(heads=heads), ours, theirs), *words)


def test_relation_heads_must_divide_the_width_of_the_vectors() -> None:
    """The width is known only at the first batch: grouped keys are narrower than the model."""
    head = HEADS["llama_causal_lm"]
    student, teacher = head.make(1, layers=2), head.make(2, layers=2)
    distiller = Distiller(student, teacher, alpha=None, objectives=RelationMatch(relation_heads=16))
    refused(
        lambda: distiller(student, head.batch(2)), "heads=16: must divide the student's width", "Allowed: 1, 2, 4, 8."
    )


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_heads_split_across_processes_are_rejected(whose: str) -> None:
    """Tensor parallelism, as marked by transformers on the loaded model; each process has whole hidden states."""
    head = HEADS["llama_causal_lm"]
    models = {"student": head.make(1), "teacher": head.make(2)}
    models[whose]._tp_size = 2
    for objective in (AttentionMatch, RelationMatch):
        words = f"{objective.__name__}: tensor parallelism splits the {whose}'s heads over processes", "Use HiddenMatch"
        refused(lambda one=objective: Distiller(*models.values(), alpha=None, objectives=one()), *words)
    Distiller(*models.values(), alpha=None, objectives=[HiddenMatch(), CosineEmbedding()])


def test_a_teacher_without_activations_is_rejected() -> None:
    class OnlyLogits(Teacher):
        def __call__(self, task: Any, batch: Any, needs: Any) -> Any: ...

    refused(
        lambda: Distiller(HEAD.make(1), OnlyLogits(), objectives=RelationMatch()),
        "RelationMatch needs the activations of the teacher. Use a model, or a cache",
        error=TeacherError,
    )


# Stacks.


class PlainModel(nn.Module):
    """A plain module that takes keywords and returns logits, not a transformers model."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.words = nn.Embedding(40, width)
        self.tower = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.out = nn.Linear(width, LABELS)

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None) -> dict[str, torch.Tensor]:
        x = self.words(input_ids)
        for block in self.tower:
            x = block(x)
        return {"logits": self.out(x)}


def distiller_of_plain_models(objective: Any, **settings: Any) -> Any:
    settings = {"task": "token_classification", "alpha": None, **settings}
    return Distiller(PlainModel(16, 2), PlainModel(16, 3), objectives=objective, **settings)


def test_blocks_that_cannot_be_found_must_be_named() -> None:
    refused(
        lambda: distiller_of_plain_models(HiddenMatch()),
        "no stack of blocks found in the student (PlainModel)",
        "Its lists of modules: 'tower' (2)",
        "Name one with student_stack=",
    )
    refused(
        lambda: distiller_of_plain_models(HiddenMatch(student_stack="tower")),
        "in the teacher (PlainModel)",
        "teacher_stack=",
    )
    refused(
        lambda: distiller_of_plain_models(HiddenMatch(student_stack="towers", teacher_stack="tower")),
        "student_stack='towers': PlainModel has no list of modules of that name. Its lists of modules: 'tower' (2)",
    )
    named = HiddenMatch([(1, 2)], student_stack="tower", teacher_stack="tower", projection="none")
    distiller = distiller_of_plain_models(named)
    student: Any = PlainModel(16, 2)
    distiller.bind(student)
    ids, mask = torch.tensor([[1, 2, 3]]), torch.ones(1, 3, dtype=torch.long)
    found = distiller(student, {"input_ids": ids, "attention_mask": mask})
    teacher = distiller.teacher.model
    with torch.no_grad():
        ours = student.tower[1](student.tower[0](student.words(ids)))
        theirs = teacher.tower[2](teacher.tower[1](teacher.tower[0](teacher.words(ids))))
    assert found.loss.item() == pytest.approx((ours - theirs).square().mean().item(), rel=1e-5)


def test_a_model_without_a_module_list_is_rejected() -> None:
    refused(
        lambda: Distiller(nn.Linear(2, 2), HEAD.make(), objectives=HiddenMatch(), task="masked_lm", alpha=None),
        "no stack of blocks found in the student (Linear)",
        "It has no list of modules at all",
    )


def test_a_model_with_two_towers_requires_a_choice() -> None:
    sides = {name: {key: v for key, v in _BERT.items() if "dropout" not in key} for name in ("text", "vision")}
    config = hf.CLIPConfig(
        text_config=sides["text"], vision_config={**sides["vision"], "image_size": 8, "patch_size": 4}
    )
    refused(
        lambda: ActivationCapture(hf.CLIPModel(config), "student").blocks(),
        "the student (CLIPModel) has several stacks of blocks: 'text_model.encoder.layers' (1 blocks)",
        "'vision_model.encoder.layers' (1 blocks)",
        "Name it: student_stack='text_model.encoder.layers'",
    )


def test_an_invalid_side_is_rejected() -> None:
    refused(
        lambda: Distiller(HEAD.make(1), HEAD.make(2), objectives=HiddenMatch(side="left")),
        "side='left': allowed are 'encoder' and 'decoder', or None",
    )


# At a batch.


@pytest.mark.parametrize("objective", [HiddenMatch, AttentionMatch, RelationMatch, SimilarityMatch])
def test_positions_that_differ_between_the_models_are_rejected(objective: Any) -> None:
    """The teacher's inputs have another length; alpha=None skips the check of the logits."""
    student, teacher, batch = HEAD.make(1), HEAD.make(2), HEAD.batch(4)
    batch["teacher_input_ids"] = torch.ones(4, batch["input_ids"].shape[1] + 2, dtype=torch.long)
    distiller = Distiller(student, teacher, alpha=None, objectives=objective())
    refused(
        lambda: distiller(student, batch),
        f"the batch has {list(batch['input_ids'].shape)} [examples, positions]",
        "of the teacher are at",
        "the same tokenizer and padding",
        error=DataError,
    )


def test_frames_at_another_rate_are_rejected() -> None:
    head = HEADS["wav2vec2_ctc_mean"]
    student, teacher = head.make(1), head.make(2, conv_stride=(4, 2))
    distiller = Distiller(student, teacher, alpha=None, objectives=HiddenMatch())
    refused(lambda: distiller(student, head.batch(2)), "of the teacher are at", "the same frame rate", error=DataError)


def test_objectives_on_positions_reject_different_tokenizers() -> None:
    """Even for a classifier, whose predictions alone could be compared."""
    head = HEADS["bert_single_label"]
    student, teacher = head.make(1), head.make(2, vocab_size=50)
    refused(
        lambda: Distiller(student, teacher, objectives=HiddenMatch()),
        "student and teacher embed 40 and 50 tokens, and their tokenizers were not compared",
        "An objective compares positions of the input",
        error=TeacherError,
    )
