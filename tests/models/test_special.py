"""Layerdrop, unusual axes, adapters, exceptions and copies; only requested activations are kept."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from transformers import AttentionInterface

from hf_distill import (
    AttentionMatch,
    CosineEmbedding,
    Distiller,
    HiddenMatch,
    RelationMatch,
    SettingError,
    SimilarityMatch,
)
from hf_distill.models.capture import ActivationCapture, AttentionRecord
from hf_distill.signals import ActivationKey
from tests.heads import HEADS
from tests.laws.test_l9_activations import hooks_of
from tests.models.capturing import ALL, model_of, read, reads

# peft asks by the old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

# Layerdrop: a dropped block passes its input on.

DROPPING = {
    "wav2vec2_ctc_mean": ({"layerdrop": 0.3}, "hidden_states", None),
    "hubert_ctc_sum": ({"layerdrop": 0.3}, "hidden_states", None),
    "bart_seq2seq": ({"decoder_layerdrop": 0.3}, "decoder_hidden_states", "decoder"),
}


@pytest.mark.parametrize("name", DROPPING)
def test_a_dropped_block_has_its_input_as_hidden_state(name: str) -> None:
    settings, shown, side = DROPPING[name]
    student = HEADS[name].make(1, layers=4, **settings).train()
    batch, wanted = HEADS[name].batch(2), reads("hidden", side, range(-1, 4))
    left_out = 0
    for seed in (0, 1, 4, 5):
        runs: list[object] = []
        hooks = [
            block.register_forward_hook(lambda *_: runs.append(1))  # noqa: B023 (removed before the next seed)
            for block in ActivationCapture(student, "student").blocks(side).modules
        ]
        torch.manual_seed(seed)
        seen, outputs = read(student, wanted, batch, output_hidden_states=True)
        for hook in hooks:
            hook.remove()
        left_out += 4 - len(runs)
        by_hand = outputs[shown]
        if len(by_hand) == 5:  # BART returns nothing for a dropped layer
            assert all(torch.equal(seen[one], by_hand[one.layer + 1]) for one in wanted)
        else:
            kept = {id_of(x) for x in by_hand}
            assert {id_of(value) for value in seen.values()} == kept
    assert left_out > 3


def id_of(x: torch.Tensor) -> bytes:
    return x.numpy().tobytes()


@pytest.mark.parametrize("objective", [AttentionMatch, RelationMatch])
def test_activations_inside_a_dropped_block_raise(objective: Any) -> None:
    """Before the first step or in it: the attention of a dropped block is unknown."""
    head = HEADS["hubert_ctc_sum"]
    student, teacher = head.make(1, layers=2, layerdrop=0.9).train(), head.make(2, layers=2)
    with pytest.raises(SettingError, match="layerdrop"):
        torch.manual_seed(0)
        Distiller(student, teacher, alpha=None, objectives=objective("even"))(student, head.batch(2))


def test_a_teacher_with_layerdrop_runs_all_blocks() -> None:
    head = HEADS["hubert_ctc_sum"]
    student, teacher = head.make(1, layers=2), head.make(2, layers=3, layerdrop=0.9).train()
    distiller = Distiller(student, teacher, alpha=None, objectives=AttentionMatch("even"))
    batch = head.batch(2)
    assert distiller(student, batch).loss == distiller(student, batch).loss


# Unusual axes and sides.


def test_time_first_blocks_raise() -> None:
    """With as many examples as positions, a transposed mask would fit unnoticed."""
    config = hf.XLNetConfig(vocab_size=40, d_model=16, n_layer=2, n_head=2, d_inner=16)
    student, teacher = (hf.XLNetForSequenceClassification(config) for _ in range(2))
    with pytest.raises(SettingError, match=r"\(XLNetForSeq.*\) computes on \[time, example\].* Compare pred"):
        Distiller(student, teacher, objectives=HiddenMatch())


@pytest.mark.parametrize("objective", [HiddenMatch, AttentionMatch, RelationMatch, SimilarityMatch, CosineEmbedding])
def test_an_encoder_whose_config_also_describes_a_decoder(objective: Any) -> None:
    """Whisper's classifier: all frames are matched, so each example counts once."""
    head = HEADS["whisper_seq2seq"]
    student, teacher = (hf.WhisperForAudioClassification(head.make(seed).config) for seed in (1, 2))
    batch = {"input_features": head.batch(2)["input_features"], "labels": torch.tensor([0, 1])}
    distiller = Distiller(student, teacher, alpha=None, objectives=objective(name="inside"))
    assert distiller.objectives["inside"].count(distiller.task, batch) == 2
    distiller(student, batch).loss.backward()
    assert student.encoder.layers[0].self_attn.q_proj.weight.grad.any()


# Adapters.


def lora(targets: list[str]) -> Any:
    student = get_peft_model(
        HEADS["bert_tokens"].make(1, layers=2), LoraConfig(task_type="TOKEN_CLS", target_modules=targets)
    )
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:  # zero-initialized, so the adapter would change nothing
                parameter.normal_(std=0.3)
    return student


