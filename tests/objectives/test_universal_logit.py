"""UniversalLogitMatch: by hand from unpadded texts, the laws, and raw texts through the trainer."""

from __future__ import annotations

import functools
import random
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import DataCollatorForSeq2Seq

from hf_distill import DataError, Distiller, ModelTeacher, SettingError, TeacherError, UniversalLogitMatch
from hf_distill.tasks.language import decoder_inputs
from tests.functional.references import sorted_distance as slow
from tests.heads import HEADS
from tests.laws.measuring import difference, gradient_of, step
from tests.tiny_tokenizers import tokenizer
from tests.trainer.tiny import arguments, make

LLAMA = HEADS["llama_causal_lm"]
OURS, THEIRS = 40, 50  # the heads' numbers of columns
Example = dict[str, list[int]]


@functools.cache
def student() -> Any:
    return LLAMA.make(1).double()


@functools.cache
def teacher(padding: int = 0) -> Any:
    wide, found = LLAMA.make(2, vocab_size=THEIRS).double(), LLAMA.make(2, vocab_size=THEIRS + padding).double()
    values = wide.state_dict()
    with torch.no_grad():
        for name, value in found.state_dict().items():
            value[tuple(slice(size) for size in values[name].shape)] = values[name]
    return found


def examples(count: int = 8) -> list[Example]:
    """Return the same answers in two tokenizers, with different ids and different lengths."""
    rng, made = random.Random(3), []
    for _ in range(count):
        one: Example = {}
        for prefix, size in (("", OURS), ("teacher_", THEIRS)):
            prompt = [rng.randrange(3, size) for _ in range(rng.randint(1, 4))]
            answer = [rng.randrange(3, size) for _ in range(rng.randint(1, 5))]
            one |= {f"{prefix}input_ids": prompt + answer, f"{prefix}labels": [-100] * len(prompt) + answer}
        made.append(one)
    return made


def collated(rows: list[Example], *, more: int = 0) -> dict[str, torch.Tensor]:
    """Pad the student's texts on the right and the teacher's on the left (rotary positions differ by rounding)."""
    batch = {}
    for prefix, side in (("", "right"), ("teacher_", "left")):
        for name, filled in (("input_ids", 0), ("labels", -100), ("attention_mask", 0)):
            values = [[1] * len(r[f"{prefix}input_ids"]) if "mask" in name else r[f"{prefix}{name}"] for r in rows]
            tensors = [torch.tensor(one) for one in values]
            made = pad_sequence(tensors, batch_first=True, padding_value=filled, padding_side=side)
            batch[prefix + name] = torch.nn.functional.pad(
                made, (0, more) if side == "right" else (more, 0), value=filled
            )
    return batch


def by_hand(rows: list[Example], temperature: float = 1.0) -> float:
    """Return the paper's mean distance over pairs of answer tokens, with a forward for each text."""
    found = []
    for one in rows:
        sides = []
        for prefix, model in (("", student()), ("teacher_", teacher())):
            ids, labels = torch.tensor([one[f"{prefix}input_ids"]]), one[f"{prefix}labels"]
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0]
            sides.append([logits[i - 1] / temperature for i, label in enumerate(labels) if label != -100 and i > 0])
        found += [temperature * slow(q.tolist(), p.tolist()) for q, p in zip(*sides, strict=False)]
    return sum(found) / len(found)


def distiller(taught_by: Any = None, *, alpha: float | None = None, **settings: Any) -> Distiller:
    return Distiller(student(), taught_by or teacher(), alpha=alpha, objectives=UniversalLogitMatch(**settings))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_value_is_the_papers_distance_between_answers_position_by_position(temperature: float) -> None:
    rows = examples()
    found = distiller(temperature=temperature)(student(), collated(rows)).loss.item()
    assert found == pytest.approx(by_hand(rows, temperature), rel=1e-6)
    assert distiller(weight=1.5, temperature=temperature)(student(), collated(rows)).loss.item() == pytest.approx(
        1.5 * found, rel=1e-6
    )


@pytest.mark.parametrize("starts", [(False, True), (True, False), (True, True), (False, False)])
def test_whole_texts_are_paired_whichever_tokenizer_adds_a_start_token(starts: tuple[bool, bool]) -> None:
    """The first token is predicted only after a start token; the start token itself is never compared."""
    rng, start, rows = random.Random(5), 2, []
    for length in (5, 3, 4):
        text = [rng.randrange(3, OURS) for _ in range(length)]
        one: Example = {}
        for prefix, has_start in zip(("", "teacher_"), starts, strict=True):
            ids = [start] * has_start + text
            one |= {f"{prefix}input_ids": ids, f"{prefix}labels": ids}
        rows.append(one)
    ours, theirs = (LLAMA.make(seed, bos_token_id=start).double() for seed in (1, 2))
    found = Distiller(ours, theirs, alpha=None, objectives=UniversalLogitMatch())(ours, collated(rows)).loss.item()
    expected = []
    for one in rows:
        texts = [torch.tensor([one[f"{prefix}input_ids"]]) for prefix in ("", "teacher_")]
        with torch.no_grad():
            q, p = (model(input_ids=ids).logits[0].tolist() for model, ids in zip((ours, theirs), texts, strict=True))
        if starts != (True, True):  # one model has no input from which to predict the first token
            q, p = q[int(starts[0]) :], p[int(starts[1]) :]
        expected += [slow(a, b) for a, b in zip(q[:-1], p[:-1], strict=True)]
    assert found == pytest.approx(sum(expected) / len(expected), rel=1e-6)


