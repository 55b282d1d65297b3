"""Rows over a vocabulary, by hand: masked, causal (shifted), and decoder inputs equal to those of the models."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from torch.nn import functional as F

from hf_distill import DataError, Distiller, TeacherError
from hf_distill.tasks import CausalLM, MaskedLM, Seq2Seq
from hf_distill.tasks.language import decoder_inputs
from tests.heads import HEADS

SEQ2SEQ = [name for name, head in HEADS.items() if head.kind == "seq2seq"]
IDS = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])


def test_masked_lm_keeps_masked_or_all_attended_positions() -> None:
    task = MaskedLM()
    labels = torch.tensor([[-100, 6, -100, -100], [5, -100, -100, -100]])
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": labels}
    assert task.kept_rows(batch).tolist() == [1, 4]
    assert (task.rows(batch), task.count(batch), task.label_count(batch)) == (8, 2, 2)
    assert task.targets(batch)[[1, 4]].tolist() == [6, 5]
    del batch["labels"]
    assert task.kept_rows(batch).tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert task.targets(batch) is None


CAUSAL = {
    "input_ids": IDS,
    "attention_mask": MASK,
    "labels": torch.tensor([[-100, -100, 7, 8], [5, 6, 7, -100]]),
}


def test_causal_lm_shifts_labels_by_one() -> None:
    task, logits = CausalLM(), torch.randn(2, 4, 9)
    rows = task.select(logits, CAUSAL)
    assert torch.equal(rows, logits[:, :-1].reshape(6, 9))
    # position 1 predicts token 2 and position 2 token 3; label 0 of the second example has no position before it
    assert task.kept_rows(CAUSAL).tolist() == [1, 2, 3, 4]
    assert task.targets(CAUSAL)[[1, 2, 3, 4]].tolist() == [7, 8, 6, 7]
    assert (task.rows(CAUSAL), task.count(CAUSAL), task.label_count(CAUSAL)) == (6, 4, 4)


def test_causal_lm_rows_match_those_of_the_models_loss() -> None:
    """The cross-entropy over the kept rows equals the loss that the model returns."""
    for name in ("gpt2_causal_lm", "llama_causal_lm"):
        model, batch, task = HEADS[name].make(), HEADS[name].batch(), CausalLM()
        with torch.no_grad():
            outputs = model(**batch)
        rows = task.select(outputs.logits, batch)[task.kept_rows(batch)]
        ours = F.cross_entropy(rows, task.targets(batch)[task.kept_rows(batch)])
        assert ours.item() == pytest.approx(outputs.loss.item(), rel=1e-6)


def test_causal_lm_does_not_shift_shift_labels() -> None:
    task, logits = CausalLM(), torch.randn(2, 4, 9)
    shifted = torch.tensor([[-100, 7, 8, -100], [6, 7, -100, 5]])
    batch = {**CAUSAL, "shift_labels": shifted}
    assert torch.equal(task.select(logits, batch), logits.reshape(8, 9))
    assert task.kept_rows(batch).tolist() == [1, 2, 4, 5, 7]
    assert task.label_count(batch) == 5
    assert task.has_labels({"shift_labels": shifted})


@pytest.mark.parametrize("side", ["right", "left"])
def test_causal_lm_without_labels_keeps_attended_positions(side: str) -> None:
    mask = MASK if side == "right" else MASK.flip(-1)
    kept = CausalLM().keep({"input_ids": IDS, "attention_mask": mask}).view(2, 3).tolist()
    # A row counts if its own position and the predicted token are attended: padding predicts nothing.
    assert kept == ([[1, 1, 1], [1, 1, 0]] if side == "right" else [[1, 1, 1], [0, 1, 1]])


def test_a_row_on_left_padding_counts_only_in_the_labels_term() -> None:
    """In transformers' loss the last padding position predicts the first real token. The teacher has attended to
    nothing at that position, so the row is not distilled."""
    ids = torch.tensor([[0, 0, 5, 6, 7], [9, 8, 5, 6, 7]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    task, model = CausalLM(), HEADS["llama_causal_lm"].make()
    assert task.kept_rows(batch).tolist() == [2, 3, 4, 5, 6, 7]
    assert (task.count(batch), task.label_count(batch)) == (6, 7)
    with torch.no_grad():
        outputs = model(**batch)
    rows, targets = task.select(outputs.logits, batch), task.targets(batch)
    ours = F.cross_entropy(rows, targets)  # over the 7 rows that the model's loss counts
    assert ours.item() == pytest.approx(outputs.loss.item(), rel=1e-6)


def test_an_error_names_the_batch_without_labels_and_inputs() -> None:
    with pytest.raises(DataError, match=r"neither labels nor attention_mask nor input_ids.*only \['other'\]"):
        CausalLM().keep({"other": IDS})


def test_seq2seq_labels_are_not_shifted() -> None:
    task, logits = Seq2Seq(), torch.randn(2, 3, 9)
    batch = {"input_ids": IDS, "labels": torch.tensor([[5, 6, 2], [7, 2, -100]])}
    assert torch.equal(task.select(logits, batch), logits.reshape(6, 9))
    assert task.kept_rows(batch).tolist() == [0, 1, 2, 3, 4]
    assert (task.count(batch), task.label_count(batch)) == (5, 5)
    given = {"input_ids": IDS, "decoder_input_ids": IDS, "decoder_attention_mask": MASK}
    assert task.kept_rows(given).tolist() == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_decoder_inputs_equal_those_that_the_model_derives(name: str) -> None:
    """With our decoder inputs the model's output equals, bit for bit, its output from the labels alone."""
    model, batch = HEADS[name].make().eval(), HEADS[name].batch()
    assert (batch["labels"] == -100).any()
    ours = Seq2Seq().prepare(dict(batch), model)
    assert ours["decoder_input_ids"][:, 0].unique().tolist() == [model.config.decoder_start_token_id]
    assert not (ours["decoder_input_ids"] == -100).any()
    with torch.no_grad():
        derived, given = model(**batch), model(**ours)
    assert torch.equal(given.logits, derived.logits)
    assert torch.equal(given.loss, derived.loss)
    assert (batch["labels"] == -100).any()  # the labels are not modified


