"""A tiny model for every kind of head, with ragged examples and their collation.

The laws and the trainer's tests run over `HEADS`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import transformers as hf
from torch.nn import functional as F

from tests.cheap import build_once

VOCABULARY = 40
LABELS = 3
IGNORED = -100
LONGEST = 11  # tokens in an example
LONGEST_SOUND = 96  # samples
MEL, FRAMES = 8, 20  # input of a tiny Whisper
Example = dict[str, Any]
# The names of the number of blocks and of their width in configs.
_DEPTHS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers")
_WIDTHS = ("hidden_size", "dim", "n_embd", "d_model")


@dataclass(frozen=True)
class Head:
    """One kind of head.

    Attributes:
        kind: name in `TASKS`. model_class, config_class, settings: what `make` builds from.
        write: random generator, index → one labelled example of lists and numbers.
        fill: padded columns → the padding value. mask: the mask's name and the column that it masks.
        label_names: columns that `examples(labelled=False)` omits.
        pads: whether a batch can be padded further than its longest example.
        longest: upper limit of an example's length.
        may_ignore: label -100 is allowed for a whole example, which then has no label.
        labels_see_padding: the model's own loss depends on the amount of padding.
    """

    kind: str
    model_class: type[hf.PreTrainedModel]
    config_class: type[hf.PreTrainedConfig]
    settings: dict[str, Any]
    write: Callable[[random.Random, int], Example]
    fill: dict[str, float]
    mask: tuple[str, str] | None = None
    label_names: tuple[str, ...] = ("labels",)
    pads: bool = True
    longest: int = LONGEST
    may_ignore: bool = False
    labels_see_padding: bool = False

    @build_once
    def make(self, seed: int = 0, *, layers: int | None = None, width: int | None = None, **settings: Any) -> Any:
        """Build a model from a seed. Every parameter is perturbed, so that no bias is 0 and logits are not uniform.

        `layers` and `width` replace the head's own in all stacks. The global random generator is not
        used.
        """
        for value, names in ((layers, _DEPTHS), (width, _WIDTHS)):
            if value is not None:
                settings = {**{name: value for name in names if name in self.settings}, **settings}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.model_class(self.config_class(**{**self.settings, **settings}))
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.15 * torch.randn_like(parameter))
        return model

    def examples(self, n: int = 8, seed: int = 0, *, labelled: bool = True) -> list[Example]:
        """Return examples of unequal length, with unequal numbers of labels if the head allows that."""
        rng = random.Random(seed)
        made = [self.write(rng, index) for index in range(n)]
        if labelled:
            return made
        return [{k: v for k, v in one.items() if k not in self.label_names} for one in made]

    def collate(self, examples: Sequence[Example], pad_to: int | None = None) -> dict[str, torch.Tensor]:
        """Return a batch padded to its longest example or to `pad_to`. Works as a `Trainer`'s data_collator."""
        batch: dict[str, torch.Tensor] = {}
        for name in examples[0]:
            rows = [torch.tensor(example[name]) for example in examples]
            if self.mask is not None and name == self.mask[1]:
                batch[self.mask[0]] = _padded([torch.ones(x.shape, dtype=torch.long) for x in rows], 0, pad_to)
            batch[name] = _padded(rows, self.fill[name], pad_to) if name in self.fill else torch.stack(rows)
        return batch

    def batch(self, n: int = 8, seed: int = 0, **keywords: Any) -> dict[str, torch.Tensor]:
        """Return `n` examples in one batch."""
        return self.collate(self.examples(n, seed, **keywords))


def _padded(rows: list[torch.Tensor], value: float, pad_to: int | None) -> torch.Tensor:
    longest = max([row.shape[-1] for row in rows] + [pad_to or 0])
    return torch.stack([F.pad(row, (0, longest - row.shape[-1]), value=value) for row in rows])


# One example each. Lengths differ from example to example.


def _tokens(rng: random.Random, low: int = 4, high: int = LONGEST) -> list[int]:
    return [rng.randrange(3, VOCABULARY) for _ in range(rng.randint(low, high))]


def _sentence(rng: random.Random, index: int) -> Example:
    return {"input_ids": _tokens(rng), "labels": index % LABELS}


def _sentence_with_several(rng: random.Random, index: int) -> Example:
    return {"input_ids": _tokens(rng), "labels": [float(rng.random() < 0.5) for _ in range(LABELS)]}


def _sentence_with_value(rng: random.Random, index: int) -> Example:
    return {"input_ids": _tokens(rng), "labels": rng.uniform(-1, 1)}