def test_it_trains_together_with_labels() -> None:
    batch, ours = collated(examples()), distiller(alpha=0, weight=1.5)
    found = ours(student(), batch)
    assert found.loss.item() == pytest.approx(found.terms["labels"].item() + 1.5 * by_hand(examples()), rel=1e-6)
    inputs = {name: value for name, value in batch.items() if not name.startswith("teacher_")}
    assert found.terms["labels"].item() == pytest.approx(student()(**inputs).loss.item())


def test_equal_models_with_equal_inputs_give_zero() -> None:
    """L1."""
    batch = LLAMA.collate(LLAMA.examples())
    loss, gradient = step(distiller(LLAMA.make(1).double()), student(), [batch])
    assert loss == 0 and gradient.abs().max() == 0
    assert step(distiller(LLAMA.make(2).double()), student(), [batch])[0] > 0.01


def test_batches_without_answers_give_zero_loss_and_gradient() -> None:
    """L2."""
    for name in ("labels", "teacher_labels"):
        batch = collated(examples())
        batch[name] = torch.full_like(batch[name], -100)
        loss, gradient = step(distiller(), student(), [batch])
        assert loss == 0 and gradient.abs().max() == 0


def test_padding_and_prompts_change_nothing() -> None:
    """L3."""
    rows = examples()
    expected = step(distiller(), student(), [collated(rows)])
    found = step(distiller(), student(), [collated(rows, more=3)])
    assert found[0] == pytest.approx(expected[0], rel=1e-6) and difference(found[1], expected[1]) < 1e-6


def test_the_gradient_does_not_shrink_at_high_temperatures() -> None:
    """L5, for logits much smaller than T. (With unequal vocabularies the limit is 0: 1 / 40 > 1 / 50 everywhere.)"""
    batch, found = LLAMA.collate(LLAMA.examples()), []
    for temperature in (1e3, 1e4):
        found.append(step(distiller(LLAMA.make(2).double(), temperature=temperature), student(), [batch])[1])
    assert difference(found[1], found[0]) < 0.02 and found[0].norm() > 1e-3


def test_a_large_batch_equals_its_micro_batches() -> None:
    """L4, with a different number of pairs in each."""
    rows, ours = examples(), distiller(alpha=0)
    expected = step(ours, student(), [collated(rows)])
    assert gradient_of(student()).norm() > 0.1
    for cut in (1, 3):
        micro_batches = [collated(rows[start : start + cut]) for start in range(0, len(rows), cut)]
        found = step(ours, student(), micro_batches)
        assert found[0] == pytest.approx(expected[0], rel=1e-6) and difference(found[1], expected[1]) < 1e-6


def test_padded_columns_of_a_head_change_nothing() -> None:
    """L7: columns beyond the tokenizer's ids are excluded."""
    found = []
    for padding in (0, 6):
        taught_by = ModelTeacher(teacher(padding), processing_class=tokenizer({f"t{i}": i for i in range(THEIRS)}))
        ours = Distiller(
            student(), taught_by, alpha=None, objectives=UniversalLogitMatch(), processing_class=tokenizer(OURS)
        )
        found.append(step(ours, student(), [collated(examples())]))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-12)
    assert difference(found[1][1], found[0][1]) < 1e-9