def test_existing_decoder_inputs_are_kept() -> None:
    batch = {"labels": IDS, "decoder_input_ids": IDS}
    assert Seq2Seq().prepare(batch, None) is batch


@pytest.mark.parametrize("method", ["prepare", "keep"])
def test_a_decoder_needs_labels_or_decoder_inputs(method: str) -> None:
    """At alpha=1 too; the error suggests labels."""
    task, batch = Seq2Seq(), {"input_features": torch.ones(1, 2, 3)}
    with pytest.raises(
        DataError,
        match=r"neither labels nor decoder_input_ids, only \['input_features'\].* teacher generate them: .*generate_",
    ):
        task.prepare(batch, None) if method == "prepare" else task.keep(batch)


def long_texts(name: str, *lengths: int) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """Return a student with 16 decoder positions, and a batch of texts of these lengths."""
    positions = {"whisper_seq2seq": "max_target_positions"}.get(name, "max_position_embeddings")
    student = HEADS[name].make(1, **({} if name == "t5_seq2seq" else {positions: 16}))
    inputs = {key: value for key, value in HEADS[name].batch(len(lengths)).items() if key != "labels"}
    labels = torch.full((len(lengths), max(lengths)), -100)
    for row, length in enumerate(lengths):
        labels[row, :length] = 5
    return student, {**inputs, "labels": labels}


