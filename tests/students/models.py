"""Tiny teachers of every supported architecture, each with an input. No assertions."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as hf

from hf_distill.students import report_of
from tests.cheap import build_once
from tests.heads import _BART, _BERT, _DISTILBERT, _GPT2, _LLAMA, _SPEECH, _T5, _VIT, _WHISPER, FRAMES, MEL, VOCABULARY

LAYERS = 4
DEPTHS = (
    "num_hidden_layers",
    "n_layers",
    "n_layer",
    "num_layers",
    "num_decoder_layers",
    "encoder_layers",
    "decoder_layers",
)
_LABELS = {"num_labels": 3}


@dataclass(frozen=True)
class Tiny:
    """One model class. `stacks` maps an argument of `inherit` to the path of its layers; None means shared layers."""

    model_class: type[hf.PreTrainedModel]
    settings: dict[str, Any]
    stacks: dict[str, str | None]
    modality: str = "text"
    generates: bool = False

    @build_once
    def make(self, layers: int = LAYERS, **settings: Any) -> Any:
        """Return a teacher whose parameters all differ, so that no two layers are equal by chance."""
        wanted = {**self.settings, **{name: layers for name in DEPTHS if name in self.settings}, **settings}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            model = self.model_class(self.model_class.config_class(**wanted)).eval()
            with torch.no_grad():
                for parameter in filter(lambda one: one.requires_grad, model.parameters()):  # not sinusoids
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    def batch(self) -> dict[str, torch.Tensor]:
        """Return two examples; the second text is padded."""
        ids = torch.tensor([[3, 4, 5, 6, 7, 2], [9, 10, 11, 2, 0, 0]])
        mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
        noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        if self.modality == "text":
            batch = {"input_ids": ids, "attention_mask": mask}
        elif self.modality == "choices":
            batch = {"input_ids": ids.reshape(1, 2, 6)}
        elif self.modality == "sound":
            batch = {"input_values": noise.reshape(2, -1)}
        elif self.modality == "mel":
            return {
                "input_features": noise.reshape(2, -1)[:, : MEL * FRAMES].reshape(2, MEL, FRAMES)
            } | self._decoder_inputs()
        elif self.modality == "spectrogram":
            batch = {"input_values": noise.reshape(2, -1)[:, : 20 * 8].reshape(2, 20, 8)}
        else:
            batch = {"pixel_values": noise}
        return batch | self._decoder_inputs()

    def _decoder_inputs(self) -> dict[str, torch.Tensor]:
        if len(self.stacks) == 1 or "BartForSequence" in self.model_class.__name__:
            return {}
        return {"decoder_input_ids": torch.tensor([[1, 5, 6], [1, 7, 8]])}


_ROBERTA = _BERT | {"pad_token_id": 0, "bos_token_id": 1}
_DEBERTA = _BERT | {
    "relative_attention": True, "position_buckets": 4, "max_relative_positions": 8, "pos_att_type": ["p2c", "c2p"],
    "norm_rel_ebd": "layer_norm", "share_att_key": True, "conv_kernel_size": 3, "conv_act": "gelu",
    "position_biased_input": False, "type_vocab_size": 0, "pooler_hidden_size": 16,
}  # fmt: skip
_ELECTRA = _BERT | {"embedding_size": 8}
_ALBERT = _BERT | {"embedding_size": 8, "classifier_dropout_prob": 0.0}
_MODERNBERT = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "cls_token_id": 1, "sep_token_id": 2, "local_attention": 4,
}  # fmt: skip
_QWEN = _LLAMA | {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2, "tie_word_embeddings": True}
_T5_SIDES = _T5 | {"num_decoder_layers": 1}
_SPOKEN = _SPEECH | {"classifier_proj_size": 8}
_GROUP_NORM = _SPOKEN | {"feat_extract_norm": "group", "do_stable_layer_norm": False, "conv_bias": False}
_WAVLM = _SPOKEN | {"num_buckets": 8, "max_bucket_distance": 16}
_LONGFORMER = _ROBERTA | {"attention_window": [4, 8, 4, 8]}
_AST = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "patch_size": 4,
    "frequency_stride": 4, "time_stride": 4, "max_length": 20, "num_mel_bins": 8, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def _tiny(
    model_class: type[hf.PreTrainedModel], settings: dict[str, Any], stack: str | None, *rest: Any, **more: Any
) -> Tiny:
    return Tiny(model_class, settings, {"layers": stack}, *rest, **more)


def _two_sided(
    model_class: type[hf.PreTrainedModel], settings: dict[str, Any], stack: str, *rest: Any, **more: Any
) -> Tiny:
    stacks = {f"{side}_layers": stack.format(side) for side in ("encoder", "decoder")}
    return Tiny(model_class, settings, stacks, *rest, **more)


MODELS: dict[str, Tiny] = {
    tiny.model_class.__name__ + suffix: tiny
    for suffix, tinies in {
        "": [
            _tiny(hf.BertModel, _BERT, "encoder.layer"),
            _tiny(hf.BertForMaskedLM, _BERT, "bert.encoder.layer"),
            _tiny(hf.BertForPreTraining, _BERT, "bert.encoder.layer"),
            _tiny(hf.BertForSequenceClassification, _BERT | _LABELS, "bert.encoder.layer"),
            _tiny(hf.BertForMultipleChoice, _BERT, "bert.encoder.layer", "choices"),
            _tiny(hf.RobertaForMaskedLM, _ROBERTA, "roberta.encoder.layer"),
            _tiny(hf.RobertaForTokenClassification, _ROBERTA | _LABELS, "roberta.encoder.layer"),
            _tiny(hf.DistilBertForMaskedLM, _DISTILBERT, "distilbert.transformer.layer"),
            _tiny(hf.DistilBertForQuestionAnswering, _DISTILBERT, "distilbert.transformer.layer"),
            _tiny(hf.DebertaV2ForMaskedLM, _DEBERTA, "deberta.encoder.layer"),
            _tiny(hf.DebertaV2ForSequenceClassification, _DEBERTA | _LABELS, "deberta.encoder.layer"),
            _tiny(hf.ElectraForPreTraining, _ELECTRA, "electra.encoder.layer"),
            _tiny(hf.ElectraForMaskedLM, _ELECTRA, "electra.encoder.layer"),
            _tiny(hf.AlbertForMaskedLM, _ALBERT, None),
            _tiny(hf.AlbertForSequenceClassification, _ALBERT | _LABELS, None),
            _tiny(hf.MPNetModel, _ROBERTA, "encoder.layer"),
            _tiny(hf.MPNetForMaskedLM, _ROBERTA, "mpnet.encoder.layer"),
            _tiny(hf.ModernBertForMaskedLM, _MODERNBERT, "model.layers"),
            _tiny(hf.ModernBertForTokenClassification, _MODERNBERT | _LABELS, "model.layers"),
            _tiny(hf.GPT2LMHeadModel, _GPT2, "transformer.h", generates=True),
            _tiny(hf.GPT2ForSequenceClassification, _GPT2 | _LABELS, "transformer.h"),
            _tiny(hf.LlamaForCausalLM, _LLAMA, "model.layers", generates=True),
            _tiny(hf.Qwen2ForCausalLM, _QWEN, "model.layers", generates=True),
            _tiny(hf.Qwen3ForCausalLM, _QWEN | {"head_dim": 8}, "model.layers", generates=True),
            _two_sided(hf.T5ForConditionalGeneration, _T5_SIDES, "{}.block", generates=True),
            _tiny(hf.T5EncoderModel, _T5, "encoder.block"),
            _two_sided(hf.BartForConditionalGeneration, _BART, "model.{}.layers", generates=True),
            _two_sided(hf.BartForSequenceClassification, _BART | _LABELS, "model.{}.layers"),
            _two_sided(hf.MarianMTModel, _BART, "model.{}.layers", generates=True),
            _two_sided(hf.WhisperForConditionalGeneration, _WHISPER, "model.{}.layers", "mel", generates=True),
            _tiny(
                hf.WhisperForAudioClassification, _WHISPER | {"use_weighted_layer_sum": True}, "encoder.layers", "mel"
            ),
            _tiny(hf.Wav2Vec2ForCTC, _SPOKEN, "wav2vec2.encoder.layers", "sound"),
            _tiny(
                hf.Wav2Vec2ForSequenceClassification,
                _SPOKEN | {"use_weighted_layer_sum": True},
                "wav2vec2.encoder.layers",
                "sound",
            ),
            _tiny(hf.HubertForCTC, _SPOKEN, "hubert.encoder.layers", "sound"),
            _tiny(hf.WavLMForCTC, _WAVLM, "wavlm.encoder.layers", "sound"),
            _tiny(hf.ASTForAudioClassification, _AST | _LABELS, "audio_spectrogram_transformer.layers", "spectrogram"),
            _tiny(hf.ViTForImageClassification, _VIT | _LABELS, "vit.layers", "image"),
            _tiny(hf.ViTModel, _VIT, "layers", "image"),
            # Beyond the supported ones: stages of a backbone, stochastic depth, and a window for each layer.
            _tiny(
                hf.Dinov2ForImageClassification,
                _VIT | _LABELS | {"drop_path_rate": 0.1},
                "dinov2.encoder.layer",
                "image",
            ),
            _tiny(hf.BeitForImageClassification, _VIT | _LABELS | {"drop_path_rate": 0.1}, "beit.layers", "image"),
            _tiny(hf.LongformerForMaskedLM, _LONGFORMER, "longformer.encoder.layer"),
        ],
        "_group_norm": [
            _tiny(hf.Wav2Vec2ForCTC, _GROUP_NORM, "wav2vec2.encoder.layers", "sound"),
            _tiny(hf.HubertForSequenceClassification, _GROUP_NORM, "hubert.encoder.layers", "sound"),
            _tiny(hf.WavLMForSequenceClassification, _WAVLM | _GROUP_NORM, "wavlm.encoder.layers", "sound"),
        ],
        "_untied": [_two_sided(hf.T5ForConditionalGeneration, _T5_SIDES | {"tie_word_embeddings": False}, "{}.block")],
    }.items()
    for tiny in tinies
}


def one_an_architecture(names: Iterable[str] = tuple(MODELS)) -> list[Any]:
    """Return parameters of a test; further heads of the same architecture are slow."""
    seen, made = set(), []
    for name in names:
        architecture = re.sub(r"(For(?!MultipleChoice)|Model|LMHead)[A-Za-z]*", "", name)
        made.append(pytest.param(name, marks=pytest.mark.slow if architecture in seen else ()))
        seen.add(architecture)
    return made


def reported(student: Any) -> tuple[Any, Any]:
    """Return a student and its report."""
    return student, report_of(student)
