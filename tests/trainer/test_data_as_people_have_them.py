"""Real-world data: label names, missing values, other label orders, text that is not tokenized, unpadded rows."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset as TorchStream
from transformers import (
    BertForSequenceClassification,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from hf_distill import (
    CachedTeacher,
    DataError,
    Distiller,
    Seq2SeqDistillationArguments,
    Seq2SeqDistillationTrainer,
    TeacherCache,
)
from tests.heads import HEADS
from tests.tiny_tokenizers import tokenizer
from tests.trainer.refusals import refused
from tests.trainer.tiny import arguments, assert_moved, assert_same_bits, bert, make, softened_kl, weights

NAMES = ["bad", "fair", "good"]
NAMED = {"id2label": dict(enumerate(NAMES)), "label2id": {name: number for number, name in enumerate(NAMES)}}
LOGGER = "hf_distill.trainer.columns"
WORDS = ["good", None, "bad", "fair", "good", "", "bad", "fair"]
NUMBERS = [2, -100, 0, 1, 2, -100, 0, 1]


def ids(count: int = 8) -> list[list[int]]:
    return [[1 + (5 * i + 3 * j) % 22 for j in range(4)] for i in range(count)]


def rows(labels: list[Any]) -> list[dict[str, Any]]:
    return [{"input_ids": one, "label": label} for one, label in zip(ids(len(labels)), labels, strict=True)]


class Examples(TorchDataset):
    """A torch dataset with a length, whose examples are made on access."""

    def __init__(self, made: list[dict[str, Any]]) -> None:
        self.made = made

    def __len__(self) -> int:
        return len(self.made)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.made[index]


class Stream(TorchStream):
    def __init__(self, made: list[dict[str, Any]]) -> None:
        self.made = made

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.made)


KINDS = {
    "list": list,
    "Dataset": datasets.Dataset.from_list,
    "torch": Examples,
    "stream": lambda made: datasets.Dataset.from_list(made).to_iterable_dataset(),
    "torch stream": Stream,
}
PLAIN = {"data_collator": None, "train_sampling_strategy": "sequential", "learning_rate": 0.1}


def named(**changed: Any) -> Any:
    return bert(**NAMED, **changed)


def trained(folder: Path, teacher: Any, **given: Any) -> dict[str, torch.Tensor]:
    student = named()
    make(folder, student, teacher, **{**PLAIN, **given}).train()
    assert_moved(weights(student), weights(named()))
    return weights(student)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_label_names_and_missing_values_train_like_ids(tmp_path: Path, kind: str, alpha: float) -> None:
    """In every kind of dataset; at alpha=0 as Trainer does on the ids."""
    found = trained(tmp_path, named(seed=1), train_dataset=KINDS[kind](rows(WORDS)), alpha=alpha)
    assert_same_bits(found, trained(tmp_path, named(seed=1), train_dataset=rows(NUMBERS), alpha=alpha))
    if alpha == 0:
        student = named()
        settings = {name: value for name, value in PLAIN.items() if name != "data_collator"}
        args = arguments(tmp_path, TrainingArguments, **settings)
        Trainer(model=student, args=args, train_dataset=rows(NUMBERS)).train()
        assert_same_bits(found, weights(student))


def test_label_names_in_workers_with_a_cached_teacher_and_seq2seq_trainer(tmp_path: Path) -> None:
    data, teacher = rows(WORDS), named(seed=1)
    cache = TeacherCache.build(teacher, data, tmp_path / "cache", progress=False)
    expected = trained(tmp_path, CachedTeacher(cache), train_dataset=rows(NUMBERS))
    for more in ({}, {"dataloader_num_workers": 1}):
        found = trained(tmp_path, CachedTeacher(cache), train_dataset=data, **more)
        assert_same_bits(found, expected)
    student, settings = named(), {"train_sampling_strategy": "sequential"}
    args = arguments(tmp_path, Seq2SeqDistillationArguments, **settings)
    Seq2SeqDistillationTrainer(model=student, teacher_model=CachedTeacher(cache), args=args, train_dataset=data).train()
    assert_same_bits(weights(student), expected)


def test_the_conversion_is_logged_with_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = datasets.Dataset.from_list(rows(WORDS))
    with caplog.at_level(logging.WARNING, LOGGER):
        make(tmp_path, named(), named(seed=1), train_dataset=data, eval_dataset={"dev": data}, **PLAIN)
    assert [record.getMessage() for record in caplog.records] == [
        "'label' of the training data holds 3 different words, which are numbered by the student's label2id: 'good' "
        "is 2, 'bad' is 0, 'fair' is 1.",
        "2 of 8 rows of the training data have no label. They are distilled; the labels' term leaves them out.",
        "'label' of the evaluation data 'dev' holds 3 different words, which are numbered by the student's label2id: "
        "'good' is 2, 'bad' is 0, 'fair' is 1.",
        "2 of 8 rows of the evaluation data 'dev' have no label. The loss leaves them out, and compute_metrics "
        "gets -100 for them.",
    ]
    assert data["label"][:2] == ["good", None]


def test_the_converting_collator_can_be_pickled(tmp_path: Path) -> None:
    """Workers that are not forked receive a pickled collator."""
    loader = make(tmp_path, named(), named(seed=1), train_dataset=rows(WORDS), **PLAIN).get_train_dataloader()
    collate = pickle.loads(pickle.dumps(loader.collate_fn.data_collator))
    assert collate(rows(WORDS))["labels"].tolist() == NUMBERS


def test_valid_labels_are_not_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "hf_distill"):
        make(tmp_path, named(), named(seed=1), train_dataset=rows([0, 1, 2, 0]), **PLAIN)
    assert not caplog.records


def test_evaluation_and_prediction_convert_label_names(tmp_path: Path) -> None:
    """Each dataset is converted on its own: ids for training, names here; compute_metrics receives ids."""
    seen: list[Any] = []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction.label_ids.tolist())
        return {}

    given = {"train_dataset": rows(NUMBERS), "compute_metrics": metrics, "per_device_eval_batch_size": 8, **PLAIN}
    trainer = make(tmp_path, named(), named(seed=1), eval_dataset=rows(WORDS), **given)
    expected = make(tmp_path, named(), named(seed=1), eval_dataset=rows(NUMBERS), **given).evaluate()["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == expected
    trainer.evaluate(KINDS["Dataset"](rows(WORDS[::-1])))
    trainer.predict(rows(WORDS))
    trainer.train()
    assert seen == [NUMBERS, NUMBERS, NUMBERS[::-1], NUMBERS]


@pytest.mark.parametrize("reads_words", [True, False])
def test_label_names_are_left_to_a_custom_collator(tmp_path: Path, reads_words: bool) -> None:
    """It may convert them itself; missing values among ids are filled for it."""
    numbers = {"good": 2, "bad": 0, "fair": 1, "": -100, None: -100}

    def collate(features: list[Any]) -> dict[str, torch.Tensor]:
        labels = [numbers[feature["label"]] if reads_words else feature["label"] for feature in features]
        return {
            "input_ids": torch.tensor([feature["input_ids"] for feature in features]),
            "labels": torch.tensor(labels),
        }

    expected = trained(tmp_path, named(seed=1), train_dataset=rows(NUMBERS))
    if reads_words:
        data = [{**row, "label": row["label"] or ""} for row in rows(WORDS)]
        assert_same_bits(trained(tmp_path, named(seed=1), train_dataset=data, data_collator=collate), expected)
        return
    gaps = [{**row, "label": None if row["label"] == -100 else row["label"]} for row in rows(NUMBERS)]
    assert_same_bits(trained(tmp_path, named(seed=1), train_dataset=gaps, data_collator=collate), expected)
    with pytest.raises(
        DataError, match=r"'label' holds words, and the data_collator, which is your own.*label2id\[row"
    ):
        trained(tmp_path, named(seed=1), train_dataset=rows(["good"] * 8), data_collator=collate)


# Label names of the dataset in another order.


def with_names(labels: list[Any], names: list[str], *, tokens: bool = False) -> datasets.Dataset:
    kind = datasets.List(datasets.ClassLabel(names=names)) if tokens else datasets.ClassLabel(names=names)
    return datasets.Dataset.from_dict({"input_ids": ids(len(labels)), "label": labels}).cast_column("label", kind)


def cross_entropy(student: Any, batch_ids: list[list[int]], targets: list[Any]) -> float:
    """Return the mean over rows in float64."""
    losses: list[float] = []
    student = student.double().eval()
    with torch.no_grad():
        for one, target in zip(batch_ids, targets, strict=True):
            logits = student(input_ids=torch.tensor([one])).logits[0]
            logits = logits[None] if logits.dim() == 1 else logits
            for row, label in zip(logits, target if isinstance(target, list) else [target], strict=True):
                if label != -100:
                    losses.append(-row.log_softmax(-1)[label].item())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["bert_single_label", "distilbert_single_label", "bert_tokens"])
def test_dataset_labels_are_matched_by_name(tmp_path: Path, name: str, stream: bool) -> None:
    head, tokens = HEADS[name], name == "bert_tokens"

    def student() -> Any:
        """Return a confident student, so that the two losses differ."""
        model = head.make(0, **NAMED)
        with torch.no_grad():
            model.classifier.weight.mul_(30)
        return model

    labels = [[i % 3, (i + 1) % 3, -100, 0] if tokens else i % 3 for i in range(8)]
    by_name = [[2 - x if x >= 0 else x for x in one] if tokens else 2 - one for one in labels]
    data: Any = with_names(labels, NAMES[::-1], tokens=tokens)
    data = data.to_iterable_dataset() if stream else data
    found = {}
    for matching in ("by_name", "by_index"):
        trainer = make(
            tmp_path, student(), head.make(1, **NAMED), train_dataset=data, data_collator=None, max_steps=1,
            per_device_train_batch_size=8, logging_steps=1, label_matching=matching,
        )  # fmt: skip
        trainer.train()
        found[matching] = trainer.state.log_history[0]["loss/labels"]
    expected = cross_entropy(student(), ids(), by_name)
    assert found["by_name"] == pytest.approx(expected, rel=1e-4)
    assert found["by_index"] == pytest.approx(cross_entropy(student(), ids(), labels), rel=1e-4)
    assert abs(found["by_name"] - found["by_index"]) > 0.1


class OwnName(BertForSequenceClassification):
    """Calls its labels `target`."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, target: Any = None) -> Any:
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=target)


