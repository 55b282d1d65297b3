"""Errors in a teacher's forward name the teacher, the batch, the accepted inputs, and a solution."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from hf_distill import DataError, DistillationArguments, Distiller, Ensemble, ModelTeacher, TeacherError
from hf_distill.teachers import Peer
from hf_distill.teachers.cache import TeacherCache
from hf_distill.trainer.collators import TeacherInputsCollator
from tests.heads import HEADS
from tests.tiny_tokenizers import tokenizer
from tests.trainer.tiny import bert, examples, make, padded

SIZE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def vit(size: int = 32, **settings: Any) -> Any:
    return hf.ViTForImageClassification(hf.ViTConfig(image_size=size, patch_size=8, **{**SIZE, **settings}))


def ast(frames: int, bins: int = 16) -> Any:
    strides = {"patch_size": 8, "frequency_stride": 8, "time_stride": 8}
    config = hf.ASTConfig(num_mel_bins=bins, max_length=frames, **strides, **SIZE)
    return hf.ASTForAudioClassification(config)


def wav2vec2() -> Any:
    conv = {"conv_dim": (8,), "conv_kernel": (10,), "conv_stride": (100,)}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    return hf.Wav2Vec2ForSequenceClassification(hf.Wav2Vec2Config(**conv, **positions, **SIZE))


def whisper(mels: int = 8, targets: int = 16, frames: int = 100) -> Any:
    return HEADS["whisper_seq2seq"].model_class(
        hf.WhisperConfig(
            **{
                **HEADS["whisper_seq2seq"].settings, "num_mel_bins": mels, "max_target_positions": targets,
                "max_source_positions": frames // 2,
            }
        )
    )  # fmt: skip


IMAGE = {"pixel_values": torch.zeros(2, 3, 32, 32)}
SPECTROGRAM = {"input_values": torch.zeros(2, 32, 16)}
MEL = {"input_features": torch.zeros(2, 8, 100), "labels": torch.tensor([[5, 6, 7, 8, 9, 2]] * 2)}
CASES: dict[str, tuple[Any, Any, dict[str, Tensor], list[str]]] = {
    "image size": (
        vit, lambda: vit(64), IMAGE,
        ["ViTForImageClassification, on pixel_values [2, 3, 32, 32]", "64 × 64 (config.image_size), not 32 × 32",
         "teacher_image", "its image processor", "teacher_pixel_values"],
    ),
    "channels": (vit, lambda: vit(32, num_channels=1), IMAGE, ["images of 1 channels", "not 3", "teacher_image"]),
    "frames of a spectrogram": (
        lambda: ast(32), lambda: ast(48), SPECTROGRAM,
        ["ASTForAudioClassification, on input_values [2, 32, 16]", "48 frames and 16 mel bins", "not 32 and 16",
         "teacher_audio", "its feature extractor", "teacher_input_values"],
    ),
    "a spectrogram in place of samples": (
        lambda: ast(32), wav2vec2, SPECTROGRAM,
        ["Wav2Vec2ForSequenceClassification", "reads raw samples [batch, time], and was given a spectrogram",
         "teacher_audio"],
    ),
    "samples in place of a spectrogram": (
        wav2vec2, lambda: ast(32), {"input_values": torch.zeros(2, 3200)},
        ["spectrograms [batch, 32, 16], and was given raw samples", "teacher_audio"],
    ),
    "mel bins": (
        whisper, lambda: whisper(12), MEL,
        ["WhisperForConditionalGeneration, on input_features [2, 8, 100], decoder_input_ids [2, 6]",
         "12 mel bins (config.num_mel_bins), not 8", "teacher_audio", "teacher_input_features"],
    ),
    "frames": (whisper, lambda: whisper(frames=120), MEL,
               ["120 frames (twice config.max_source_positions), not 100", "teacher_audio"]),
    "target positions": (
        whisper, lambda: whisper(targets=4), MEL,
        ["decoder reads 4 positions at most (config.max_target_positions), and the labels have 6", "max_length=4"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_inputs_of_the_wrong_shape(case: str) -> None:
    student, teacher, batch, words = CASES[case]
    with pytest.raises(TeacherError, match=r"^the teacher's forward failed") as raised:
        Distiller(student(), teacher(), alpha=1.0).teacher_signals(_prepared(student(), batch))
    for word in [*words, "The error: "]:
        assert word in str(raised.value), (word, str(raised.value))
    assert raised.value.__cause__ is not None


def _prepared(student: Any, batch: dict[str, Tensor]) -> dict[str, Any]:
    return Distiller(student, alpha=0.0).prepare(batch)


def roberta(**settings: Any) -> Any:
    config = hf.RobertaConfig(**{**SIZE, "vocab_size": 23, "type_vocab_size": 1, "pad_token_id": 0,
                                 "max_position_embeddings": 12, "num_labels": 3, **settings})  # fmt: skip
    return hf.RobertaForSequenceClassification(config)


def failing(teacher: Any, batch: dict[str, Tensor]) -> str:
    with pytest.raises(TeacherError) as raised:
        Distiller(bert(), teacher, alpha=1.0).teacher_signals(batch)
    return str(raised.value)


def test_unknown_token_types() -> None:
    batch = padded(examples(4))
    batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    batch["token_type_ids"][2, 1] = 1
    found = failing(roberta(max_position_embeddings=32), batch)
    assert "Example 2 of the batch has token_type_ids up to 1; it knows 1 (config.type_vocab_size)" in found
    assert "Leave token_type_ids out of the dataset" in found and "teacher_text" in found


def test_ids_beyond_the_embeddings() -> None:
    batch = padded(examples(4))
    batch["input_ids"][1, 0] = 22
    assert "Example 1 of the batch has input_ids up to 22; it embeds 20 tokens" in failing(
        ModelTeacher(bert(vocab_size=20, seed=1)),
        {f"teacher_{name}": value for name, value in batch.items()} | {"input_ids": batch["input_ids"]},
    )


@pytest.mark.parametrize(("teacher", "longest"), [(bert, 6), (roberta, 11)], ids=["BERT", "RoBERTa"])
def test_too_many_positions(teacher: Any, longest: int) -> None:
    """RoBERTa's positions start after its padding token: 12 positions with padding token 0 are 11."""
    made = teacher(max_position_embeddings=6 if teacher is bert else 12)
    rows = [{"input_ids": [5, 6]}, {"input_ids": list(range(1, 16))}]
    found = failing(made, padded(rows))
    assert f"It reads {longest} positions at most, and was given 15 (the longest is example 1 of the batch)" in found
    assert f"Truncate the student's texts (max_length={longest})" in found and "teacher_text" in found
    own = {f"teacher_{name}": value for name, value in padded(rows).items()}
    found = failing(made, {**padded([{"input_ids": [5]}] * 2), **own})
    assert f"Set teacher_processing_class.model_max_length = {longest}" in found and "Truncate" not in found


