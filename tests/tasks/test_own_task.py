"""Rows are `[n v]` for every task: other axes raise an error, and a custom Task gives the right number.

The right numbers are computed in float64 from the models' outputs.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from hf_distill import (
    DataError,
    DistillationTrainer,
    Distiller,
    Ensemble,
    HfDistillError,
    SettingError,
    TeacherCache,
    TeacherError,
)
from hf_distill.objectives import ExitMatch, LogitsMatch
from hf_distill.signals import Signals, SparseRows
from hf_distill.tasks import TASKS, CausalLM, Classification, MultipleChoice, Regression, Task
from hf_distill.tasks.base import PositionTask
from tests.heads import HEADS
from tests.trainer.tiny import arguments

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
PARTS = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
OWN = r"If a model predicts something else, such as a row for each pixel.*hf_distill\.tasks\.Task.*docs/heads\.md"


def segformer(seed: int, **settings: Any) -> Any:
    """Logits `[b classes h/4 w/4]`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        shape = {
            "num_encoder_blocks": 2, "depths": [1, 1], "hidden_sizes": [8, 8], "num_attention_heads": [1, 1],
            "sr_ratios": [2, 1], "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [1, 1],
            "decoder_hidden_size": 8, "initializer_range": 0.5, "num_labels": 3, "classifier_dropout_prob": 0.0,
            "drop_path_rate": 0.0,
        }  # fmt: skip
        return hf.SegformerForSemanticSegmentation(hf.SegformerConfig(**{**shape, **settings})).eval()


def yolos(seed: int) -> Any:
    """Logits `[b queries classes + 1]`."""
    torch.manual_seed(seed)
    return hf.YolosForObjectDetection(
        hf.YolosConfig(image_size=[32, 32], patch_size=8, num_detection_tokens=5, num_labels=3, **SIZES, **PARTS)
    ).eval()


def images(count: int = 2) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))}


# Outputs with other axes are rejected.


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            segformer,
            r"student's logits are \[2, 3, 8, 8\], .* \[example, class\]\. Axis 1 is as long as config\.num_labels",
        ),
        (yolos, r"student's logits are \[2, 5, 4\], this task reads \[example, class\]"),
    ],
    ids=["row per pixel", "row per query"],
)
def test_a_classifier_with_more_rows_than_examples_is_rejected(make: Any, words: str) -> None:
    """Once SegFormer gave 95.84 instead of 1.0274, and DETR the right value times its number of queries."""
    with pytest.raises(SettingError, match=f"{words}.*{OWN}"):
        Distiller(make(1), make(2), task="classification", alpha=1.0)(make(1), images())


def test_the_error_names_the_class_axis_only_if_it_is_known() -> None:
    for shape, classes, words in (
        ((2, 5, 4), 4, "Axis 2 is as long as config.num_labels (4): an example has several rows. "),
        ((2, 4, 5, 5), 4, "Axis 1 is as long as config.num_labels (4): the last axis would be taken for the classes. "),
        ((2, 4, 4, 5), 4, ""),
        ((2, 3, 5, 5), 4, ""),
    ):
        task = Classification(SimpleNamespace(problem_type=None, num_labels=classes))
        assert task._class_axis(torch.zeros(shape)) == words


@pytest.mark.parametrize("whose", ["student", "teacher"])
@pytest.mark.parametrize("task", [Classification(SimpleNamespace(problem_type=None)), MultipleChoice(), Regression()])
@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 3, 4, 5)])
def test_rows_with_extra_axes_are_rejected_for_both_models(task: Task, whose: str, shape: tuple[int, ...]) -> None:
    """Even if `select` passes them: a custom task may select anything."""
    signals = {"student": torch.randn(2, shape[-1]), "teacher": torch.randn(2, shape[-1])} | {whose: torch.randn(shape)}
    between = r"axis 1 \(3 long\)" + (r" and axis 2 \(4 long\)" if len(shape) == 4 else "")
    words = rf"of the {whose}'s predictions \[2, 3, 4.*axis {len(shape) - 1} .* for the columns, and {between} would be"
    with pytest.raises(SettingError, match=words):
        LogitsMatch()(Signals(signals["student"]), Signals(signals["teacher"]), task, images())