@pytest.mark.parametrize("kind", ["another order", "words"])
def test_labels_of_another_name_are_matched_too(tmp_path: Path, kind: str) -> None:
    numbers = [0, 1, 2, 0, 1, 2, 0, 1]
    data: Any = with_names(numbers, NAMES[::-1]) if kind == "another order" else rows([NAMES[2 - x] for x in numbers])
    data = data if kind == "another order" else datasets.Dataset.from_list(data)
    student = OwnName(named().config)
    student.load_state_dict(named().state_dict())
    trainer = make(
        tmp_path, student, named(seed=1), train_dataset=data.rename_column("label", "target"), data_collator=None,
        max_steps=1, per_device_train_batch_size=8, logging_steps=1, label_names=["target"],
    )  # fmt: skip
    trainer.train()
    expected = cross_entropy(named(), ids(), [2 - x for x in numbers])
    assert trainer.state.log_history[0]["loss/labels"] == pytest.approx(expected, rel=1e-4)


def test_alpha_0_keeps_the_label_ids_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = with_names([0, 1, 2, 0, 1, 2, 0, 1], NAMES[::-1])
    with caplog.at_level(logging.WARNING, LOGGER):
        found = trained(tmp_path, named(seed=1), train_dataset=data, alpha=0.0)
    assert "alpha=0 trains as Trainer does. To match the names: dataset.align_labels_with_mapping" in caplog.text
    student = named()
    args = arguments(tmp_path, TrainingArguments, train_sampling_strategy="sequential")
    Trainer(model=student, args=args, train_dataset=data).train()
    assert_same_bits(found, weights(student))


