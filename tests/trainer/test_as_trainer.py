"""Features of `Trainer` that must work unchanged: precision, memory, adapters, samplers, streams, columns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from safetensors.torch import load_file
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

from hf_distill import BaseModelTeacher, DistillationTrainer, TeacherError
from tests.heads import HEADS, of_each_kind
from tests.hub.tiny import tokenizer
from tests.trainer.steps import alphas_of
from tests.trainer.tiny import (
    arguments,
    assert_moved,
    assert_same_bits,
    bert,
    examples,
    make,
    padded,
    softened_kl,
    update_difference,
    weights,
)

# the name before and after transformers 5.2x
NAMES = {"activation_checkpointing", "gradient_checkpointing"} & set(TrainingArguments.__dataclass_fields__)
CHECKPOINTING = min(NAMES)


def trained(folder: Any, **changed: Any) -> dict[str, torch.Tensor]:
    student = changed.pop("student", None) or bert()
    start = weights(student)
    trainer = make(folder, student, changed.pop("teacher", None) or bert(seed=1), **changed)
    trainer.train()
    assert_moved(weights(student), start)
    return weights(student)


@pytest.mark.parametrize("name", ["bert_single_label", "gpt2_causal_lm", "t5_seq2seq"])
def test_gradient_checkpointing_does_not_change_the_update(tmp_path, name: str) -> None:
    """The recomputed pass is the same; only the order in which T5's gradients are summed differs."""
    head = HEADS[name]
    found = []
    for on in (False, True):
        student = head.make(seed=0)
        given = {"train_dataset": head.examples(8), "data_collator": head.collate}
        make(tmp_path, student, head.make(seed=1), **{CHECKPOINTING: on}, **given).train()
        found.append(weights(student))
    assert update_difference(found[1], found[0], weights(head.make(seed=0))) < 1e-5


def test_bf16_is_close_to_fp32_and_leaves_both_models_in_fp32(tmp_path) -> None:
    logged = []
    for bf16 in (False, True):
        teacher = bert(seed=1)
        trainer = make(tmp_path, bert(), teacher, bf16=bf16, logging_steps=1, alpha=0.5, learning_rate=1e-3)
        trainer.train()
        logged.append([entry for entry in trainer.state.log_history if "loss" in entry])
        for model in (trainer.model, teacher):
            assert {p.dtype for p in model.parameters()} == {torch.float32}
    for exact, rough in zip(*logged, strict=True):
        for term in ("loss", "loss/labels", "loss/logits"):
            assert rough[term] == pytest.approx(exact[term], rel=0.05)
            assert rough[term] != exact[term]  # mixed precision was active


def test_bf16_applies_to_the_teacher_unless_it_has_a_dtype(tmp_path) -> None:
    for teacher_dtype, expected in ((None, torch.bfloat16), ("float32", torch.float32)):
        teacher, seen = bert(seed=1), []
        trainer = make(tmp_path, bert(), teacher, bf16=True, teacher_dtype=teacher_dtype, max_steps=1)
        teacher.classifier.register_forward_hook(lambda *given, seen=seen: seen.append(given[2].dtype))
        trainer.train()
        assert set(seen) == {expected}


# peft and torch's checkpointing ask transformers for it by the old name
OLD_NAME = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.mark.slow  # compiling takes a minute of one core, and needs a C++ compiler
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns about itself
def test_torch_compile(tmp_path) -> None:
    found = trained(tmp_path, torch_compile=True)
    assert update_difference(found, trained(tmp_path), weights(bert())) < 1e-3


def lora(**changed: Any) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules=["query"], modules_to_save=["classifier"], task_type="SEQ_CLS", **changed
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return peft.get_peft_model(bert(), config)


@OLD_NAME
def test_a_peft_student_trains_and_saves_only_its_adapter(tmp_path) -> None:
    student = lora()
    trainable = {name for name, p in student.named_parameters() if p.requires_grad}
    start = weights(student)
    trainer = make(
        tmp_path, student, bert(seed=1), max_steps=3, save_strategy="steps", save_steps=3, evaluate_with_teacher=True
    )
    trainer.train()
    changed = {name for name, value in weights(student).items() if not torch.equal(value, start[name])}
    assert changed and changed <= trainable
    checkpoint = Path(trainer.args.output_dir) / "checkpoint-3"
    assert (checkpoint / "adapter_model.safetensors").is_file() and not (checkpoint / "model.safetensors").exists()
    kept = load_file(checkpoint / "adapter_model.safetensors")
    assert len(kept) == 4 and all("lora_" in name or "classifier" in name for name in kept)
    assert 0 <= trainer.evaluate(examples(5))["eval_teacher_agreement"] <= 1