def test_encoder_decoders_with_teacher_inputs() -> None:
    """Each decoder reads its own answer; the teacher's inputs are passed, as its rule for them differs."""
    t5, rng = HEADS["t5_seq2seq"], random.Random(5)
    models = {"": t5.make(1).double(), "teacher_": t5.make(2, vocab_size=THEIRS).double()}
    batch: dict[str, Any] = {}
    sides = []
    for prefix, model in models.items():
        sources = [[rng.randrange(3, OURS) for _ in range(4)] for _ in range(3)]
        answers = [[rng.randrange(3, OURS) for _ in range(rng.randint(1, 5))] for _ in range(3)]
        batch[f"{prefix}input_ids"] = torch.tensor(sources)
        labels = [torch.tensor(one) for one in answers]
        batch[f"{prefix}labels"] = pad_sequence(labels, batch_first=True, padding_value=-100)
        with torch.no_grad():
            pairs = zip(sources, answers, strict=True)
            read = [model(input_ids=torch.tensor([one]), labels=torch.tensor([other])) for one, other in pairs]
        sides.append([outputs.logits[0].tolist() for outputs in read])
    expected = [slow(q, p) for ours, theirs in zip(*sides, strict=True) for q, p in zip(ours, theirs, strict=False)]
    one = Distiller(models[""], models["teacher_"], alpha=None, objectives=UniversalLogitMatch())
    with pytest.raises(DataError, match="needs its own teacher_labels and teacher_decoder_input_ids"):
        one(models[""], batch)
    batch["teacher_decoder_input_ids"] = decoder_inputs(batch["teacher_labels"], models["teacher_"])
    assert one(models[""], batch).loss.item() == pytest.approx(sum(expected) / len(expected), rel=1e-6)


def raw_texts() -> tuple[list[dict[str, Any]], list[Example]]:
    """Return texts whose words have different ids in the two tokenizers, and the expected examples."""
    raw, made = [], []
    for prompt, answer in (("w3 w4 w5", "w6 w7"), ("w8", "w9 w10 w11"), ("w12 w13", "w14")):
        ours, theirs = ([int(word[1:]) for word in part.split()] for part in (prompt, answer))
        one = {"input_ids": ours + theirs, "labels": [-100] * len(ours) + theirs}
        raw.append({**one, "teacher_text": f"{prompt} {answer}", "teacher_prompt": prompt + " " * (len(raw) % 2)})
        other = {f"teacher_{name}": [v if v == -100 else THEIRS - v for v in value] for name, value in one.items()}
        made.append({**one, **other})
    return raw, made


def test_raw_texts_are_tokenized_for_both_models_in_the_trainer(tmp_path) -> None:
    """The teacher's tokenizer reads `teacher_text`; or its ids and labels are in the dataset."""
    raw, made = raw_texts()
    processor = tokenizer({f"w{i}": THEIRS - i for i in range(1, THEIRS)} | {"[PAD]": 0}, padding="[PAD]")
    expected = by_hand(made)
    for rows in (raw, made):
        data = Dataset.from_list([{**row, "not_read": "x"} for row in rows])
        trainer = make(
            tmp_path, LLAMA.make(1).double(), teacher(), teacher_processing_class=processor, train_dataset=data,
            processing_class=tokenizer(OURS), data_collator=DataCollatorForSeq2Seq(tokenizer(OURS)),
            objectives=UniversalLogitMatch(weight=2.0), alpha=0.0, max_steps=1, logging_steps=1,
            per_device_train_batch_size=2, gradient_accumulation_steps=2,
        )  # fmt: skip
        trainer.train()
        logged = trainer.state.log_history[0]
        assert logged["loss/universal_logit"] == pytest.approx(expected, rel=1e-5)
        assert logged["loss"] == pytest.approx(logged["loss/labels"] + 2 * expected, rel=1e-5)


def test_invalid_combinations_are_rejected(tmp_path) -> None:
    batch = collated(examples())
    unmarked = {name: value for name, value in batch.items() if name != "teacher_labels"}
    with pytest.raises(DataError, match="but the teacher's prompts are not known"):
        distiller()(student(), unmarked)
    packed = {name: value for name, value in batch.items() if name != "attention_mask"}
    packed["position_ids"] = torch.arange(packed["input_ids"].shape[1])[None].expand_as(packed["input_ids"])
    with pytest.raises(DataError, match="texts may be packed, so the teacher's cannot be paired"):
        distiller()(student(), packed)
    own = ModelTeacher(teacher(), processing_class=tokenizer({f"t{i}": i for i in range(THEIRS)}))
    with pytest.raises(TeacherError, match="different tokenizers"):  # the logits' term compares token by token
        Distiller(student(), own, processing_class=tokenizer(OURS), objectives=UniversalLogitMatch())
    with pytest.raises(SettingError, match="is for causal_lm and seq2seq, not for masked_lm"):
        head = HEADS["bert_masked_lm"]
        Distiller(head.make(1), head.make(2), alpha=None, objectives=UniversalLogitMatch())
    raw, _ = raw_texts()
    raw[1]["teacher_prompt"] = "another"
    trainer = make(
        tmp_path, LLAMA.make(1), LLAMA.make(2), teacher_processing_class=tokenizer(OURS), train_dataset=raw,
        objectives=UniversalLogitMatch(), args=arguments(tmp_path, alpha=None, remove_unused_columns=False),
        processing_class=tokenizer(OURS), data_collator=DataCollatorForSeq2Seq(tokenizer(OURS)),
    )  # fmt: skip
    with pytest.raises(DataError, match="teacher_text begins with 'w8 w9 w10 w11', its teacher_prompt is 'another'"):
        trainer.train()