def test_evaluation_data_may_have_another_label_order(tmp_path: Path) -> None:
    train, other = with_names([0, 1, 2, 0], NAMES), with_names([0, 1, 2, 0], NAMES[::-1])
    given = {"train_dataset": train, "eval_dataset": other, "per_device_eval_batch_size": 4, **PLAIN}
    found = make(tmp_path, named(), named(seed=1), **given).evaluate()["eval_loss"]
    assert found == pytest.approx(cross_entropy(named(), ids(4), [2, 1, 0, 2]), rel=1e-5)


# Probabilities as labels.


SOFT = [[0.6, 0.3, 0.1], [0.0, 0.5, 0.5], [0.2, 0.2, 0.6], [1.0, 0.0, 0.0]]
SINGLE = {"problem_type": "single_label_classification"}


def soft_cross_entropy(student: Any, targets: list[Any], smoothing: float = 0.0) -> float:
    losses = []
    with torch.no_grad():
        for one, target in zip(ids(len(targets)), targets, strict=True):
            log_p = student.double().eval()(input_ids=torch.tensor([one])).logits[0].log_softmax(-1)
            if target is not None:
                losses.append(
                    -sum((p * (1 - smoothing) + smoothing / 3) * log_p[k].item() for k, p in enumerate(target))
                )
    return sum(losses) / len(losses)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("cut", "smoothing"), [((4, 1), 0.0), ((2, 2), 0.0), ((1, 4), 0.2)], ids=str)