def test_token_rows_with_an_axis_too_many_or_too_few_are_rejected() -> None:
    """`[b t a v]` for token rows, and a sparse cache of such rows."""
    batch = {"input_ids": torch.ones(2, 3, dtype=torch.long), "labels": torch.ones(2, 3, dtype=torch.long)}
    task, good, bad = TASKS["masked_lm"](), torch.randn(2, 3, 5), torch.randn(2, 3, 4, 5)
    with pytest.raises(SettingError, match=r"masked_lm task \(MaskedLM\) selected \[6, 4, 5\] of the student's"):
        LogitsMatch()(Signals(bad), Signals(good), task, batch)
    with pytest.raises(SettingError, match=r"selected \[6\] of the teacher's predictions \[2, 3\]: an axis is missing"):
        LogitsMatch()(Signals(good), Signals(torch.randn(2, 3)), task, batch)
    listed = SparseRows(torch.zeros(2, 3, 4, 1, dtype=torch.long), torch.zeros(2, 3, 4, 1), torch.zeros(2, 3, 4))
    with pytest.raises(SettingError, match=r"selected \[6, 4, 1\] of the teacher's"):
        LogitsMatch(temperature=lambda _: 1.0)(Signals(good), Signals(None, sparse=listed), task, batch)


def test_span_logits_have_one_axis_of_positions() -> None:
    task, batch = TASKS["span"](), {"input_ids": torch.ones(2, 3, dtype=torch.long)}
    with pytest.raises(
        SettingError, match=r"teacher's start_logits are \[2, 3, 3\], this task reads \[example, position\]"
    ):
        task.read({"start_logits": torch.randn(2, 3, 3), "end_logits": torch.randn(2, 3, 3)}, batch, None, teacher=True)


def test_only_hidden_states_of_positions_and_features_are_pooled() -> None:
    """ConvNeXt's last hidden state is `[b c h w]`; it must not be pooled over channels."""
    config = hf.ConvNextConfig(hidden_sizes=[8, 8], depths=[1, 1], num_stages=2, patch_size=4)
    student, teacher = hf.ConvNextModel(config), hf.ConvNextModel(config)
    words = r"student's last_hidden_state are \[2, 8, 4, 4\], .*\[example, position, feature\].*pooler_output"
    with pytest.raises(SettingError, match=words):
        Distiller(student, teacher, alpha=1.0)(student, images())


@pytest.mark.parametrize("kind", sorted(set(TASKS) - {"ctc"}))
def test_no_built_in_task_accepts_pixel_rows(kind: str) -> None:
    """Whichever task is set by name for SegFormer, and whatever else the batch contains."""
    with pytest.raises(HfDistillError):
        student, teacher = segformer(1), segformer(2)
        labels = {"labels": torch.zeros(2, 32, 32, dtype=torch.long)} if kind not in ("embedding", "span") else {}
        Distiller(student, teacher, task=kind, alpha=1.0)(student, images() | labels)


def test_an_ensemble_with_pixel_rows_is_rejected() -> None:
    for task in ("classification", "multiple_choice"):
        student = segformer(1)
        distiller = Distiller(student, Ensemble([segformer(2), segformer(3)]), task=task, alpha=1.0)
        with pytest.raises(SettingError, match=OWN):
            distiller(student, images())


@pytest.mark.parametrize("task", ["classification", "multiple_choice"])
def test_a_cache_of_pixel_rows_is_not_built(task: str, tmp_path: Path) -> None:
    data = [{"pixel_values": image} for image in images(4)["pixel_values"]]
    words = rf"predictions are \[4, 3, 8, 8\], and a cache for a {task} task keeps \[example, column\].*live teacher"
    with pytest.raises(SettingError, match=words):
        TeacherCache.build(segformer(2), data, tmp_path / "cache", task=task, progress=False)