def test_activations_include_the_adapter() -> None:
    """Queries come from the adapted projection, and equal those of the merged model."""
    student, batch = lora(["query", "value"]), HEADS["bert_tokens"].batch(2)
    wanted = [ActivationKey("queries", 1), ActivationKey("hidden", 0), ActivationKey("last_hidden", 0)]
    adapted, _ = read(student.eval(), wanted, batch)
    with student.disable_adapter():
        plain, _ = read(student, wanted, batch)
    merged, _ = read(copy.deepcopy(student).merge_and_unload().eval(), wanted, batch)
    for one in wanted:
        assert not torch.allclose(adapted[one], plain[one], atol=1e-3)
        torch.testing.assert_close(adapted[one], merged[one], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("objective", [HiddenMatch, CosineEmbedding, AttentionMatch, RelationMatch])
def test_an_adapter_is_trained_by_objectives_on_activations(objective: Any) -> None:
    head, student = HEADS["bert_tokens"], lora(["query", "key", "value"])
    distiller = Distiller(student, head.make(2, layers=3, width=24), alpha=None, objectives=objective(), seed=0)
    distiller(student, head.batch(4)).loss.backward()
    learning = {name for name, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    assert learning and all("lora_" in name for name in learning)


def test_a_block_above_only_frozen_parameters_raises() -> None:
    head, student = HEADS["bert_tokens"], lora(["dense"])  # only frozen weights produce block 0's queries
    distiller = Distiller(student, head.make(2, layers=3, width=24), alpha=None, objectives=AttentionMatch("even"))
    with pytest.raises(SettingError, match=r"attention of block 0 of the student has no gradient: .* or match a block"):
        distiller(student, head.batch(2))


def test_a_trainable_key_bias_is_enough() -> None:
    head, student = HEADS["bert_tokens"], lora(["key"])
    distiller = Distiller(student, head.make(2, layers=3, width=24), alpha=None, objectives=AttentionMatch("even"))
    distiller(student, head.batch(2)).loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in student.parameters())


# Hooks and memory.


class Broken(RuntimeError):
    pass


def test_hooks_are_removed_after_an_exception_in_the_forward() -> None:
    name = "BertForMaskedLM"
    model = ALL[name].make()
    inside = ActivationCapture(model, "student")
    lookup = AttentionInterface.get_interface

    def breaks(*_: Any) -> None:
        raise Broken

    hook = model.bert.encoder.layer[2].register_forward_pre_hook(breaks)
    wanted = {*reads("hidden"), *reads("attention"), *reads("values"), ActivationKey("last_hidden")}
    with pytest.raises(Broken), inside.capture(wanted):
        model(**ALL[name].batch())
    hook.remove()
    assert hooks_of(model) == 0
    assert AttentionInterface.get_interface is lookup
    with inside.capture(wanted) as seen:
        model(**ALL[name].batch())
    assert set(seen) == wanted


def test_a_bound_model_can_be_copied_and_pickled() -> None:
    """Between forwards no hook is left that a copy would contain."""
    head = HEADS["bert_tokens"]
    student, teacher, batch = head.make(1, layers=2), head.make(2, layers=3, width=24), head.batch(2)
    objectives = [HiddenMatch(), AttentionMatch(), RelationMatch()]
    distiller = Distiller(student, teacher, alpha=None, objectives=objectives, seed=0)
    expected = distiller(student, batch).loss.item()
    for other in (copy.deepcopy(student), pickle.loads(pickle.dumps(student))):
        again = Distiller(
            other, teacher, alpha=None, objectives=[HiddenMatch(), AttentionMatch(), RelationMatch()], seed=0
        )
        assert again(other, batch).loss.item() == pytest.approx(expected, rel=1e-5)


def test_only_matched_layers_are_kept() -> None:
    """Outputs of other blocks are freed after the forward, and their attentions are never recorded."""
    name = "BertForMaskedLM"
    model = model_of(name)
    alive: dict[int, Any] = {}
    hooks = [
        block.register_forward_hook(lambda _, __, output, i=i: alive.update({i: weakref.ref(output)}))
        for i, block in enumerate(model.bert.encoder.layer)
    ]
    seen, outputs = read(model, [ActivationKey("hidden", 1), ActivationKey("attention", 2)], ALL[name].batch())
    for hook in hooks:
        hook.remove()
    del outputs
    gc.collect()
    assert [i for i, output in alive.items() if output() is not None] == [1]
    assert set(seen) == {ActivationKey("hidden", 1), ActivationKey("attention", 2)}
    assert sum(isinstance(value, AttentionRecord) for value in seen.values()) == 1
    del seen
    gc.collect()
    assert all(output() is None for output in alive.values())


def test_no_hooks_without_requested_activations() -> None:
    model = ALL["BertForMaskedLM"].make()
    with ActivationCapture(model, "student").capture(set()) as seen:
        assert hooks_of(model) == 0
    assert not seen


def test_capture_without_a_forward_raises() -> None:
    with (
        pytest.raises(
            SettingError,
            match=r"of block 1 of the teacher \(bert\.encoder\.layer\): no block ran\. The model that was",
        ),
        ActivationCapture(model_of("BertForMaskedLM"), "teacher").capture({ActivationKey("hidden", 1)}),
    ):
        pass
