"""Completions as labels of speech and translation models: language, task, timestamps and end token.

The expected labels are generated token by token, for one recording at a time, without padding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers as tf
from torch import Tensor
from transformers.generation.logits_process import WhisperTimeStampLogitsProcessor

from hf_distill import DataError, SettingError, generate_completions
from tests.tiny_tokenizers import tokenizer as words
from tests.tiny_whisper import START, TIMES, ids_of, sounds, tokenizer, whisper
from tests.trainer.tiny import make

END, WORDS = 256, tokenizer()
SOUNDS = sounds(4)
DATA = datasets.Dataset.from_dict({"input_features": SOUNDS.tolist()})
Ids = list[int]


def by_hand(model: Any, inputs: dict[str, Tensor], begin: Ids, new: int, end: int = END) -> Ids:
    """Generate the likeliest tokens, one at a time."""
    written: Ids = []
    while len(written) < new and end not in written:
        with torch.no_grad():
            logits = model.eval()(**inputs, decoder_input_ids=torch.tensor([[*begin, *written]])).logits
        written.append(int(logits[0, -1].argmax()))
    return written


def written(teacher: Any, folder: Path, new: int = 4, **settings: Any) -> datasets.Dataset:
    return generate_completions(teacher, DATA, folder, processing_class=WORDS, max_new_tokens=new, **settings)


@pytest.mark.parametrize(
    ("generation", "begin"),
    [
        ({"language": "<|de|>", "task": "translate"}, ["<|de|>", "<|translate|>", "<|notimestamps|>"]),
        ({"language": "english"}, ["<|en|>", "<|transcribe|>", "<|notimestamps|>"]),
        ({"task": "transcribe"}, [None, "<|transcribe|>", "<|notimestamps|>"]),
        ({}, [None, "<|notimestamps|>"]),
        ({"prompt_ids": torch.tensor([70, 71]), "language": "de"}, ["<|de|>", "<|transcribe|>", "<|notimestamps|>"]),
    ],
    ids=["german, translated", "english", "detected, transcribed", "detected", "after a prompt"],
)
@pytest.mark.parametrize(("seed", "new"), [(1, 2), (6, 8), (11, 35)])
def test_labels_of_a_whisper_equal_its_generated_tokens(
    tmp_path: Path, generation: dict[str, Any], begin: list[str | None], seed: int, new: int
) -> None:
    """Language and task as set or detected; an end token only where it was generated."""
    teacher = whisper(seed)
    made = written(teacher, tmp_path / "made", new, generation=generation)
    assert made.column_names == ["index", "labels", "completion", "finished"]
    for sound, row in zip(SOUNDS, made, strict=True):
        inputs = {"input_features": sound[None]}
        first = ids_of(*(name or detected(teacher, inputs) for name in begin))
        prompt = [int(token) for token in generation.get("prompt_ids", [])]
        text = by_hand(teacher, inputs, [*prompt, *ids_of(START), *first], new)
        assert row["labels"] == first + text
        assert row["finished"] == (text[-1] == END)
        assert row["completion"] == "".join(WORDS.decode([one for one in text if one < END]))


def detected(teacher: Any, inputs: dict[str, Tensor]) -> str:
    """Return the likelier of the two languages."""
    with torch.no_grad():
        logits = teacher(**inputs, decoder_input_ids=torch.tensor([ids_of(START)])).logits[0, -1]
    return max("<|en|>", "<|de|>", key=lambda name: logits[ids_of(name)[0]].item())


def test_the_cases_include_both_languages_and_both_endings(tmp_path: Path) -> None:
    """Otherwise the test above could pass by chance."""
    languages = {labels[0] for labels in written(whisper(1), tmp_path / "1", 2)["labels"]}
    assert languages == set(ids_of("<|en|>", "<|de|>"))
    german = {"language": "<|de|>", "task": "translate"}
    assert set(written(whisper(6), tmp_path / "2", 8, generation=german)["finished"]) == {True, False}


def test_timestamps_are_in_the_labels_but_not_in_the_text(tmp_path: Path) -> None:
    teacher, first = whisper(6), ids_of("<|de|>", "<|transcribe|>")
    made = written(teacher, tmp_path / "made", 12, generation={"return_timestamps": True, "language": "german"})
    for sound, row in zip(SOUNDS, made, strict=True):
        settings = tf.GenerationConfig(max_new_tokens=12, eos_token_id=END, pad_token_id=END, **{
            "no_timestamps_token_id": ids_of("<|notimestamps|>")[0], "max_initial_timestamp_index": 50
        })  # fmt: skip
        begin = torch.tensor([[*ids_of(START), *first]])
        expected = tf.GenerationMixin.generate(
            teacher, sound[None], generation_config=settings, decoder_input_ids=begin,
            logits_processor=[WhisperTimeStampLogitsProcessor(settings, begin_index=3)],
        )  # fmt: skip
        assert row["labels"] == first + expected[0, 3:].tolist()
        assert row["labels"][2] in ids_of(*TIMES) and "<|" not in row["completion"]


def test_whisper_settings_are_followed_and_can_be_undone(tmp_path: Path) -> None:
    teacher = whisper(1, language="german", task="translate", logprob_threshold=-1.0, no_speech_threshold=0.6)
    assert {tuple(row["labels"][:2]) for row in written(teacher, tmp_path / "1")} == {
        tuple(ids_of("<|de|>", "<|translate|>"))
    }
    undone = written(teacher, tmp_path / "2", generation={"language": None, "task": None})
    assert undone["labels"] == written(whisper(1), tmp_path / "3")["labels"]
    forced = whisper(1, forced_decoder_ids=[[1, None], [2, ids_of("<|transcribe|>")[0]]])  # of older checkpoints
    old = written(forced, tmp_path / "4")
    assert old["labels"] == written(whisper(1), tmp_path / "5", generation={"task": "transcribe"})["labels"]


def test_a_whisper_samples_if_requested(tmp_path: Path) -> None:
    """Its own `generate` is greedy unless a temperature is passed separately."""
    several = {"do_sample": True, "num_return_sequences": 30, "new": 1}
    hot = written(whisper(1, num_beams=2), tmp_path / "1", **several, sampling_temperature=1e4)
    assert hot["index"][:] == [i for i in range(4) for _ in range(30)]
    assert len({row["labels"][-1] for row in hot}) > 60  # out of 315
    cold = written(whisper(1), tmp_path / "2", **several, sampling_temperature=1e-4)
    likeliest = written(whisper(1), tmp_path / "3", new=1)
    assert cold["labels"][::30] == likeliest["labels"][:]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"language": "klingon"}, "generate refuses these settings: Unsupported language: klingon"),
        ({"task": "sing"}, "The `sing` task is not supported"),
        ({"language": ["de", "en", "de", "en"]}, "language: give one for all recordings"),
        ({"return_segments": True}, "return_segments cannot be given: each window of sound is written once"),
        ({"logprob_threshold": -1.0}, "logprob_threshold cannot be given"),
        ({"temperature": (0.0, 0.2)}, r"temperature=\(0.0, 0.2\) without sampling changes nothing"),
        ({"num_beams": 2, "num_return_sequences": 2}, "of the likeliest text are the same text. Pass do_sample=True.$"),
        ({"num_beams": 2, "do_sample": True}, "num_beams=2: WhisperForConditionalGeneration samples without beams"),
        ({"max_new_tokens": 46, "language": "de"}, "generate refuses these settings: The length of `decoder_input_ids"),
        ({"no_such": 1}, "generate has no setting no_such"),
    ],
)
def test_invalid_settings_raise_before_anything_is_written(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    """46 tokens plus the four that begin a text exceed 48 positions."""
    with pytest.raises(SettingError, match=message):
        written(whisper(), tmp_path / "made", generation=settings)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("own", "message"),
    [({"is_multilingual": False}, "says is_multilingual=False"), ({"lang_to_id": None}, "has no lang_to_id")],
)
def test_a_language_without_a_token_raises(tmp_path: Path, own: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=f"language='de': the generation_config of this Whisper.* {message}"):
        written(whisper(**own), tmp_path / "made", generation={"language": "de"})


def test_invalid_recordings_raise(tmp_path: Path) -> None:
    long = datasets.Dataset.from_dict({"input_features": [torch.ones(8, 100).tolist(), torch.ones(8, 104).tolist()]})
    with pytest.raises(DataError, match=r"input_features\[1\]: 104 frames, more than the 100 that the model reads at"):
        generate_completions(whisper(), long, tmp_path / "made", max_new_tokens=4)
    flat = datasets.Dataset.from_dict({"input_features": [[0.5, 0.5]]})
    with pytest.raises(DataError, match=r"input_features\[0\]: features of shape \[2\] instead of \[mel, time\]"):
        generate_completions(whisper(), flat, tmp_path / "made", max_new_tokens=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_student_trains_on_the_labels_unchanged(tmp_path: Path, dtype: torch.dtype) -> None:
    """The loss is that of the labels after the start token, computed in float64; half precision works too."""
    made = written(whisper(6).to(dtype), tmp_path / "made", 8, generation={"language": "german", "task": "translate"})
    student, row = whisper(2), made[0]
    data = [{"input_features": SOUNDS[0].tolist(), "labels": row["labels"]}]
    trainer = make(
        tmp_path, student, whisper(3), train_dataset=data, data_collator=tf.default_data_collator, alpha=0.5,
        max_steps=1, logging_steps=1, per_device_train_batch_size=1,
    )  # fmt: skip
    decoder = torch.tensor([[*ids_of(START), *row["labels"][:-1]]])
    with torch.no_grad():
        logits = student.double()(input_features=SOUNDS[:1].double(), decoder_input_ids=decoder).logits[0]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(row["labels"])).item()
    student.float()
    trainer.train()
    assert float(trainer.state.log_history[0]["loss/labels"]) == pytest.approx(expected, rel=1e-5)


def test_completions_without_a_tokenizer(tmp_path: Path) -> None:
    made = generate_completions(whisper(6), DATA, tmp_path / "1", max_new_tokens=8)
    assert made.column_names == ["index", "labels", "finished"]
    assert made["labels"] == written(whisper(6), tmp_path / "2", 8)["labels"]


def speech_to_text() -> Any:
    sizes = {f"{side}_{size}": 1 for side in ("encoder", "decoder") for size in ("layers", "attention_heads")}
    return tf.Speech2TextForConditionalGeneration(tf.Speech2TextConfig(
        vocab_size=40, d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, input_feat_per_channel=8, conv_channels=16,
        num_conv_layers=1, conv_kernel_sizes=(5,), max_source_positions=200, max_target_positions=30, init_std=0.4,
        **sizes,
    ))  # fmt: skip


def moonshine() -> Any:
    sizes = {
        f"{side}_num_{size}": 1 for side in ("encoder", "decoder") for size in ("hidden_layers", "attention_heads")
    }
    return tf.MoonshineForConditionalGeneration(tf.MoonshineConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, pad_token_id=0, initializer_range=0.4,
        max_position_embeddings=30, **sizes,
    ))  # fmt: skip


def speech_encoder_decoder() -> Any:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    encoder = tf.Wav2Vec2Config(
        conv_dim=(8,), conv_kernel=(10,), conv_stride=(20,), num_conv_pos_embeddings=4, feat_extract_norm="layer",
        num_conv_pos_embedding_groups=2, **sizes,
    )  # fmt: skip
    decoder = tf.BertConfig(vocab_size=40, is_decoder=True, add_cross_attention=True, initializer_range=0.4, **sizes)
    model = tf.SpeechEncoderDecoderModel(tf.SpeechEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder))
    for settings in (model.config, model.generation_config):
        settings.decoder_start_token_id, settings.pad_token_id, settings.eos_token_id = 1, 0, 2
    return model


@pytest.mark.parametrize(
    ("made", "column", "shapes"),
    [
        (speech_to_text, "input_features", [(60, 8), (40, 8), (51, 8)]),
        (moonshine, "input_values", [(3000,), (4000,), (2500,)]),
        (speech_encoder_decoder, "input_values", [(3000,), (4000,), (2500,)]),
    ],
)
def test_other_speech_models(tmp_path: Path, made: Any, column: str, shapes: list[tuple[int, ...]]) -> None:
    """Recordings of unequal length in one batch give the texts of each alone; padding in the dataset is removed."""
    torch.manual_seed(0)
    teacher = made()
    recordings = [torch.randn(shape) for shape in shapes]
    alone = datasets.Dataset.from_dict({column: [one.tolist() for one in recordings]})
    length = max(map(len, recordings))
    padded = datasets.Dataset.from_dict({
        column: [torch.cat([one, torch.zeros(length - len(one), *one.shape[1:])]).tolist() for one in recordings],
        "attention_mask": [[1] * len(one) + [0] * (length - len(one)) for one in recordings],
    })  # fmt: skip
    settings = {"max_new_tokens": 5, "processing_class": words(40)}
    rows = generate_completions(teacher, alone, tmp_path / "alone", **settings)
    assert rows.column_names == ["index", "labels", "completion", "finished"]
    start, end = teacher.generation_config.decoder_start_token_id, teacher.generation_config.eos_token_id
    for recording, row in zip(recordings, rows, strict=True):
        text = by_hand(teacher, {column: recording[None]}, [start], 5, end)
        assert (row["labels"], row["finished"]) == (text, text[-1] == end)
    assert generate_completions(teacher, padded, tmp_path / "padded", **settings).to_list() == rows.to_list()


def translator(kind: Any, config: Any, **ids: int) -> Any:
    sizes = {f"{side}_{size}": 1 for side in ("encoder", "decoder") for size in ("layers", "attention_heads")}
    torch.manual_seed(0)
    return kind(config(vocab_size=40, d_model=8, encoder_ffn_dim=8, decoder_ffn_dim=8, init_std=0.5, **sizes, **ids))


@pytest.mark.parametrize(
    ("kind", "config"),
    [(tf.M2M100ForConditionalGeneration, tf.M2M100Config), (tf.MBartForConditionalGeneration, tf.MBartConfig)],
)
def test_labels_begin_with_the_forced_language(tmp_path: Path, kind: Any, config: Any) -> None:
    """For NLLB, M2M100 and mBART."""
    teacher = translator(kind, config)
    teacher.generation_config.decoder_start_token_id = 2
    source = datasets.Dataset.from_dict({"input_ids": [[5, 6, 7, 2], [8, 2]]})
    made = generate_completions(teacher, source, tmp_path, max_new_tokens=4, generation={"forced_bos_token_id": 33})
    for row, ids in zip(made, source["input_ids"], strict=True):
        assert row["labels"] == [33, *by_hand(teacher, {"input_ids": torch.tensor([ids])}, [2, 33], 3, end=2)]


def test_a_truncated_text_has_no_end_token(tmp_path: Path) -> None:
    """BART's config forces an end token at the last position, which transformers' `generate` adds."""
    teacher = translator(tf.BartForConditionalGeneration, tf.BartConfig)
    source = datasets.Dataset.from_dict({"input_ids": [[5, 6, 7, 2]]})
    assert teacher.generation_config.forced_eos_token_id == 2
    forced = teacher.generate(torch.tensor([[5, 6, 7, 2]]), max_new_tokens=3, num_beams=1, do_sample=False)
    row = generate_completions(teacher, source, tmp_path / "1", max_new_tokens=3)[0]
    assert forced[0, -1] == 2 and row["labels"][:2] == forced[0, 1:3].tolist()
    assert row["labels"][-1] != 2 and row["finished"] is False
    asked = generate_completions(
        teacher, source, tmp_path / "2", max_new_tokens=3, generation={"forced_eos_token_id": 2}
    )
    assert asked[0]["labels"] == forced[0, 1:].tolist()
