"""The program on each card runs as it stands, in the folder that holds student and card."""

from __future__ import annotations

import contextlib
import io
from dataclasses import replace

import pytest
import torch
import transformers as tf

from hf_distill.hub.card import render_card
from hf_distill.hub.facts import CardData, model_facts
from hf_distill.hub.usage import POOLED, program, use_of
from hf_distill.tasks import Embedding
from hf_distill.vocabulary import HeadAlignment
from tests.hub.tiny import BERT, SMALL, WORDS, bert, tokenizer

SOUND = {
    **BERT, "conv_dim": (8, 8), "conv_kernel": (10, 8), "conv_stride": (64, 32),
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 8, "pad_token_id": 0,
}  # fmt: skip


def t5() -> tf.PreTrainedModel:
    config = tf.T5Config(
        vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
        decoder_start_token_id=0, eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    return tf.T5ForConditionalGeneration(config)


def gpt2() -> tf.PreTrainedModel:
    config = tf.GPT2Config(
        vocab_size=len(WORDS), n_embd=16, n_layer=1, n_head=2, n_positions=64,
        bos_token_id=2, eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    return tf.GPT2LMHeadModel(config)


def vit(kind: str) -> tf.PreTrainedModel:
    config = tf.ViTConfig(**SMALL, intermediate_size=16, image_size=32, patch_size=16)
    return getattr(tf, kind)(config)


def sound(kind: str) -> tf.PreTrainedModel:
    return getattr(tf, kind)(tf.Wav2Vec2Config(**SOUND))


def image_processor() -> tf.ViTImageProcessor:
    return tf.ViTImageProcessor(size={"height": 32, "width": 32})


TEXT = {
    "classification": lambda: bert("SequenceClassification"),
    "regression": lambda: bert("SequenceClassification"),
    "multiple_choice": lambda: bert("MultipleChoice"),
    "token_classification": lambda: bert("TokenClassification"),
    "span": lambda: bert("QuestionAnswering", labels=2),
    "masked_lm": lambda: bert("MaskedLM"),
    "causal_lm": gpt2,
    "seq2seq": t5,
    "embedding": lambda: tf.BertModel(tf.BertConfig(**BERT)),
}
OTHER = {
    "ctc": (lambda: sound("Wav2Vec2ForCTC"), None),
    "embedding": (lambda: vit("ViTModel"), image_processor),
    "classification": (lambda: vit("ViTForImageClassification"), image_processor),
}


def run_program(facts: CardData) -> str:
    text = program(facts)
    assert text is not None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(text, "the card's program", "exec"), {})
    return printed.getvalue()


def facts_of(task: str, model: tf.PreTrainedModel, processor: object | None) -> CardData:
    name = None if processor is None else type(processor).__name__
    return CardData("tiny", task, model_facts(model), processing_class=name)


@pytest.fixture
def here(tmp_path, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("task", TEXT)
def test_text(task: str, here) -> None:
    model, words = TEXT[task](), tokenizer()
    model.save_pretrained(here)
    words.save_pretrained(here)
    facts = facts_of(task, model, words)
    assert use_of(facts) is not None
    assert run_program(facts).strip()
    assert run_program(facts_of(task, model, None)).strip()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_embeddings_are_pooled_as_in_training(pooling: str, side: str, here) -> None:
    """What the card's program makes of two texts is what was compared with the teacher."""
    model, words = TEXT["embedding"]().eval(), tokenizer()
    words.init_kwargs["padding_side"] = words.padding_side = side  # the former is what is saved
    model.save_pretrained(here)
    words.save_pretrained(here)
    facts = replace(facts_of("embedding", model, words), pooling=pooling)
    text, names = program(facts), {}
    assert text is not None
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(text, "the card's program", "exec"), names)
    batch = names["batch"]
    assert batch["attention_mask"][1, 0 if side == "left" else -1] == 0, "a padded text"
    with torch.no_grad():
        expected = Embedding(pooling).read(model(**batch), batch, HeadAlignment(), teacher=False)
    torch.testing.assert_close(names["embeddings"], expected)
    assert POOLED[pooling] in render_card(facts)


@pytest.mark.parametrize("task", OTHER)
def test_other_inputs(task: str, here) -> None:
    make, make_processor = OTHER[task]
    model = make()
    model.save_pretrained(here)
    processor = make_processor() if make_processor else None
    if processor is not None:
        processor.save_pretrained(here)
    assert run_program(facts_of(task, model, processor)).strip()


def test_sound_classes(here) -> None:
    model, extractor = sound("Wav2Vec2ForSequenceClassification"), tf.Wav2Vec2FeatureExtractor()
    model.save_pretrained(here)
    extractor.save_pretrained(here)
    assert "score" in run_program(facts_of("classification", model, extractor))


def test_speech_to_text(here) -> None:
    (here / "vocab.json").write_text('{"<pad>": 0, "<unk>": 1, "|": 2, "a": 3, "b": 4}')
    words = tf.Wav2Vec2CTCTokenizer(str(here / "vocab.json"), pad_token="<pad>")
    processor = tf.Wav2Vec2Processor(tf.Wav2Vec2FeatureExtractor(), words)
    model = sound("Wav2Vec2ForCTC")
    model.save_pretrained(here)
    processor.save_pretrained(here)
    assert "text" in run_program(facts_of("ctc", model, processor))