@OLD_NAME
def test_a_peft_student_with_accumulation(tmp_path) -> None:
    found = []
    for micro_batch, accumulation in ((8, 1), (2, 4)):
        student = lora().double()
        cut = {"per_device_train_batch_size": micro_batch, "gradient_accumulation_steps": accumulation}
        make(tmp_path, student, bert(seed=1).double(), max_steps=1, **cut).train()
        found.append(weights(student))
    assert update_difference(found[1], found[0], weights(lora().double())) < 1e-6


@OLD_NAME
def test_a_peft_student_whose_base_is_the_teacher_raises(tmp_path) -> None:
    student = lora()
    with pytest.raises(TeacherError, match=r"same object.*student has adapters.*teacher_model=BaseModelTeacher\(\)"):
        make(tmp_path, student, student.get_base_model())
    make(tmp_path, student, BaseModelTeacher()).train()  # the suggested solution


@pytest.mark.parametrize("strategy", ["random", "sequential", "group_by_length", "batch_rebalance"])
def test_every_sampling_strategy_gives_the_same_batches_as_trainer(tmp_path, strategy: str) -> None:
    """Recorded in the student's forward: the same batches, in the same order."""
    settings = {"train_sampling_strategy": strategy, "max_steps": 2, "gradient_accumulation_steps": 2}
    seen: list[list[Any]] = []
    for ours in (False, True):
        student, batches = bert(), []
        student.register_forward_pre_hook(
            lambda _, __, given, batches=batches: batches.append(given["input_ids"].tolist()), with_kwargs=True
        )
        given = {"train_dataset": examples(16), "data_collator": padded}
        if ours:
            make(tmp_path, student, bert(seed=1), **given, **settings).train()
        else:
            Trainer(model=student, args=arguments(tmp_path, TrainingArguments, **settings), **given).train()
        seen.append(batches)
    assert len(seen[0]) == 4 and seen[0] == seen[1]


def stream(count: int | None = None) -> Iterator[dict[str, Any]]:
    made = 0
    while count is None or made < count:
        yield from examples(8)
        made += 8


class Stream(torch.utils.data.IterableDataset):
    """An infinite dataset without a length."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return stream()


@pytest.mark.parametrize("dataset", [Stream(), IterableDataset.from_generator(stream)], ids=["torch", "datasets"])
def test_a_stream_trains_for_max_steps_like_a_list(tmp_path, dataset: Any) -> None:
    settings = {"max_steps": 3, "gradient_accumulation_steps": 2, "alpha_schedule": "linear", "alpha_end": 1.0}
    found = trained(tmp_path, train_dataset=dataset, **settings)
    listed = {"train_dataset": examples(8) * 3, "train_sampling_strategy": "sequential"}
    assert_same_bits(found, trained(tmp_path, **listed, **settings))


def as_dataset(count: int = 8, **more: list[Any]) -> Dataset:
    rows = examples(count)
    return Dataset.from_dict({**{name: [row[name] for row in rows] for name in rows[0]}, **more})


def test_unused_columns_are_removed_or_passed_to_the_collator(tmp_path) -> None:
    expected = trained(tmp_path)
    rows = as_dataset(note=list("abcdefgh"))
    assert_same_bits(trained(tmp_path, train_dataset=rows), expected)
    seen = []

    def collate(features: Any) -> Any:
        seen.append(sorted(features[0]))
        return padded([{k: v for k, v in feature.items() if k != "note"} for feature in features])

    kept = trained(tmp_path, train_dataset=rows, remove_unused_columns=False, data_collator=collate)
    assert_same_bits(kept, expected)
    assert seen[0] == ["input_ids", "labels", "note"]


def test_a_column_named_label_is_accepted(tmp_path) -> None:
    """transformers' collators rename `label` to `labels`, so it counts as labels."""
    rows = (
        as_dataset().rename_column("labels", "label").map(lambda row: {"input_ids": [i % 11 for i in row["input_ids"]]})
    )
    small = {"vocab_size": 11}
    student, teacher = bert(**small), bert(seed=1, **small)
    trainer = make(
        tmp_path,
        student,
        teacher,
        train_dataset=rows,
        data_collator=None,
        processing_class=tokenizer(),
        logging_steps=1,
    )
    assert isinstance(trainer.data_collator, DataCollatorWithPadding)
    trainer.train()
    assert trainer.state.log_history[0]["loss/labels"] > 0