def test_the_suggested_solution_for_long_texts_works(tmp_path) -> None:
    rows = [{**row, "teacher_text": "w5 " * 40} for row in examples(8)]
    teacher, read = bert(seed=1, max_position_embeddings=12), tokenizer(23)
    with pytest.raises(TeacherError, match=r"model_max_length = 12"):
        make(tmp_path, bert(), teacher, train_dataset=rows, teacher_processing_class=read).train()
    read.model_max_length = 12
    make(tmp_path, bert(), teacher, train_dataset=rows, teacher_processing_class=read).train()


def test_an_empty_text() -> None:
    collator = TeacherInputsCollator(padded, tokenizer(23))
    rows = [{**row, "teacher_text": text} for row, text in zip(examples(3), ("w5 w6", "", "w7"), strict=True)]
    with pytest.raises(DataError, match=r"makes no token of example 1 of the batch \(''\).*Leave empty texts out"):
        collator(rows)
    with pytest.raises(DataError, match="makes no token of example 0 of the batch"):
        collator(rows[1:2])


def test_without_padding_token_and_mask_every_position_counts() -> None:
    llama = {**SIZE, "vocab_size": 23, "num_key_value_heads": 2, "num_labels": 3, "pad_token_id": None}
    teacher = hf.LlamaForSequenceClassification(hf.LlamaConfig(**llama))
    batch = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 0]])}
    found = Distiller(bert(), teacher, alpha=1.0).teacher_signals(batch)  # then every position counts as a token
    assert found.predictions().shape == (2, 3)


def test_a_mask_of_the_wrong_length() -> None:
    batch = padded(examples(4))
    batch["attention_mask"] = batch["attention_mask"][:, :-1]
    found = failing(bert(seed=1), batch)
    assert "attention_mask [4, 6] has another shape than input_ids [4, 7]" in found