def _question_with_choices(rng: random.Random, index: int) -> Example:
    length = rng.randint(4, LONGEST)
    return {"input_ids": [_tokens(rng, length, length) for _ in range(LABELS)], "labels": index % LABELS}


def _tagged(rng: random.Random, index: int) -> Example:
    tokens = _tokens(rng)
    tags = [rng.randrange(LABELS) if rng.random() < 0.7 else IGNORED for _ in tokens[1:-1]]
    return {"input_ids": tokens, "labels": [IGNORED, *tags, IGNORED]}


def _answered(rng: random.Random, index: int) -> Example:
    tokens = _tokens(rng)
    if index % 4 == 3:  # the answer was cut off: transformers ignores positions beyond the input
        return {"input_ids": tokens, "start_positions": 999, "end_positions": 999}
    start = rng.randrange(1, len(tokens))
    return {"input_ids": tokens, "start_positions": start, "end_positions": rng.randrange(start, len(tokens))}


def _masked(rng: random.Random, index: int) -> Example:
    tokens = _tokens(rng)
    hidden = set(rng.sample(range(len(tokens)), rng.randint(1, len(tokens) // 2)))
    labels = [token if i in hidden else IGNORED for i, token in enumerate(tokens)]
    return {"input_ids": [1 if i in hidden else token for i, token in enumerate(tokens)], "labels": labels}


def _prompted(rng: random.Random, index: int) -> Example:
    tokens = _tokens(rng)
    prompt = rng.randint(0, len(tokens) - 2)
    return {"input_ids": tokens, "labels": [IGNORED] * prompt + tokens[prompt:]}


def _translated(rng: random.Random, index: int) -> Example:
    return {"input_ids": _tokens(rng), "labels": _tokens(rng, 2)}


def _noise(rng: random.Random, length: int) -> list[float]:
    return [rng.gauss(0, 1) for _ in range(length)]


def _transcribed(rng: random.Random, index: int) -> Example:
    return {"input_features": [_noise(rng, FRAMES) for _ in range(MEL)], "labels": _tokens(rng, 2)}


def _spelled(rng: random.Random, index: int) -> Example:
    letters = [rng.randrange(1, VOCABULARY) for _ in range(rng.randint(1, 4))]
    return {"input_values": _noise(rng, rng.randint(48, LONGEST_SOUND)), "labels": letters}


def _audio_class(rng: random.Random, index: int) -> Example:
    return {"input_values": _noise(rng, rng.randint(48, LONGEST_SOUND)), "labels": index % LABELS}


def _image(rng: random.Random, index: int) -> Example:
    return {"pixel_values": [[_noise(rng, 8) for _ in range(8)] for _ in range(3)], "labels": index % LABELS}


def _unlabelled(rng: random.Random, index: int) -> Example:
    return {"input_ids": _tokens(rng)}


# Config settings: one or two layers, no dropout.

_BERT = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 32, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
_DISTILBERT = {
    "vocab_size": VOCABULARY, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32,
    "max_position_embeddings": 32, "dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0,
}  # fmt: skip
_GPT2 = {
    "vocab_size": VOCABULARY, "n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "resid_pdrop": 0.0,
    "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_LLAMA = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_T5 = {
    "vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2,
    "dropout_rate": 0.0, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
_BART = {
    "vocab_size": VOCABULARY, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
    "max_position_embeddings": 32, "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}  # fmt: skip
_MARIAN = {**_BART, "decoder_start_token_id": 0}
_WHISPER = {
    **_BART, "num_mel_bins": MEL, "max_source_positions": FRAMES // 2, "max_target_positions": 32,
    "decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None,
}  # fmt: skip
_WHISPER.pop("max_position_embeddings")
# Layer norm in the convolutions: with group norm, the frames of a recording depend on its padding.
_SPEECH = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 32, "conv_dim": (8, 8), "conv_kernel": (4, 2), "conv_stride": (2, 2),
    "num_feat_extract_layers": 2, "conv_bias": True, "feat_extract_norm": "layer", "do_stable_layer_norm": True,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "hidden_dropout": 0.0,
    "attention_dropout": 0.0, "activation_dropout": 0.0, "feat_proj_dropout": 0.0, "final_dropout": 0.0,
    "layerdrop": 0.0, "apply_spec_augment": False, "pad_token_id": 0, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip
_VIT = {
    "image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip

_of_text = partial(Head, fill={"input_ids": 0}, mask=("attention_mask", "input_ids"))
_of_tokens = partial(Head, fill={"input_ids": 0, "labels": IGNORED}, mask=("attention_mask", "input_ids"))
_of_sound = partial(Head, mask=("attention_mask", "input_values"), longest=LONGEST_SOUND)
_NAMED = {"num_labels": LABELS}
_SPAN_LABELS = ("start_positions", "end_positions")
_CTC_FILL = {"input_values": 0.0, "labels": IGNORED}

_BERT_CLASSIFIER = (hf.BertForSequenceClassification, hf.BertConfig)

HEADS: dict[str, Head] = {
    "bert_single_label": _of_text(
        "classification", *_BERT_CLASSIFIER, {**_BERT, **_NAMED}, _sentence, may_ignore=True,
    ),
    "distilbert_single_label": _of_text(
        "classification", hf.DistilBertForSequenceClassification, hf.DistilBertConfig,
        {**_DISTILBERT, **_NAMED}, _sentence, may_ignore=True,
    ),
    "bert_multi_label": _of_text(
        "classification", *_BERT_CLASSIFIER, {**_BERT, **_NAMED, "problem_type": "multi_label_classification"},
        _sentence_with_several,
    ),
    "wav2vec2_audio_class": _of_sound(
        "classification", hf.Wav2Vec2ForSequenceClassification, hf.Wav2Vec2Config,
        {**_SPEECH, **_NAMED, "classifier_proj_size": 8}, _audio_class, {"input_values": 0.0}, may_ignore=True,
    ),
    "vit_image_class": Head(
        "classification", hf.ViTForImageClassification, hf.ViTConfig, {**_VIT, **_NAMED}, _image, {},
        pads=False, may_ignore=True,
    ),
    "bert_regression": _of_text(
        "regression", *_BERT_CLASSIFIER, {**_BERT, "num_labels": 1}, _sentence_with_value
    ),
    "bert_multiple_choice": _of_text(
        "multiple_choice", hf.BertForMultipleChoice, hf.BertConfig, _BERT, _question_with_choices
    ),
    "bert_tokens": _of_tokens(
        "token_classification", hf.BertForTokenClassification, hf.BertConfig, {**_BERT, **_NAMED}, _tagged
    ),
    "bert_span": _of_text(
        "span", hf.BertForQuestionAnswering, hf.BertConfig, _BERT, _answered,
        label_names=_SPAN_LABELS, labels_see_padding=True,
    ),
    "bert_masked_lm": _of_tokens("masked_lm", hf.BertForMaskedLM, hf.BertConfig, _BERT, _masked),
    "gpt2_causal_lm": _of_tokens("causal_lm", hf.GPT2LMHeadModel, hf.GPT2Config, _GPT2, _prompted),
    "llama_causal_lm": _of_tokens("causal_lm", hf.LlamaForCausalLM, hf.LlamaConfig, _LLAMA, _prompted),
    "t5_seq2seq": _of_tokens("seq2seq", hf.T5ForConditionalGeneration, hf.T5Config, _T5, _translated),
    "bart_seq2seq": _of_tokens("seq2seq", hf.BartForConditionalGeneration, hf.BartConfig, _BART, _translated),
    "marian_seq2seq": _of_tokens("seq2seq", hf.MarianMTModel, hf.MarianConfig, _MARIAN, _translated),
    "whisper_seq2seq": Head(
        "seq2seq", hf.WhisperForConditionalGeneration, hf.WhisperConfig, _WHISPER, _transcribed, {"labels": IGNORED}
    ),
    "wav2vec2_ctc_mean": _of_sound(
        "ctc", hf.Wav2Vec2ForCTC, hf.Wav2Vec2Config, {**_SPEECH, "ctc_loss_reduction": "mean"}, _spelled, _CTC_FILL
    ),
    "hubert_ctc_sum": _of_sound(
        "ctc", hf.HubertForCTC, hf.HubertConfig, {**_SPEECH, "ctc_loss_reduction": "sum"}, _spelled, _CTC_FILL
    ),
    "bert_embedding": _of_text("embedding", hf.BertModel, hf.BertConfig, _BERT, _unlabelled, label_names=()),
}  # fmt: skip


def of_each_kind(turn: int, names: Iterable[str] = tuple(HEADS)) -> list[Any]:
    """Return test parameters: one head of each task, another for another `turn`; the other heads are slow.

    For tests that depend on the task. Tests of alpha = 0, accumulation and resuming run on every head.
    """
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(HEADS[name].kind, []).append(name)
    quick = {heads[turn % len(heads)] for heads in kinds.values()}
    slow = pytest.mark.slow
    return [pytest.param(name, marks=() if name in quick else slow) for heads in kinds.values() for name in heads]