def test_probabilities_are_trained_with_soft_cross_entropy(
    tmp_path: Path, kind: str, cut: tuple[int, int], smoothing: float
) -> None:
    """One row has no label. Exact over the whole step for any split; evaluation too."""
    labels = [SOFT[0], SOFT[1], None, SOFT[2]] if kind in ("list", "Dataset") else SOFT
    trainer = make(
        tmp_path, bert(**SINGLE), bert(seed=1, **SINGLE), train_dataset=KINDS[kind](rows(labels)), data_collator=None,
        train_sampling_strategy="sequential", max_steps=1, logging_steps=1, per_device_train_batch_size=cut[0],
        gradient_accumulation_steps=cut[1], label_smoothing_factor=smoothing, learning_rate=0.0, temperature=3.0,
    )  # fmt: skip
    trainer.train()
    logged = trainer.state.log_history[0]
    expected = soft_cross_entropy(bert(**SINGLE), labels, smoothing)
    assert logged["loss/labels"] == pytest.approx(expected, rel=1e-5)
    with torch.no_grad():
        ours, theirs = (model(input_ids=torch.tensor(ids(4))).logits for model in (bert(), bert(seed=1)))
    assert logged["loss/logits"] == pytest.approx(softened_kl(ours, theirs, 3.0).mean().item(), rel=1e-4)
    assert trainer.evaluate(rows(SOFT))["eval_loss"] == pytest.approx(
        soft_cross_entropy(bert(), SOFT, smoothing), rel=1e-5
    )


def test_probabilities_in_a_custom_loop() -> None:
    student = bert(**SINGLE)
    distiller = Distiller(student, bert(seed=1))
    batch = {"input_ids": torch.tensor(ids(4)), "labels": torch.tensor(SOFT)}
    assert distiller(student, batch).terms["labels"].item() == pytest.approx(soft_cross_entropy(bert(), SOFT), rel=1e-5)