def test_a_failure_without_a_known_cause() -> None:
    teacher = bert(seed=1)

    def fail(*_: Any) -> None:
        raise KeyError("rope")

    teacher.classifier.register_forward_pre_hook(fail)
    found = failing(teacher, padded(examples(4)))
    assert "BertForSequenceClassification, on input_ids [4, 7], attention_mask [4, 7]" in found
    assert "It was given the student's input_ids. If it reads others, give the dataset a column teacher_text" in found
    assert "KeyError: 'rope'" in found


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("CUDA out of memory.")])
def test_out_of_memory_errors_are_left_to_trainer(tmp_path, error: Exception) -> None:
    """`auto_find_batch_size` recognizes them by class and message."""
    teacher, sizes = bert(seed=1), []

    def fail(_: Any, __: Any, given: dict[str, Any]) -> None:
        sizes.append(len(given["input_ids"]))
        if sizes[-1] > 2:
            raise error

    teacher.register_forward_pre_hook(fail, with_kwargs=True)
    trainer = make(tmp_path, bert(), teacher, auto_find_batch_size=True, max_steps=1, per_device_train_batch_size=8)
    trainer.train()
    assert trainer.state.global_step == 1 and sizes[0] == 8 and sizes[-1] <= 2


def test_the_failing_member_of_an_ensemble_is_named(tmp_path: Path) -> None:
    rows = [{"input_ids": list(range(1, 16))} for _ in range(4)]
    short = bert(seed=1, max_position_embeddings=6)
    assert "teacher 1 of the Ensemble: the teacher's forward failed" in failing(
        Ensemble([bert(seed=2), short]), padded(rows)
    )
    student = bert(dropout=0.0)
    with pytest.raises(TeacherError, match="the teacher's forward failed"):
        labelled = {**padded(rows), "labels": torch.tensor([0, 1, 2, 0])}
        Distiller(student, Peer(short), alpha=0.5)(student, labelled)
    with pytest.raises(TeacherError, match="examples 0 to 3 of the dataset: the teacher's forward failed"):
        TeacherCache.build(short, rows, tmp_path, data_collator=padded, batch_size=4, progress=False)


def test_the_failing_examples_of_a_cache_build_are_named(tmp_path: Path) -> None:
    rows = [{"input_ids": [5, 6, 7]} for _ in range(8)] + [{"input_ids": list(range(1, 16))}] * 2
    with pytest.raises(TeacherError, match="examples 8 to 9 of the dataset: the teacher's forward failed"):
        TeacherCache.build(
            bert(seed=1, max_position_embeddings=6), rows, tmp_path, data_collator=padded, batch_size=4, progress=False
        )


# The columns that a teacher needs.


class CustomInput(nn.Module):
    """A custom class, as in transformers' tests, whose input has an unusual name."""

    def __init__(self) -> None:
        super().__init__()
        self.config = hf.PretrainedConfig(num_labels=3)
        self.layer = nn.Linear(4, 3)

    def forward(self, input_x: Tensor, labels: Any = None) -> dict[str, Tensor]:
        logits = self.layer(input_x)
        return {"logits": logits} | ({} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)})


class DefaultInput(hf.PreTrainedModel):
    """Keeps transformers' default `main_input_name`, input_ids, which its forward does not accept."""

    config_class = hf.PretrainedConfig

    def __init__(self) -> None:
        super().__init__(hf.PretrainedConfig(num_labels=3))
        self.layer = nn.Linear(4, 3)

    forward = CustomInput.forward


@pytest.mark.parametrize("kind", [CustomInput, DefaultInput])
def test_required_columns_follow_the_signature_of_forward(tmp_path, kind: Any) -> None:
    rows = [{"input_x": [0.1 * i, 0.2, 0.3, 0.4], "labels": i % 3} for i in range(8)]
    trainer = make(
        tmp_path, CustomInput(), kind(), train_dataset=rows, data_collator=hf.default_data_collator,
        task="classification", max_steps=1,
    )  # fmt: skip
    trainer.train()
    student = CustomInput()
    distiller = Distiller(student, kind(), task="classification", alpha=1.0)
    own = {"input_x": torch.ones(2, 4), "teacher_input_x": torch.zeros(2, 4)}
    teacher = distiller.teacher
    assert isinstance(teacher, ModelTeacher)
    expected = teacher.model.layer.bias.detach()
    assert torch.equal(distiller.teacher_signals(own).predictions()[0], expected)
    with pytest.raises(DataError, match=r"needs input_x, the batch has \['input_y'\].*teacher_input_x"):
        distiller.teacher_signals({"input_y": torch.ones(2, 4)})


def test_the_error_during_training_names_the_teacher(tmp_path) -> None:
    """In a training with images of another size."""
    rows = [{"pixel_values": torch.zeros(3, 32, 32), "labels": i % 2} for i in range(4)]
    trainer = make(
        tmp_path, vit(32), vit(64), train_dataset=rows, data_collator=hf.default_data_collator,
        args=DistillationArguments(str(tmp_path), report_to="none", disable_tqdm=True, use_cpu=True, max_steps=1),
    )  # fmt: skip
    with pytest.raises(TeacherError, match="64 × 64"):
        trainer.train()