@pytest.mark.parametrize("name", ["whisper_seq2seq", "bart_seq2seq", "marian_seq2seq"])
def test_texts_longer_than_the_decoder_raise(name: str) -> None:
    """16 positions hold 16 tokens but not 17, as in the model's own forward."""
    student, batch = long_texts(name, 10, 17, 20, 3, 18, 19)
    with pytest.raises(DataError) as raised:
        Seq2Seq().prepare(batch, student)
    assert (
        f"padded to 20 tokens, and the decoder of {type(student).__name__} has 16 positions: example 1 of the batch "
        "has 17, example 2 of the batch has 20, example 4 of the batch has 18, and 1 more are too long. Cut them "
        "(tokenizer(..., truncation=True, max_length=16)) or leave such examples out."
    ) in str(raised.value)
    with pytest.raises((ValueError, IndexError)):
        student(**batch)
    student, batch = long_texts(name, 16, 3)
    assert student(**Seq2Seq().prepare(batch, student)).loss.isfinite()


def test_a_decoder_without_a_position_table_has_no_limit() -> None:
    student, batch = long_texts("t5_seq2seq", 90, 3)
    assert student(**Seq2Seq().prepare(batch, student)).loss.isfinite()
    grows = hf.M2M100ForConditionalGeneration(hf.M2M100Config(
        vocab_size=40, d_model=8, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=8, decoder_ffn_dim=8,
        encoder_attention_heads=1, decoder_attention_heads=1, max_position_embeddings=16,
    ))  # fmt: skip
    assert grows(**Seq2Seq().prepare(batch, grows)).loss.isfinite()


def test_a_config_without_a_start_token_raises() -> None:
    student = SimpleNamespace(config=SimpleNamespace(decoder_start_token_id=None, pad_token_id=0))
    with pytest.raises(DataError, match="no decoder_start_token_id or no pad_token_id"):
        decoder_inputs(IDS, student)


def test_each_decoder_uses_its_own_start_token() -> None:
    head = HEADS["bart_seq2seq"]
    student, teacher = head.make(1), head.make(2, decoder_start_token_id=1)
    ours, theirs = [], []
    student.register_forward_pre_hook(lambda _, args, inputs: ours.append(inputs), with_kwargs=True)
    teacher.register_forward_pre_hook(lambda _, args, inputs: theirs.append(inputs), with_kwargs=True)
    Distiller(student, teacher)(student, head.batch(2))
    assert ours[0]["decoder_input_ids"][:, 0].tolist() == [2, 2]
    assert theirs[0]["decoder_input_ids"][:, 0].tolist() == [1, 1]
    assert "labels" not in theirs[0]


def test_labels_are_not_modified_by_a_model_that_writes_into_them() -> None:
    """FSMT replaces ignored labels by its padding token, in place."""
    config = hf.FSMTConfig(
        langs=["a", "b"], src_vocab_size=20, tgt_vocab_size=20, d_model=16, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, pad_token_id=1,
        bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    labels = torch.tensor([[5, 6, 2, -100], [7, 2, -100, -100]])
    made = decoder_inputs(labels, hf.FSMTForConditionalGeneration(config))
    assert made.tolist() == [[2, 5, 6, 2], [2, 7, 2, 1]]
    assert labels.tolist() == [[5, 6, 2, -100], [7, 2, -100, -100]]


@pytest.mark.parametrize(
    ("student", "teacher", "by_texts"),
    [
        ("wav2vec2_ctc_mean", "whisper_seq2seq", True),
        ("t5_seq2seq", "llama_causal_lm", True),
        ("llama_causal_lm", "bert_masked_lm", False),
        ("bert_masked_lm", "llama_causal_lm", False),
    ],
)
def test_an_incompatible_teacher_head_suggests_completions_if_it_can_generate(
    student: str, teacher: str, by_texts: bool
) -> None:
    with pytest.raises(TeacherError, match="Fine-tune a teacher with the student's kind of head") as raised:
        Distiller(HEADS[student].make(1), HEADS[teacher].make(2))
    assert ("or train on this teacher's own texts: hf_distill.generate_completions" in str(raised.value)) is by_texts