def test_the_teachers_problem_type_applies_to_probability_labels(tmp_path: Path) -> None:
    trainer = make(
        tmp_path, bert(), bert(seed=1, **SINGLE), train_dataset=rows(SOFT), data_collator=None, max_steps=1,
        logging_steps=1, learning_rate=0.0,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.log_history[0]["loss/labels"] == pytest.approx(soft_cross_entropy(bert(), SOFT), rel=1e-5)


# Unusable data raise before the training.


def test_label_names_in_a_column_of_another_name(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list(rows(WORDS)).rename_column("label", "mood").add_column("text", ["a b"] * 8)
    words = (
        "no column called label or labels",
        "'mood' holds 3 words that are the student's labels",
        "dataset.rename_column('mood', 'label')",
    )
    with refused(tmp_path, DataError, *words):
        make(tmp_path, named(), named(seed=1), train_dataset=data.filter(lambda row: row["mood"] != ""), **PLAIN)
    with refused(tmp_path, DataError, "'mood' holds 3 different words, as many as the student has labels"):
        filled = data.filter(lambda row: bool(row["mood"]))
        make(tmp_path, bert(), bert(seed=1), train_dataset=filled, **PLAIN)
    listed = [{"input_ids": row["input_ids"], "mood": row["label"]} for row in rows(["good", "bad"])]
    with refused(tmp_path, DataError, "'mood' holds 2 words that are the student's labels"):
        make(tmp_path, named(), named(seed=1), train_dataset=listed, **PLAIN)
    make(tmp_path, named(), named(seed=1), train_dataset=data.rename_column("mood", "label"), **PLAIN).train()


@pytest.mark.parametrize("as_list", [False, True])
def test_the_error_names_a_likely_label_column(tmp_path: Path, as_list: bool) -> None:
    given = [{**row, "mood": i % 3, "length": 3} for i, row in enumerate(rows([None] * 8))]
    for row in given:
        row.pop("label", None)
    data = given if as_list else datasets.Dataset.from_list(given)
    with pytest.raises(DataError, match=r"'mood' holds each number from 0 to 2.*rename_column\('mood', 'label'\)"):
        make(tmp_path, named(), named(seed=1), train_dataset=data, **PLAIN)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["list", "Dataset"])
@pytest.mark.parametrize("name", ["bert_single_label", "llama_causal_lm", "t5_seq2seq"])
def test_text_that_is_not_tokenized_raises(tmp_path: Path, name: str, kind: str, alpha: float) -> None:
    """The error names this cause first, and its suggestion works."""
    head = HEADS[name]
    data = KINDS[kind]([{"label": i % 2, "source": "web", "text": f"w3 w{4 + i}"} for i in range(8)])
    words = ("the training data has the columns", "none that the", "Tokenize the text first", "tokenizer(rows['text']")
    given = {"train_dataset": data, "data_collator": None, "alpha": alpha, "processing_class": tokenizer()}
    with refused(tmp_path, DataError, *words):
        make(tmp_path, head.make(0), head.make(1), teacher_processing_class=tokenizer(), **given)
    if kind == "Dataset" and name == "bert_single_label":
        given["train_dataset"] = data.map(lambda some: tokenizer()(some["text"], truncation=True), batched=True)
        make(tmp_path, head.make(0), head.make(1), teacher_processing_class=tokenizer(), **given).train()


def test_text_for_a_custom_collator(tmp_path: Path) -> None:
    """It may tokenize the text, if the column reaches it."""

    def collate(features: list[Any]) -> Any:
        made = tokenizer()([feature["text"] for feature in features], padding=True, return_tensors="pt")
        return {**made, "labels": torch.tensor([feature["label"] for feature in features])}

    data = KINDS["Dataset"]([{"text": "w3 w4", "label": i % 3} for i in range(8)])
    given = {"train_dataset": data, "data_collator": collate}
    student, teacher = bert(vocab_size=40), bert(seed=1, vocab_size=40)
    with refused(
        tmp_path, DataError, "none that the BertForSequenceClassification reads", "remove_unused_columns=False"
    ):
        make(tmp_path, student, teacher, **given)
    make(tmp_path, student, teacher, remove_unused_columns=False, **given).train()


def test_unprocessed_recordings_raise(tmp_path: Path) -> None:
    head = HEADS["wav2vec2_ctc_mean"]
    data = KINDS["Dataset"]([{"audio": [0.0, 0.1], "labels": [1, 2]}] * 4)
    with refused(tmp_path, DataError, "none that the Wav2Vec2ForCTC reads (input_values)", "dataset.map"):
        make(tmp_path, head.make(0), head.make(1), train_dataset=data, data_collator=None)


def test_images_from_a_transform(tmp_path: Path) -> None:
    """Then the table's columns differ from those of the examples."""
    head = HEADS["vit_image_class"]
    made = head.examples(8)
    data = datasets.Dataset.from_dict({"number": list(range(8)), "label": ["LABEL_1"] * 8})
    data.set_transform(
        lambda some: {"pixel_values": [made[i]["pixel_values"] for i in some["number"]], "labels": some["label"]}
    )
    student = head.make(0)
    make(
        tmp_path, student, head.make(1), train_dataset=data, data_collator=None, remove_unused_columns=False,
    ).train()  # fmt: skip
    assert_moved(weights(student), weights(head.make(0)))


@pytest.mark.parametrize("name", ["bert_single_label", "bert_tokens", "llama_causal_lm", "t5_seq2seq"])
def test_unpadded_rows_raise(tmp_path: Path, name: str) -> None:
    """In a training and in a cache build with the same collator."""
    head = HEADS[name]
    data, teacher = head.examples(8), head.make(1)
    message = r"The examples of a batch are of unequal length \(input_ids: \d+ to \d+\), and nothing pads them\. Pass "
    trainer = make(tmp_path, head.make(0), teacher, train_dataset=data, data_collator=None)
    with pytest.raises(DataError, match=message + "processing_class=tokenizer") as raised:
        trainer.train()
    assert ("which pads labels as well" in str(raised.value)) == (name != "bert_single_label")
    with pytest.raises(DataError, match=message):
        TeacherCache.build(teacher, data, tmp_path / "cache", student=head.make(0), progress=False)
    assert not (tmp_path / "cache").exists()


def test_labels_that_the_collator_does_not_pad_raise(tmp_path: Path) -> None:
    head, words = HEADS["bert_tokens"], tokenizer()
    given = {"train_dataset": head.examples(8), "processing_class": words, "teacher_processing_class": words}
    trainer = make(tmp_path, head.make(0), head.make(1), data_collator=DataCollatorWithPadding(words), **given)
    with pytest.raises(DataError, match=r"does not pad labels\. Pass data_collator=DataCollatorForTokenClassification"):
        trainer.train()
    make(
        tmp_path, head.make(0), head.make(1), data_collator=DataCollatorForTokenClassification(words), **given
    ).train()  # fmt: skip


def test_unusable_labels_are_dropped_at_alpha_1(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They have no weight, so they are dropped with a warning."""
    found = []
    for labels in (["who", "knows"] * 4, [0] * 8):
        with caplog.at_level(logging.WARNING, LOGGER):
            found.append(trained(tmp_path, named(seed=1), train_dataset=rows(labels), alpha=1.0))
    assert_same_bits(*found)
    assert "The labels of the training data weigh nothing and are left out, as they cannot be read" in caplog.text


def test_a_cache_build_ignores_the_labels(tmp_path: Path) -> None:
    """Its contents do not depend on them."""
    teacher = bert(seed=1)
    for number, labels in enumerate((["who", "knows"] * 4, WORDS, [0.5] * 8, NUMBERS)):
        TeacherCache.build(teacher, rows(labels), tmp_path / str(number), progress=False)
    kept = [(tmp_path / str(number) / "shard-00000.arrow").read_bytes() for number in range(4)]
    assert kept[0] == kept[1] == kept[2] == kept[3]


def test_a_cache_of_text_that_is_not_tokenized_raises(tmp_path: Path) -> None:
    data = datasets.Dataset.from_dict({"text": ["w1 w2"] * 4, "label": [0] * 4})
    with pytest.raises(
        DataError, match=r"the dataset has the columns \['text', 'label'\], and none .*Tokenize the text"
    ):
        TeacherCache.build(bert(), data, tmp_path / "cache", processing_class=tokenizer(), progress=False)
    assert not (tmp_path / "cache").exists()
