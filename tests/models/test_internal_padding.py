"""Models that pad internally to a multiple of their attention window: activations are cut to the batch's length.

The expected values come from a batch padded by the collator (`pad_to_multiple_of`), which the model pads no further.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from hf_distill import (
    CosineEmbedding,
    DataError,
    DistillationTrainer,
    Distiller,
    HiddenMatch,
    RelationMatch,
    SettingError,
    SimilarityMatch,
    TeacherCache,
)
from hf_distill.models.capture import ActivationCapture
from hf_distill.objectives import ExitMatch
from hf_distill.signals import EMBEDDINGS, HIDDEN, LAST_HIDDEN, RELATED, ActivationKey
from hf_distill.teachers.cache import BuildOptions
from tests.trainer.tiny import arguments

LENGTH, PADDED = 15, 16  # windows and chunks have 4 or 2 tokens
BERT = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 0}
TWO_SIDED = {
    "vocab_size": 40, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "dropout": 0.0, "pad_token_id": 0,
}  # fmt: skip
BLOCKS = {"attention_type": "block_sparse", "block_size": 2, "num_random_blocks": 1}
PADDING: dict[str, tuple[Any, dict[str, Any], str | None]] = {
    "longformer": (hf.LongformerModel, BERT | QUIET | {"attention_window": 4, "max_position_embeddings": 66}, None),
    "big_bird": (hf.BigBirdModel, BERT | QUIET | BLOCKS | {"max_position_embeddings": 64}, None),
    "led": (
        hf.LEDModel,
        TWO_SIDED
        | {"attention_window": 4, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64},
        "encoder",
    ),
    "bigbird_pegasus": (hf.BigBirdPegasusModel, TWO_SIDED | BLOCKS | {"max_position_embeddings": 64}, "encoder"),
    "pegasus_x": (hf.PegasusXModel, TWO_SIDED | {"block_size": 4, "num_global_tokens": 2}, "encoder"),
    "reformer": (
        hf.ReformerModel,
        {
            "vocab_size": 40, "hidden_size": 16, "attn_layers": ["local", "local"], "num_attention_heads": 2,
            "attention_head_size": 8, "feed_forward_size": 16, "local_attn_chunk_length": 4, "axial_pos_shape": (4, 4),
            "axial_pos_embds_dim": (8, 8), "max_position_embeddings": 16, "is_decoder": False, "pad_token_id": 0,
            "hidden_dropout_prob": 0.0, "local_attention_probs_dropout_prob": 0.0,
        },
        None,
    ),
}  # fmt: skip


@functools.cache
def model_of(name: str, seed: int = 1, dtype: torch.dtype = torch.float64) -> Any:
    """Return a shared model in evaluation mode, which no test may change."""
    model_class, settings, _ = PADDING[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(model_class.config_class(**settings)).eval().to(dtype)
        for parameter in model.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def batch(name: str, length: int = LENGTH) -> dict[str, Tensor]:
    """Return texts of 15, 12 and 9 tokens, padded to `length`."""
    ids = torch.randint(3, 40, (3, LENGTH), generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[1] * count + [0] * (LENGTH - count) for count in (15, 12, 9)])
    ids = ids * mask
    more = (0, length - LENGTH)
    found = {"input_ids": torch.nn.functional.pad(ids, more), "attention_mask": torch.nn.functional.pad(mask, more)}
    return found if PADDING[name][2] is None else {**found, "decoder_input_ids": ids[:, :4]}


def reads_of(name: str) -> set[ActivationKey]:
    side = PADDING[name][2]
    hidden = {ActivationKey(HIDDEN, layer, side) for layer in (EMBEDDINGS, 0, 1)}
    return hidden | {ActivationKey(what, 1, side) for what in RELATED if name != "reformer" or what == "values"}


def read(model: Any, reads: set[ActivationKey], inputs: dict[str, Tensor]) -> Any:
    with torch.no_grad(), ActivationCapture(model, "student").capture(reads) as seen:
        model(**inputs)
    return seen


@pytest.mark.parametrize("name", PADDING)
def test_activations_are_as_long_as_the_batch(name: str) -> None:
    """At every attended position they equal those without internal padding."""
    model, reads = model_of(name), reads_of(name)
    ours, outside = (read(model, reads, batch(name, length)) for length in (LENGTH, PADDED))
    keep = batch(name)["attention_mask"].bool()
    for one in reads:
        assert ours[one].shape[:2] == (3, LENGTH), one
        assert outside[one].shape[:2] == (3, PADDED), one
        torch.testing.assert_close(ours[one][keep], outside[one][:, :LENGTH][keep], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", ["longformer", "led", "pegasus_x"])
def test_activations_equal_those_of_the_example_alone(name: str) -> None:
    """12 tokens are a multiple of the window and need no padding. (BigBird's pattern depends on the length.)"""
    model, side = model_of(name), PADDING[name][2]
    reads = {ActivationKey(HIDDEN, 1, side)}
    among = read(model, reads, batch(name))[ActivationKey(HIDDEN, 1, side)][1, :12]
    inputs = {key: value[1:2, :12] for key, value in batch(name).items()}
    alone = read(model, reads, inputs)[ActivationKey(HIDDEN, 1, side)][0]
    torch.testing.assert_close(among, alone, atol=1e-10, rtol=1e-10)


def objectives(side: str | None) -> list[Any]:
    return [
        HiddenMatch("even", side=side), HiddenMatch([(1, 1)], pooling="last", side=side, name="last"),
        SimilarityMatch(side=side), RelationMatch(relations=["values"], relation_heads=2, side=side),
    ]  # fmt: skip


def terms(student: Any, teacher: Any, side: str | None, inputs: dict[str, Tensor]) -> dict[str, float]:
    distiller = Distiller(student, teacher, objectives=objectives(side), alpha=None, task="embedding", seed=0)
    return {name: value.item() for name, value in distiller(student, inputs).terms.items()}


@pytest.mark.parametrize("name", [name for name in PADDING if name != "reformer"])
def test_losses_equal_those_with_external_padding(name: str) -> None:
    """The error used to be that student and teacher have different tokenizers."""
    student, teacher, side = model_of(name), model_of(name, 2), PADDING[name][2]
    inside, outside = (terms(student, teacher, side, batch(name, length)) for length in (LENGTH, PADDED))
    assert inside == pytest.approx(outside, rel=1e-6) and all(value > 0 for value in inside.values())
    s, t = (read(model, {ActivationKey(HIDDEN, 1, side)}, batch(name, PADDED)) for model in (student, teacher))
    last = [one[ActivationKey(HIDDEN, 1, side)][torch.arange(3), [14, 11, 8]] for one in (s, t)]
    assert inside["last"] == pytest.approx((last[0] - last[1]).square().mean().item(), rel=1e-9)


@pytest.mark.parametrize("name", ["longformer", "led"])
def test_queries_of_a_time_first_block(name: str) -> None:
    """With eight examples of eight tokens, a transposed mask would fit too. By hand from the block's input."""
    model, side = model_of(name), PADDING[name][2]
    ids = torch.randint(3, 40, (8, 8), generator=torch.Generator().manual_seed(4))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs |= {"decoder_input_ids": ids[:, :4]} if side else {}
    seen = read(model, {ActivationKey(HIDDEN, 0, side), *(ActivationKey(what, 1, side) for what in RELATED)}, inputs)
    stream = seen[ActivationKey(HIDDEN, 0, side)]
    block = model.encoder.layer[1] if name == "longformer" else model.encoder.layers[1]
    attention = block.attention.self if name == "longformer" else block.self_attn.longformer_self_attn
    for what, projection in zip(RELATED, (attention.query, attention.key, attention.value), strict=True):
        with torch.no_grad():
            torch.testing.assert_close(seen[ActivationKey(what, 1, side)], projection(stream), atol=1e-10, rtol=1e-10)


def test_a_decoder_without_internal_padding_is_not_cut() -> None:
    seen = read(model_of("led"), {ActivationKey(HIDDEN, 1, "decoder")}, batch("led"))
    assert seen[ActivationKey(HIDDEN, 1, "decoder")].shape == (3, 4, 16)


def test_a_reformer_can_be_a_teacher_but_not_a_student() -> None:
    """Its blocks run in a custom autograd function that hides the graph."""
    torch.manual_seed(3)
    bert = hf.BertModel(hf.BertConfig(**BERT, **QUIET)).eval().double()
    reformer, inputs = model_of("reformer"), batch("reformer")
    found = Distiller(bert, reformer, objectives=HiddenMatch([(1, 1)]), alpha=None)(bert, inputs).loss.item()
    with torch.no_grad():
        s = bert(**inputs, output_hidden_states=True).hidden_states[2]
    t = read(reformer, {ActivationKey(HIDDEN, 1)}, batch("reformer", PADDED))[ActivationKey(HIDDEN, 1)][:, :LENGTH]
    keep = inputs["attention_mask"].bool()
    assert found == pytest.approx((s - t).square().mean(-1)[keep].mean().item(), rel=1e-9)
    student = hf.ReformerModel(reformer.config).double().eval()
    with pytest.raises(SettingError, match=r"no gradient: .*Reformer, which can only be a teacher here"):
        Distiller(student, reformer, objectives=HiddenMatch([(1, 1)]), alpha=None)(student, batch("reformer", PADDED))


@pytest.mark.parametrize("name", ["longformer", "big_bird"])
def test_a_cached_teacher_equals_the_live_one(name: str, tmp_path: Path) -> None:
    student, teacher, inputs = model_of(name, 1, torch.float32), model_of(name, 2, torch.float32), batch(name)
    matched = [HiddenMatch([(0, 0), (1, 1)]), RelationMatch(relations=["queries"], relation_heads=2)]
    data = [
        {key: value[i][: int(inputs["attention_mask"][i].sum())] for key, value in inputs.items()} for i in range(3)
    ]

    def collate(rows: Any) -> dict[str, Tensor]:
        return {key: torch.nn.utils.rnn.pad_sequence([row[key] for row in rows], True) for key in rows[0]}

    cache = TeacherCache.build(
        teacher, data, tmp_path / "cache", student=student, objectives=matched, task="embedding",
        options=BuildOptions(activation_dtype="float32"), data_collator=collate, progress=False,
    )  # fmt: skip
    live, cached = (
        Distiller(student, one, objectives=matched, alpha=None, task="embedding")(student, inputs).terms
        for one in (teacher, cache)
    )
    assert {key: value.item() for key, value in cached.items()} == pytest.approx(
        {key: value.item() for key, value in live.items()}, rel=1e-5
    )


def test_token_exits_use_the_unpadded_length() -> None:
    """Once rows were selected from the longer hidden state with the indices of the shorter."""
    torch.manual_seed(1)
    student = hf.LongformerForTokenClassification(
        hf.LongformerConfig(**BERT, **QUIET, attention_window=4, max_position_embeddings=66, num_labels=3)
    ).eval()
    distiller = Distiller(student, alpha=0.0, objectives=ExitMatch([0], alpha=0.5), seed=0)
    found = []
    for length in (LENGTH, PADDED):
        inputs = batch("longformer", length)
        labels = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"] % 3, -100)
        found.append(distiller(student, inputs | {"labels": labels}).terms["exits"].item())
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_training_a_model_with_internal_padding(tmp_path: Path) -> None:
    def longformer(layers: int) -> Any:
        return hf.LongformerForSequenceClassification(
            hf.LongformerConfig(
                **(BERT | {"num_hidden_layers": layers}), **QUIET, attention_window=4, max_position_embeddings=66
            )
        )

    trainer = DistillationTrainer(
        model=longformer(1),
        teacher_model=longformer(2),
        objectives=[HiddenMatch("last"), CosineEmbedding()],
        args=arguments(tmp_path, alpha=None, max_steps=1, logging_steps=1),
        train_dataset=[{"input_ids": [2, 5, 6, 7, 8, 3], "attention_mask": [1] * 6, "labels": i % 2} for i in range(8)],
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss/hidden"] > 0


def test_the_error_for_unknown_internal_padding_names_pad_to_multiple_of() -> None:
    student, teacher, inputs = model_of("longformer"), model_of("longformer", 2), batch("longformer")
    inputs["teacher_input_ids"] = torch.ones(3, 20, dtype=torch.long)
    distiller = Distiller(student, teacher, objectives=HiddenMatch(), alpha=None, task="embedding")
    with pytest.raises(DataError, match=r"of the teacher are at \[3, 20\].*pad_to_multiple_of"):
        distiller(student, inputs)


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_fsmt_computes_time_first_and_raises(side: str) -> None:
    sizes = {key: value for key, value in TWO_SIDED.items() if key not in ("vocab_size", "pad_token_id")}
    student, teacher = (
        hf.FSMTForConditionalGeneration(
            hf.FSMTConfig(langs=["en", "de"], src_vocab_size=40, tgt_vocab_size=40, pad_token_id=1, **sizes)
        )
        for _ in range(2)
    )
    with pytest.raises(SettingError, match=r"\(FSMTForConditionalGeneration\) computes on \[time, example\]"):
        Distiller(student, teacher, objectives=HiddenMatch(side=side), alpha=None)


def test_last_hidden_is_as_long_as_the_batch() -> None:
    for name in PADDING:
        wanted = ActivationKey(LAST_HIDDEN, 0, PADDING[name][2])
        assert read(model_of(name), {wanted}, batch(name))[wanted].shape[:2] == (3, LENGTH)
