"""OnPolicy: the student's texts by hand, counts after generation, resume, and errors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType

from hf_distill import DataError, Distiller, SettingError, UniversalLogitMatch
from hf_distill.augment import OnPolicy
from hf_distill.augment.on_policy import prompts_of
from hf_distill.models.generation import set_generation
from hf_distill.trainer.checks import check_on_policy
from tests.augment.making import PrecomputedTeacher
from tests.heads import HEADS
from tests.trainer.tiny import assert_moved, assert_same_bits, make, softened_kl, weights

LLAMA, T5, T = HEADS["llama_causal_lm"], HEADS["t5_seq2seq"], 2.0
NO_TEMPERATURE = 1e-4


def greedy(model: Any, prompt: list[int], new: int, end: int = 2) -> list[int]:
    """Generate greedily, one token at a time, without a cache."""
    written: list[int] = []
    while len(written) < new and end not in written:
        with torch.no_grad():
            written.append(int(model(input_ids=torch.tensor([prompt + written])).logits[0, -1].argmax()))
    return written


def test_the_prompt_ends_before_the_first_predicted_token() -> None:
    batch = {
        "input_ids": torch.tensor([[0, 0, 5, 6, 7], [5, 6, 7, 8, 0], [5, 6, 7, 0, 0], [3, 4, 5, 6, 7]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
        "labels": torch.tensor([[-100, -100, -100, -100, 7], [5, 6, 7, 8, -100], [-100] * 5, [-100, -100, 5, -100, 7]]),
    }
    assert prompts_of(batch) == [[5, 6], [5], [5, 6, 7], [3, 4]]
    assert prompts_of({"input_ids": batch["input_ids"][3:]}) == [[3, 4, 5, 6, 7]]


def test_greedy_texts_equal_those_of_each_prompt_alone() -> None:
    """For padded prompts of different lengths; the student is in training mode with dropout."""
    student = LLAMA.make(1, attention_dropout=0.5).train()
    student.model.norm.eval()  # a module in evaluation mode stays in it
    penalties = {"repetition_penalty": 3.0, "no_repeat_ngram_size": 1}  # these would change its distribution
    set_generation(student.generation_config, dict(**penalties, pad_token_id=5))  # some prompts contain this id
    batch = LLAMA.collate(LLAMA.examples(6), pad_to=13)
    before, modes = torch.get_rng_state(), [module.training for module in student.modules()]
    shown = OnPolicy(student_share=1.0, max_new_tokens=6, sampling_temperature=NO_TEMPERATURE)(batch, student, step=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in student.modules()] == modes
    student.eval()
    lengths = set()
    for i, prompt in enumerate(prompts_of(batch)):
        written = greedy(student, prompt, 6)
        real = shown["attention_mask"][i].bool()
        assert shown["input_ids"][i][real].tolist() == prompt + written
        assert shown["labels"][i][real].tolist() == [-100] * len(prompt) + written
        assert set(shown["labels"][i][~real].tolist()) <= {-100} and real[: len(prompt + written)].all()
        lengths.add(len(prompt + written))
    assert len(lengths) > 1 and sorted(shown) == ["attention_mask", "input_ids", "labels"]


def test_texts_end_at_the_end_token() -> None:
    student = LLAMA.make(1)
    with torch.no_grad():
        student.lm_head.weight[2] += 5 * student.lm_head.weight.std()  # makes the end token likelier
    batch = LLAMA.collate(LLAMA.examples(8))
    shown = OnPolicy(student_share=1.0, max_new_tokens=12, seed=1)(batch, student, step=0)
    texts = [row[row != -100].tolist() for row in shown["labels"]]
    assert all(2 not in text[:-1] for text in texts)
    assert {text[-1] == 2 for text in texts} == {True, False}  # some ended, some were cut off
    assert all(len(text) == 12 or text[-1] == 2 for text in texts)


def test_sampling_uses_all_tokens_and_is_seeded_by_the_key() -> None:
    """Neither transformers' default top 50 nor the student's generation_config limits the tokens."""
    student = LLAMA.make(1, vocab_size=90)
    set_generation(student.generation_config, dict(top_k=3, top_p=0.1, repetition_penalty=9.0))
    batch = {"input_ids": torch.tensor([[5, 6]]).expand(900, 2)}
    hot = OnPolicy(student_share=1.0, max_new_tokens=1, sampling_temperature=1e4)
    drawn = hot(batch, student, step=0)["labels"][:, 2]
    assert len(set(drawn.tolist())) > 85
    plain = OnPolicy(student_share=1.0, max_new_tokens=1)
    drawn = [plain(batch, student, step=step)["labels"][:, 2] for step in range(2)]
    with torch.no_grad():
        expected = student(input_ids=batch["input_ids"][:1]).logits[0, -1].softmax(-1)
    frequencies = torch.bincount(torch.cat(drawn), minlength=90) / 1800
    # Half the L1 distance of 1800 draws to their distribution is about sqrt(v / (2 pi n)) = 0.09.
    assert 0.5 * (frequencies - expected).abs().sum() < 0.14
    assert not torch.equal(*drawn)
    assert torch.equal(plain(batch, student, step=1)["labels"][:, 2], drawn[1])
    assert not torch.equal(plain(batch, student, step=1, process=1)["labels"][:, 2], drawn[1])


def test_student_share_continues_a_share_of_the_batches() -> None:
    views = {student_share: OnPolicy(student_share=student_share) for student_share in (0.0, 0.3, 1.0)}
    found = {student_share: [view.continues(step) for step in range(1000)] for student_share, view in views.items()}
    assert not any(found[0.0]) and all(found[1.0]) and 250 < sum(found[0.3]) < 350
    assert found[0.3] != [OnPolicy(student_share=0.3, seed=1).continues(step) for step in range(1000)]
    rising = OnPolicy(student_share=lambda progress: progress)
    assert not rising.continues(0, progress=0.0) and rising.continues(0, progress=1.0)
    batch = LLAMA.collate(LLAMA.examples(2))
    assert views[0.0](batch, LLAMA.make(1), step=0) is batch


def test_an_encoder_decoder_generates_the_whole_answer() -> None:
    student, batch = T5.make(1), T5.collate(T5.examples(4))
    shown = OnPolicy(student_share=1.0, max_new_tokens=5, sampling_temperature=NO_TEMPERATURE)(batch, student, step=0)
    for i, labels in enumerate(shown["labels"]):
        written: list[int] = []
        while len(written) < 5 and 2 not in written:
            inputs = {name: batch[name][i : i + 1] for name in ("input_ids", "attention_mask")}
            with torch.no_grad():
                logits = student(**inputs, decoder_input_ids=torch.tensor([[0, *written]])).logits
            written.append(int(logits[0, -1].argmax()))
        assert labels[labels != -100].tolist() == written
    assert torch.equal(shown["input_ids"], batch["input_ids"])


def train(folder: Any, student: Any, view: Any, *, steps: int = 1, **changed: Any) -> Any:
    trainer = make(
        folder, student, LLAMA.make(2), on_policy=view, train_dataset=LLAMA.examples(24), data_collator=LLAMA.collate,
        alpha=1.0, temperature=T, max_steps=steps, logging_steps=1, per_device_train_batch_size=2,
        gradient_accumulation_steps=4, train_sampling_strategy="sequential", **changed,
    )  # fmt: skip
    return trainer


def test_the_loss_is_the_mean_over_generated_tokens(tmp_path) -> None:
    """Some micro-batches are continued, others not; the denominator counts the batches that both models see."""
    student, teacher, view = LLAMA.make(1), LLAMA.make(2), OnPolicy(student_share=0.5, max_new_tokens=7)
    assert {view.continues(0, place) for place in range(4)} == {True, False}
    found = []
    for place in range(4):
        batch = view(LLAMA.collate(LLAMA.examples(24)[2 * place : 2 * place + 2]), student, step=0, micro_batch=place)
        for ids, mask, labels in zip(*(batch[n] for n in ("input_ids", "attention_mask", "labels")), strict=True):
            counted = labels[mask.bool()][1:] != -100
            with torch.no_grad():
                ours, theirs = (m(input_ids=ids[mask.bool()][None]).logits[0, :-1][counted] for m in (student, teacher))
            found.append(softened_kl(ours, theirs, T))
    trainer = train(tmp_path, student, view)
    start = weights(student)
    trainer.train()
    assert trainer.state.log_history[0]["loss/logits"] == pytest.approx(torch.cat(found).mean().item(), rel=1e-4)
    assert_moved(weights(student), start)


def test_each_batch_has_its_own_key(tmp_path) -> None:
    class RecordingOnPolicy(OnPolicy):
        def __call__(self, batch: Any, student: Any, **key: Any) -> Any:
            keys.append(tuple(key[name] for name in ("step", "micro_batch", "process", "progress")))
            return super().__call__(batch, student, **key)

    keys: list[Any] = []
    trainer = train(tmp_path, LLAMA.make(1), RecordingOnPolicy(student_share=0.5, max_new_tokens=2), steps=2)
    trainer.train()
    assert keys == [(step, place, 0, step / 2) for step in (0, 1) for place in range(4)]
    trainer.create_model_card()
    assert (
        "OnPolicy(student_share=0.5, max_new_tokens=2, sampling_temperature=1, seed=0)"
        in (tmp_path / "out" / "README.md").read_text()
    )


def test_a_resumed_run_equals_the_uninterrupted_run(tmp_path) -> None:
    start, settings = LLAMA.make(1), {"save_strategy": "steps", "save_steps": 1, "steps": 3}
    whole = copy.deepcopy(start)
    train(tmp_path, whole, OnPolicy(student_share=0.7, max_new_tokens=4), **settings).train()
    resumed = train(tmp_path, copy.deepcopy(start), OnPolicy(student_share=0.7, max_new_tokens=4), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    assert_same_bits(weights(resumed.model), weights(whole))


def test_incompatible_trainings_raise(tmp_path, monkeypatch) -> None:
    student, batch, always = (
        LLAMA.make(1),
        LLAMA.collate(LLAMA.examples(2)),
        OnPolicy(student_share=1.0, max_new_tokens=4),
    )
    with pytest.raises(SettingError, match=r"student_share=1.5. It is a share of the batches, in \[0, 1\]"):
        OnPolicy(student_share=1.5)
    for settings in ({"alpha": 0.5}, {"alpha": 0.0, "objectives": UniversalLogitMatch()}):
        with pytest.raises(SettingError, match="batches that the student continued have no gold labels"):
            make(tmp_path, LLAMA.make(1), LLAMA.make(2), on_policy=always, **settings)
    for name, message in (
        ("bert_single_label", "trained for classification"),
        ("whisper_seq2seq", "for sound or images"),
    ):
        with pytest.raises(SettingError, match=message):
            make(tmp_path, HEADS[name].make(1), HEADS[name].make(2), on_policy=always, alpha=1.0, train_dataset=None)
    trainer = make(tmp_path, LLAMA.make(1), LLAMA.make(2), on_policy=always, alpha=1.0)
    trainer._on_policy_checked = None
    with monkeypatch.context() as sharded:
        sharded.setattr(type(trainer.accelerator), "distributed_type", DistributedType.FSDP)
        with pytest.raises(SettingError, match="with FSDP no process holds all of it"):
            check_on_policy(trainer)
    trainer.distiller.teacher.__class__ = PrecomputedTeacher
    with pytest.raises(SettingError, match="a cached teacher has no answers for them"):
        check_on_policy(trainer)
    with pytest.raises(SettingError, match=r"max_new_tokens=0 \(1 or more\)"):
        make(tmp_path, LLAMA.make(1), LLAMA.make(2), on_policy=OnPolicy(max_new_tokens=0), alpha=1.0)
    with pytest.raises(DataError, match="11 tokens and max_new_tokens=30 are more than the 32 positions"):
        OnPolicy(student_share=1.0, max_new_tokens=30)({"input_ids": torch.ones(1, 11, dtype=int)}, student, step=0)
    taught = "the teacher has columns of its own"
    for name, message in (("position_ids", "packed"), ("teacher_input_ids", taught), ("x", "'x'")):
        with pytest.raises(DataError, match=message):
            always({**batch, name: batch["input_ids"]}, student, step=0)
    with pytest.raises(DataError, match="an empty prompt"):
        always({**batch, "attention_mask": torch.zeros_like(batch["attention_mask"])}, student, step=0)


def test_on_policy_in_a_custom_loop() -> None:
    student, view = LLAMA.make(1), OnPolicy(student_share=1.0, max_new_tokens=4)
    distiller = Distiller(student, LLAMA.make(2), alpha=1.0, divergence="reverse_kl")
    batch = view(LLAMA.collate(LLAMA.examples(2)), student, step=0)
    counts = distiller.begin_step([batch])
    assert counts.denominators["logits"] == (batch["labels"] != -100).sum()
    assert distiller(student, batch, counts).loss.item() > 0.01