def test_an_evaluation_with_the_teacher_rejects_pixel_rows(tmp_path: Path) -> None:
    data = [{"pixel_values": image} for image in images(4)["pixel_values"]]
    args = arguments(tmp_path, alpha=1.0, evaluate_with_teacher=True)
    trainer = DistillationTrainer(
        model=segformer(1), teacher_model=segformer(2), task="classification", args=args, eval_dataset=data
    )
    with pytest.raises(SettingError, match=OWN):
        trainer.evaluate()


def test_exits_reject_pixel_rows() -> None:
    student = segformer(1)
    distiller = Distiller(
        student, alpha=0.0, task="classification", objectives=ExitMatch([0], student_stack="segformer.stages")
    )
    with pytest.raises(SettingError, match=OWN):
        distiller(student, images() | {"labels": torch.zeros(2, 32, 32, dtype=torch.long)})


# Fused, without whole logits.


class Unfolded(CausalLM):
    """Leaves an extra axis between rows and columns."""

    def select(self, x: Tensor, batch: Any) -> Tensor:
        return super().select(x, batch)[:, None]


class Longer(CausalLM):
    """`keep` is longer than the number of rows."""

    def keep(self, batch: Any) -> Tensor:
        return torch.cat([super().keep(batch)] * 2)

    def rows(self, batch: Any) -> int:
        return self.keep(batch).numel() // 2


@pytest.mark.parametrize("whole", [True, False], ids=["whole logits", "fused"])
@pytest.mark.parametrize(
    ("task", "words"),
    [
        (Unfolded(), r"\(Unfolded\) selected \[14, 1, "),
        (Longer(), r"Longer\.keep\(\) must have the shape \[14\] of the rows, not \[28\]"),
    ],
    ids=["extra axis", "keep too long"],
)
def test_an_invalid_vocabulary_task_is_rejected(task: Task, words: str, whole: bool) -> None:
    head = HEADS["llama_causal_lm"]
    student, teacher, batch = head.make(1), head.make(2), head.batch(2)
    batch = {name: value[:, :8] for name, value in batch.items()}
    distiller = Distiller(student, teacher, alpha=1.0, task=task, fused_loss=not whole)
    with pytest.raises(SettingError, match=words):
        distiller(student, batch)


# Counts.