def test_two_trainings_share_no_logged_values(tmp_path) -> None:
    """Values that the first run never logged must not appear in the second run's log."""
    trainer = make(tmp_path, bert(), bert(seed=1), logging_steps=3, max_steps=2, learning_rate=0.0)
    trainer.train()
    trainer.args.logging_steps = 1
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 2
    for entry in logged:
        assert entry["loss"] == pytest.approx(0.5 * entry["loss/labels"] + 0.5 * entry["loss/logits"], rel=1e-4)


def test_a_bare_encoder_with_a_custom_loss(tmp_path) -> None:
    """The loss defines its labels; the teacher's term is on pooled hidden states."""
    head = HEADS["bert_embedding"]
    data = [{**e, "labels": float(i % 2)} for i, e in enumerate(head.examples(8))]

    def pull(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        return (outputs["last_hidden_state"][:, 0, 0] - labels).square().mean()

    student = head.make(seed=0)
    trainer = make(
        tmp_path,
        student,
        head.make(seed=1),
        train_dataset=data,
        data_collator=head.collate,
        compute_loss_func=pull,
        label_names=["labels"],  # its forward has none, so Trainer would drop them
        logging_steps=1,
        max_steps=1,
        per_device_train_batch_size=8,
    )
    trainer.train()
    logged = trainer.state.log_history[0]
    fresh, batch = head.make(seed=0), head.collate(data)
    labels = batch.pop("labels")
    with torch.no_grad():
        hidden, theirs = fresh(**batch).last_hidden_state, head.make(seed=1)(**batch).last_hidden_state
    kept = batch["attention_mask"][..., None]
    apart = (hidden * kept).sum(1) / kept.sum(1) - (theirs * kept).sum(1) / kept.sum(1)
    assert logged["loss/labels"] == pytest.approx((hidden[:, 0, 0] - labels).square().mean().item(), rel=1e-4)
    assert logged["loss/logits"] == pytest.approx(apart.square().mean().item(), rel=1e-4)


def test_a_direct_call_of_compute_loss_treats_the_batch_as_a_step(tmp_path) -> None:
    student, teacher = bert(), bert(seed=1)
    trainer = make(tmp_path, student, teacher, alpha=0.25, temperature=3.0, gradient_accumulation_steps=4)
    student.train()
    loss, outputs = trainer.compute_loss(student, padded(examples(6)), return_outputs=True)
    batch = padded(examples(6))
    labels = batch.pop("labels")
    with torch.no_grad():
        theirs = teacher(**batch).logits
    own = torch.nn.functional.cross_entropy(outputs.logits, labels)
    expected = 0.75 * own + 0.25 * softened_kl(outputs.logits, theirs, 3.0).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", of_each_kind(2))
def test_every_head_trains_with_the_default_collator(tmp_path, name: str) -> None:
    head = HEADS[name]
    alpha = 0.5 if 0.5 in alphas_of(name) else 1.0  # embeddings have no labels
    examples = head.examples(1) * 4  # equal lengths: there is no tokenizer to pad with

    def loss(**given: object) -> float:
        args = arguments(tmp_path, max_steps=1, logging_steps=1, alpha=alpha)
        trainer = DistillationTrainer(model=head.make(1), teacher_model=head.make(2), args=args, **given)
        trainer.train()
        return trainer.state.log_history[0]["loss"]

    expected = loss(train_dataset=examples, data_collator=head.collate)
    assert loss(train_dataset=Dataset.from_list(examples)) == pytest.approx(expected, rel=1e-6)
