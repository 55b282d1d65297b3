"""A sequence classifier as teacher predicts the same for a padded row as for the row alone, whatever the padding.

Decoder heads find the last token by `config.pad_token_id`; XLNet uses the last position. The expected values come
from the model itself, row by row and unpadded.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from hf_distill import Distiller, Ensemble, ModelTeacher, MovingAverage
from hf_distill.signals import Needs
from hf_distill.teachers import RDropTeacher, Snapshot
from hf_distill.teachers.cache import TeacherCache
from hf_distill.teachers.specialists import Specialists
from tests.tiny_tokenizers import tokenizer
from tests.trainer.tiny import bert, make, padded, softened_kl

LABELS = 3
GPT = {"vocab_size": 23, "n_embd": 16, "n_layer": 1, "n_head": 2}
LLAMA = {
    "vocab_size": 23, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
DECODERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "gpt2": (hf.GPT2ForSequenceClassification, hf.GPT2Config, {**GPT, "n_positions": 32}),
    "openai_gpt": (hf.OpenAIGPTForSequenceClassification, hf.OpenAIGPTConfig, {**GPT, "n_positions": 32}),
    "gpt_neo": (
        hf.GPTNeoForSequenceClassification, hf.GPTNeoConfig,
        {"vocab_size": 23, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "attention_types": [[["global"], 1]],
         "max_position_embeddings": 32},
    ),
    "gpt_neox": (hf.GPTNeoXForSequenceClassification, hf.GPTNeoXConfig, LLAMA),
    "opt": (
        hf.OPTForSequenceClassification, hf.OPTConfig,
        {"vocab_size": 23, "hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
         "max_position_embeddings": 32, "word_embed_proj_dim": 16},
    ),
    "bloom": (hf.BloomForSequenceClassification, hf.BloomConfig,
              {"vocab_size": 23, "hidden_size": 16, "n_layer": 1, "n_head": 2}),
    "llama": (hf.LlamaForSequenceClassification, hf.LlamaConfig, LLAMA),
    "qwen2": (hf.Qwen2ForSequenceClassification, hf.Qwen2Config, LLAMA),
    "mistral": (hf.MistralForSequenceClassification, hf.MistralConfig, LLAMA),
    "gemma": (hf.GemmaForSequenceClassification, hf.GemmaConfig, {**LLAMA, "head_dim": 8}),
}  # fmt: skip
PADDED_WITH = 0  # the padding of the collator in tests.trainer.tiny
ROWS = [{"input_ids": ids} for ids in ([5, 6, 7, 8, 9], [4, 3], [11, 12, 3, 13, 14, 15, 16], [17], [18, 19, 20])]
TEXTS = ["w5 w6 w7 w8 w9", "w4 w3", "w11 w12 w3 w13 w14 w15 w16", "w17", "w18 w19 w20"]


def made(name: str, *, pad: int | None, seed: int = 1, **settings: Any) -> Any:
    model_class, config_class, shape = DECODERS[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config_class(**{**shape, "num_labels": LABELS, "pad_token_id": pad, **settings})).eval()
        for parameter in model.parameters():
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model


def alone(model: Any, rows: list[dict[str, Any]]) -> Tensor:
    """Return `[b v]`: each row unpadded, by the unchanged model."""
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([row["input_ids"]])).logits for row in rows]).double()


def predictions(teacher: Any, batch: dict[str, Tensor], student: Any = None, **settings: Any) -> Tensor:
    distiller = Distiller(student or bert(), teacher, alpha=1.0, **settings)
    return distiller.teacher_signals(batch, Needs(logits=True)).predictions().double()


@pytest.mark.parametrize("pad", [3, None, -1, 0], ids=["another", "none", "minus one", "the batch's"])
@pytest.mark.parametrize("name", DECODERS)
def test_predictions_do_not_depend_on_right_padding(name: str, pad: int | None) -> None:
    """Token 3 occurs within the texts and at the end of one, where the model alone skips it too."""
    teacher = made(name, pad=pad)
    expected = alone(teacher, ROWS)
    found = predictions(teacher, padded(ROWS))
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert teacher.config.pad_token_id == pad


@pytest.mark.parametrize("name", ["llama", "bloom"])
@pytest.mark.parametrize("pad", [3, None])
def test_predictions_do_not_depend_on_left_padding(name: str, pad: int | None) -> None:
    """For models with relative positions; absolute positions would change."""
    teacher, batch = made(name, pad=pad), padded(ROWS)
    for row, length in enumerate(batch["attention_mask"].sum(-1).tolist()):
        for column in batch.values():
            column[row] = column[row].roll(column.shape[1] - length)
    assert torch.allclose(predictions(teacher, batch), alone(teacher, ROWS), rtol=1e-4, atol=1e-5)


def test_without_padding_the_last_token_is_used() -> None:
    teacher = made("llama", pad=None)
    rows = [{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9, 10]}]
    assert torch.allclose(predictions(teacher, padded(rows)), alone(teacher, rows), rtol=1e-4, atol=1e-5)


def xlnet(**settings: Any) -> Any:
    config = hf.XLNetConfig(vocab_size=23, d_model=16, n_layer=2, n_head=2, d_inner=16, num_labels=LABELS, **settings)
    torch.manual_seed(0)
    return hf.XLNetForSequenceClassification(config).eval()


@pytest.mark.parametrize("side", ["right", "left"])
def test_xlnet_uses_the_last_position(side: str) -> None:
    teacher, batch = xlnet(), padded(ROWS)
    if side == "left":
        for row, length in enumerate(batch["attention_mask"].sum(-1).tolist()):
            for column in batch.values():
                column[row] = column[row].roll(column.shape[1] - length)
    assert torch.allclose(predictions(teacher, batch), alone(teacher, ROWS), rtol=1e-4, atol=1e-5)
    assert batch["input_ids"].tolist() != padded(ROWS, to=9)["input_ids"].tolist()  # the batch is not modified


# In a training, for each way that inputs reach a teacher.


def right(teacher: Any, student: Any, rows: list[dict[str, Any]] = ROWS, temperature: float = 2.0) -> float:
    theirs = alone(teacher, rows)
    with torch.no_grad():
        ours = student.eval()(**padded(ROWS)).logits
    return float(softened_kl(ours, theirs, temperature).mean())


def trained(tmp_path: Any, teacher: Any, rows: list[dict[str, Any]], **settings: Any) -> float:
    """Return the loss of one step with learning rate 0."""
    trainer = make(
        tmp_path, settings.pop("student", None) or bert(), teacher, alpha=1.0, temperature=2.0, train_dataset=rows,
        max_steps=1, learning_rate=0.0, per_device_train_batch_size=len(rows), logging_steps=1, **settings,
    )  # fmt: skip
    trainer.train()
    return float(trainer.state.log_history[0]["loss"])


@pytest.mark.parametrize("pad", [3, None])
def test_padding_with_the_students_ids(tmp_path, pad: int | None) -> None:
    teacher = made("llama", pad=pad)
    assert trained(tmp_path, teacher, ROWS) == pytest.approx(right(teacher, bert()), rel=1e-4)


@pytest.mark.parametrize("pad", [3, None])
@pytest.mark.parametrize("form", ["text", "input_ids"])
def test_padding_of_teacher_columns(tmp_path, pad: int | None, form: str) -> None:
    teacher = made("gpt2", pad=pad)
    own = TEXTS[::-1] if form == "text" else [row["input_ids"] for row in ROWS[::-1]]
    rows = [{**row, f"teacher_{form}": text} for row, text in zip(ROWS, own, strict=True)]
    found = trained(tmp_path, teacher, rows, teacher_processing_class=tokenizer(23))
    assert found == pytest.approx(right(teacher, bert(), ROWS[::-1]), rel=1e-4)


@pytest.mark.parametrize("pad", [3, None])
def test_padding_with_a_cache(tmp_path, caplog, pad: int | None) -> None:
    teacher = made("gpt2", pad=pad)
    cache = TeacherCache.build(teacher, ROWS, tmp_path / "cache", data_collator=padded, batch_size=5, progress=False)
    assert "depends on how far its batch is padded" not in caplog.text
    assert trained(tmp_path, cache, ROWS) == pytest.approx(right(teacher, bert()), rel=1e-3)


def test_padding_with_an_ensemble(tmp_path) -> None:
    members = [made("gpt2", pad=3), made("llama", pad=None, seed=2), xlnet()]
    theirs = torch.stack([(alone(one, ROWS) / 2).softmax(-1) for one in members]).mean(0).log() * 2
    with torch.no_grad():
        ours = bert().eval()(**padded(ROWS)).logits
    expected = float(softened_kl(ours, theirs, 2.0).mean())
    assert trained(tmp_path, Ensemble(members), ROWS) == pytest.approx(expected, rel=1e-4)


def test_padding_with_specialists() -> None:
    generalist, specialist = made("llama", pad=3), made("gpt2", pad=None, num_labels=3)
    rows = [{**row, "labels": 0} for row in ROWS]
    teacher = Specialists(generalist, {(0, 2): specialist}, most_probable=3)
    together = predictions(teacher, padded(rows))
    one_by_one = torch.cat(
        [predictions(Specialists(generalist, {(0, 2): specialist}, most_probable=3), padded([row])) for row in rows]
    )
    assert torch.allclose(together, one_by_one, atol=1e-4)


def test_padding_in_an_evaluation_with_a_copy_of_the_student(tmp_path) -> None:
    """The student has the batch's padding token, its copy another: they agree on every row."""
    student, teacher = made("llama", pad=PADDED_WITH), made("llama", pad=3)
    teacher.load_state_dict(student.state_dict())  # a new embedding is 0 for its padding token
    rows = [{"input_ids": [1 + (7 * i + 3 * j) % 22 for j in range(1 + i % 6)]} for i in range(32)]
    rows = [row for row in rows if row["input_ids"][-1] != 3]  # 3 is padding in its own config
    trainer = make(
        tmp_path, student, teacher, alpha=1.0, eval_dataset=rows, evaluate_with_teacher=True,
        per_device_eval_batch_size=8,
    )  # fmt: skip
    found = trainer.evaluate()
    assert found["eval_teacher_agreement"] == 1.0 and found["eval_divergence"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("own", [MovingAverage, lambda: Snapshot(every=9)], ids=["average", "snapshot"])
@pytest.mark.parametrize("pad", [3, None])
def test_padding_with_averages_and_snapshots(tmp_path, own: Any, pad: int | None) -> None:
    """`Trainer` sets the student's config at the start of training, after the copy: both predict the same."""
    rows = [*ROWS, {"input_ids": [7, 8, 3]}]  # ends with the padding token of the old config
    found = trained(tmp_path, own(), rows, student=made("llama", pad=pad), processing_class=tokenizer(23))
    assert found == pytest.approx(0.0, abs=1e-6)


def test_padding_with_rdrop() -> None:
    student = made("gpt2", pad=3, attn_pdrop=0.5)
    signals = Distiller(student, RDropTeacher(), alpha=1.0).teacher_signals
    student.eval()
    with torch.no_grad():
        expected = student(**padded(ROWS)).logits
        assert torch.equal(signals(padded(ROWS), Needs(logits=True)).predictions(), expected)


def test_padding_is_not_mistaken_for_end_tokens() -> None:
    """BART's head uses the last end token, so padding must not be written as one, whatever its config has."""
    config = hf.BartConfig(
        vocab_size=23, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32,
        num_labels=LABELS, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    teacher = hf.BartForSequenceClassification(config).eval()
    rows = [{"input_ids": [*row["input_ids"], 2]} for row in ROWS]
    found = predictions(ModelTeacher(teacher), padded(rows))
    assert torch.allclose(found, alone(teacher, rows), rtol=1e-4, atol=1e-5)