class Halved(Task):
    """Two rows per example, some of which count."""

    kind, matched_by = "halved", "width"

    def select(self, x: Tensor, batch: Any) -> Tensor:
        return x.view(-1, x.shape[-1] // 2)

    def rows(self, batch: Any) -> int:
        return 2 * len(batch["input_ids"])


class KeepsTooFew(Halved):
    def keep(self, batch: Any) -> Tensor:
        return torch.tensor([True, False])


class KeepsWithTwoAxes(Halved):
    def keep(self, batch: Any) -> Tensor:
        return torch.ones(2, 2, dtype=torch.bool)


class CountsExamples(Halved):
    """A sum over four rows would be divided by two."""

    def count(self, batch: Any) -> Tensor:
        return torch.tensor(2)


class RowsAreExamples(Halved):
    def rows(self, batch: Any) -> int:
        return 2


@pytest.mark.parametrize(
    ("task", "error", "words"),
    [
        (KeepsTooFew(), SettingError, r"KeepsTooFew\.keep\(\) must have the shape \[4\] of the rows, not \[2\]"),
        (
            KeepsWithTwoAxes(),
            SettingError,
            r"KeepsWithTwoAxes\.keep\(\) must have the shape \[4\] of the rows, not \[2, 2\]",
        ),
        (
            CountsExamples(),
            SettingError,
            r"CountsExamples\.count\(\) returns 2 rows.* leave 4.*follows from rows\(\)",
        ),
        (RowsAreExamples(), TeacherError, r"the batch makes 2 rows of halved, but the student gives \[4, 2\]"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Task) else "",
)
def test_rows_must_agree_with_their_count(task: Task, error: type[Exception], words: str) -> None:
    shown = Signals(torch.randn(2, 4)), Signals(torch.randn(2, 4))
    with pytest.raises(error, match=words):
        LogitsMatch()(*shown, task, {"input_ids": torch.ones(2, 1, dtype=torch.long)})


def test_a_task_whose_rows_agree_with_their_count_passes() -> None:
    class Kept(Halved):
        def keep(self, batch: Any) -> Tensor:
            return torch.tensor([True, False, True, True])

        def count(self, batch: Any) -> Tensor:
            return torch.tensor(3)

    q, p = torch.randn(2, 4, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    found = LogitsMatch(temperature=lambda _: 1.0)(
        Signals(q), Signals(p), Kept(), {"input_ids": torch.ones(2, 1, dtype=torch.long)}
    )
    rows = [kl(p.view(4, 2)[i], q.view(4, 2)[i]) for i in (0, 2, 3)]
    assert found.value.item() == pytest.approx(float(sum(rows)), rel=1e-6) and int(found.count) == 3


# A custom task: the example in the documentation.


def documented() -> dict[str, Any]:
    """Run the program in docs/heads.md and return its names."""
    text = (Path(__file__).parents[2] / "docs" / "heads.md").read_text(encoding="utf-8")
    (program,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "Segmentation" in block]
    names: dict[str, Any] = {}
    exec(program, names)
    return names


@pytest.fixture(scope="module")
def segmentation() -> Task:
    return documented()["Segmentation"]()


def kl(teacher: Tensor, student: Tensor, dim: int = -1, t: float = 1.0) -> Tensor:
    p, q = teacher / t, student / t
    return t * t * (p.softmax(dim) * (p.log_softmax(dim) - q.log_softmax(dim))).sum(dim)


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return `[b classes h w]` in float64."""
    with torch.no_grad():
        return model(pixel_values=batch["pixel_values"]).logits.double()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_segmentation_has_a_row_per_pixel(segmentation: Task, temperature: float) -> None:
    student, teacher, batch = segformer(1), segformer(2), images()
    distiller = Distiller(student, teacher, task=segmentation, alpha=1.0, temperature=temperature)
    ours = distiller(student, batch).loss.item()
    s, t = logits(student, batch), logits(teacher, batch)
    assert ours == pytest.approx(kl(t, s, 1, temperature).mean().item(), rel=1e-5)
    pixels = itertools.product(range(2), range(8), range(8))
    one_by_one = [kl(t[b, :, y, x], s[b, :, y, x], t=temperature) for b, y, x in pixels]
    assert ours == pytest.approx(torch.stack(one_by_one).mean().item(), rel=1e-5)
    assert abs(ours - kl(t, s, -1, temperature).sum().item() / 2) > 1  # the earlier, wrong number


def test_segmentation_with_micro_batches_labels_names_and_several_teachers(segmentation: Task) -> None:
    student, one, other, batch = segformer(1), segformer(2), segformer(3), images(3)
    batch["labels"] = torch.randint(3, (3, 32, 32), generator=torch.Generator().manual_seed(2))
    batch["labels"][0, :30] = 255
    one.config.id2label = {0: "LABEL_2", 1: "LABEL_0", 2: "LABEL_1"}
    one.config.label2id = {name: index for index, name in one.config.id2label.items()}
    distiller = Distiller(student, one, task=segmentation, alpha=0.5, temperature=1.0)
    cut = [{name: value[part] for name, value in batch.items()} for part in (slice(0, 1), slice(1, 3))]
    counts = distiller.begin_step(cut)
    found = sum(distiller(student, part, counts).loss.item() for part in cut)
    s, t = logits(student, batch), logits(one, batch)[:, [1, 2, 0]]
    whole = torch.nn.functional.interpolate(s, size=(32, 32), mode="bilinear", align_corners=False)
    labels = torch.nn.functional.cross_entropy(whole, batch["labels"], ignore_index=255)
    assert found == pytest.approx((0.5 * labels + 0.5 * kl(t, s, 1).mean()).item(), rel=1e-5)
    both = Distiller(student, Ensemble([segformer(2), other]), task=segmentation, alpha=1.0, temperature=1.0)
    mean = (logits(segformer(2), batch).softmax(1) + logits(other, batch).softmax(1)) / 2
    assert both(student, batch).loss.item() == pytest.approx(kl(mean.log(), s, 1).mean().item(), rel=1e-5)


def test_segmentation_in_an_evaluation(segmentation: Task, tmp_path: Path) -> None:
    data = [{"pixel_values": image} for image in images(3)["pixel_values"]]
    student, teacher = segformer(1), segformer(2)
    args = arguments(tmp_path, alpha=1.0, temperature=1.0, evaluate_with_teacher=True, per_device_eval_batch_size=2)
    trainer = DistillationTrainer(model=student, teacher_model=teacher, task=segmentation, args=args, eval_dataset=data)
    found, (s, t) = trainer.evaluate(), (logits(model, images(3)) for model in (student, teacher))
    assert found["eval_divergence"] == pytest.approx(kl(t, s, 1).mean().item(), rel=1e-5)
    assert found["eval_teacher_agreement"] == pytest.approx((s.argmax(1) == t.argmax(1)).double().mean().item())


def test_segmentation_from_a_folder_and_without_a_cache(segmentation: Task, tmp_path: Path) -> None:
    """The teacher is loaded with the class that its checkpoint names."""
    student, teacher, batch = segformer(1), segformer(2), images()
    teacher.save_pretrained(tmp_path / "teacher")
    distiller = Distiller(student, str(tmp_path / "teacher"), task=segmentation, alpha=1.0)
    expected = Distiller(student, teacher, task=segmentation, alpha=1.0)(student, batch).loss.item()
    assert distiller(student, batch).loss.item() == pytest.approx(expected, rel=1e-6)
    with pytest.raises(
        SettingError, match="a cache does not know what the predictions of a segmentation task run along"
    ):
        TeacherCache.build(teacher, [{"pixel_values": batch["pixel_values"][0]}], tmp_path / "c", task=segmentation)


def test_the_error_for_an_unknown_class_suggests_task_names_that_apply() -> None:
    with pytest.raises(SettingError) as raised:
        Distiller(segformer(1), segformer(2))
    message = str(raised.value)
    assert "SegformerForSemanticSegmentation: this library does not know" in message
    assert 'only if the model\'s output has exactly that form (task="classification": one row of logits' in message
    assert re.search(OWN, message)


def test_a_custom_position_task_gives_rows() -> None:
    """A `PositionTask` only has to define `keep`."""

    class Own(PositionTask):
        kind, matched_by = "own", "width"

        def keep(self, batch: Any) -> Tensor:
            return batch["attention_mask"].bool().flatten()

    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    q, p = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    found = LogitsMatch(temperature=lambda _: 1.0)(
        Signals(q), Signals(p), Own(), {"input_ids": mask, "attention_mask": mask}
    )
    assert found.value.item() == pytest.approx(kl(p, q)[mask.bool()].sum().item(), rel=1e-6)
    with pytest.raises(TeacherError, match="the batch makes 6 rows of own, but the student gives"):
        LogitsMatch()(Signals(q[:, :2]), Signals(p[:, :2]), Own(), {"input_ids": mask, "attention_mask": mask})


def test_logits_at_extra_positions_are_rejected() -> None:
    """With two vocabularies, rows are paired by index, so extra positions would shift all pairs."""
    from hf_distill import UniversalLogitMatch

    head = HEADS["llama_causal_lm"]
    student, teacher, batch = head.make(1), head.make(2), head.batch(2)
    distiller = Distiller(student, teacher, alpha=None, objectives=UniversalLogitMatch())
    objective, task = distiller.objectives["universal_logit"], distiller.task
    with torch.no_grad():
        good = Signals(student(**batch).logits)
    longer = Signals(torch.cat([good.predictions()[:, :2], good.predictions()], 1))
    with pytest.raises(DataError, match=r"the teacher gives \d+ rows, its batch has \d+"):
        objective(good, longer, task, batch)
