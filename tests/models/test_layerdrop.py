"""Layerdrop: the hidden states around dropped blocks, one or all of them; no draw stops a training.

Hidden states that bypass the whole stack are checked against the model's output, which is the stack's input, up to the
norm that follows the blocks.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from hf_distill import (
    AttentionMatch,
    CosineEmbedding,
    DistillationTrainer,
    Distiller,
    HiddenMatch,
    RDropTeacher,
    RelationMatch,
    SettingError,
)
from hf_distill.models.capture import ActivationCapture, layerdrop_of
from hf_distill.signals import EMBEDDINGS, HIDDEN, LAST_HIDDEN, ActivationKey
from tests.trainer.tiny import arguments

# peft asks by the old name
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_.*` is deprecated:FutureWarning"),  # and not yet
    pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning"),  # WavLM's own call
]

SPEECH = {
    "vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
    "conv_dim": (8,), "conv_kernel": (10,), "conv_stride": (20,), "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False, "pad_token_id": 0,
}  # fmt: skip
SIDES = {
    "vocab_size": 40, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
STABLE = {"do_stable_layer_norm": True, "feat_extract_norm": "layer"}
MELS = {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 16}


@dataclass(frozen=True)
class Dropping:
    """An architecture with layerdrop. norm: the path of the norm behind the blocks, or None."""

    model: Any
    settings: dict[str, Any]
    rate: str
    side: str | None = None
    norm: str | None = None
    listens_to: str = "sound"

    def make(self, rate: float, seed: int = 1) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.model(self.model.config_class(**self.settings, **{self.rate: rate})).train()

    def batch(self) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(3)
        ids = torch.randint(3, 20, (2, 6), generator=draw)
        if self.listens_to == "sound":
            mask = torch.ones(2, 400, dtype=torch.long)
            mask[1, 300:] = 0
            return {"input_values": torch.randn(2, 400, generator=draw), "attention_mask": mask}
        if self.listens_to == "mel":
            return {"input_features": torch.randn(2, 8, 20, generator=draw), "decoder_input_ids": ids}
        if self.listens_to == "frames":
            return {"input_features": torch.randn(2, 20, 8, generator=draw)}
        text = {"input_ids": ids, "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2])}
        return text if self.side is None else {**text, "decoder_input_ids": ids}


def _sides(model: Any, norms: tuple[str | None, str | None], main_input: str, **settings: Any) -> dict[str, Dropping]:
    name = model.__name__.removesuffix("Model")
    return {
        f"{name} {side}": Dropping(model, {**SIDES, **settings}, f"{side}_layerdrop", side, norm, main_input)
        for side, norm in zip(("encoder", "decoder"), norms, strict=True)
    }


DROPPING = {
    "Hubert": Dropping(hf.HubertModel, SPEECH, "layerdrop"),
    "Hubert stable": Dropping(hf.HubertModel, SPEECH | STABLE, "layerdrop", norm="encoder.layer_norm"),
    "Hubert batch norm": Dropping(hf.HubertModel, SPEECH | {"conv_pos_batch_norm": True}, "layerdrop"),
    "Wav2Vec2": Dropping(hf.Wav2Vec2Model, SPEECH, "layerdrop"),
    "Wav2Vec2 stable": Dropping(hf.Wav2Vec2Model, SPEECH | STABLE, "layerdrop", norm="encoder.layer_norm"),
    "Data2VecAudio": Dropping(hf.Data2VecAudioModel, SPEECH | {"conv_pos_kernel_size": 3}, "layerdrop"),
    "UniSpeech": Dropping(hf.UniSpeechModel, SPEECH, "layerdrop"),
    "UniSpeechSat": Dropping(hf.UniSpeechSatModel, SPEECH, "layerdrop"),
    "WavLM": Dropping(hf.WavLMModel, SPEECH | {"num_buckets": 8, "max_bucket_distance": 16}, "layerdrop"),
    "SEW": Dropping(hf.SEWModel, SPEECH | {"squeeze_factor": 1}, "layerdrop", norm="encoder.upsample"),
    "Wav2Vec2Conformer": Dropping(
        hf.Wav2Vec2ConformerModel, SPEECH | {"conv_depthwise_kernel_size": 3}, "layerdrop", norm="encoder.layer_norm"
    ),
    "Wav2Vec2Bert": Dropping(
        hf.Wav2Vec2BertModel,
        {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
         "feature_projection_input_dim": 8, "conv_depthwise_kernel_size": 3, "apply_spec_augment": False},
        "layerdrop", listens_to="frames",
    ),
    **_sides(hf.BartModel, (None, None), "text"),
    **_sides(hf.MBartModel, ("encoder.layer_norm", "decoder.layer_norm"), "text"),
    **_sides(hf.PegasusModel, ("encoder.layer_norm", "decoder.layer_norm"), "text"),
    **_sides(hf.WhisperModel, ("encoder.layer_norm", "decoder.layer_norm"), "mel", **MELS),
    "OPT": Dropping(
        hf.OPTModel,
        {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 16,
         "max_position_embeddings": 16, "word_embed_proj_dim": 16},
        "layerdrop", norm="decoder.final_layer_norm", listens_to="text",
    ),
}  # fmt: skip


def all_keys(case: Dropping, count: int = 2) -> set[ActivationKey]:
    return {ActivationKey(HIDDEN, layer, case.side) for layer in range(EMBEDDINGS, count)} | {
        ActivationKey(LAST_HIDDEN, 0, case.side)
    }


def run(
    model: Any, inside: ActivationCapture, case: Dropping, seed: int
) -> tuple[Any, list[tuple[int, Tensor, Tensor]]]:
    """Run one forward; return its activations and, from separate hooks, each block's input and output."""
    ran: list[tuple[int, Tensor, Tensor]] = []

    def note(layer: int) -> Any:
        def hook(module: Any, args: Any, keywords: Any, output: Any) -> None:
            given = args[0] if args else keywords["hidden_states"]
            ran.append((layer, given, output if isinstance(output, Tensor) else output[0]))

        return hook

    blocks = inside.blocks(case.side).modules
    hooks = [block.register_forward_hook(note(i), with_kwargs=True) for i, block in enumerate(blocks)]
    torch.manual_seed(seed)
    with inside.capture(all_keys(case)) as seen:
        model(**case.batch())
    for hook in hooks:
        hook.remove()
    return seen, ran


@pytest.mark.parametrize("name", DROPPING)
def test_hidden_states_of_dropped_blocks_for_every_draw(name: str) -> None:
    """Layer k is the output of the last block up to k that ran, or else the stack's input."""
    case = DROPPING[name]
    model, left_out = case.make(0.6), set()
    inside, norm = ActivationCapture(model, "student"), None if case.norm is None else model.get_submodule(case.norm)
    for seed in range(12):
        seen, ran = run(model, inside, case, seed)
        left_out.add(tuple(layer for layer, _, _ in ran))
        last = seen[ActivationKey(LAST_HIDDEN, 0, case.side)]
        stream = ran[0][1] if ran else seen[ActivationKey(HIDDEN, EMBEDDINGS, case.side)]
        assert torch.equal(seen[ActivationKey(HIDDEN, EMBEDDINGS, case.side)], stream)
        outputs = {layer: output for layer, _, output in ran}
        for layer in (0, 1):
            stream = outputs.get(layer, stream)
            assert torch.equal(seen[ActivationKey(HIDDEN, layer, case.side)], stream), (seed, layer)
        behind = stream if norm is None else norm(stream)
        torch.testing.assert_close(behind, last, atol=1e-6, rtol=1e-6)
        assert seen[ActivationKey(HIDDEN, 1, case.side)].requires_grad
    assert len(left_out) > 2 or name == "WavLM"  # WavLM always keeps its first block
    assert (() in left_out) != (name == "WavLM")


@pytest.mark.parametrize("name", DROPPING)
def test_capturing_changes_neither_draws_nor_outputs_nor_statistics(name: str) -> None:
    """If all blocks are dropped, the stack runs once more; nothing else may change."""
    case = DROPPING[name]
    read, unread = case.make(1.0), case.make(1.0)
    inside = ActivationCapture(read, "student")
    for seed in range(2):
        found = []
        for model, reads in ((read, all_keys(case)), (unread, set())):
            torch.manual_seed(seed)
            with inside.capture(reads):
                found.append((model(**case.batch()), torch.get_rng_state()))
        (ours, state), (theirs, expected) = found
        assert torch.equal(state, expected)
        assert torch.equal(ours[0], theirs[0])
    for (key, buffer), other in zip(read.named_buffers(), unread.buffers(), strict=True):
        assert torch.equal(buffer, other), key
    assert layerdrop_of(inside.blocks(case.side).holder) == 1.0


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("name", ["Hubert", "Wav2Vec2", "UniSpeech", "Bart encoder"])
def test_loss_and_gradient_when_all_blocks_are_dropped(name: str) -> None:
    """They equal those of the last hidden state, with dropout and masks."""
    case = DROPPING[name]
    student, teacher, batch = case.make(1.0), case.make(0.0, seed=2).eval(), case.batch()
    distiller = Distiller(
        student, teacher, objectives=HiddenMatch([(1, 1)], side=case.side), alpha=None, task="embedding"
    )
    torch.manual_seed(0)
    found = distiller(student, batch)
    found.loss.backward()
    ours = gradients(student)
    with torch.no_grad():
        (aim,) = [x for _, x in sorted(captured_hidden(teacher, case, 1).items())]
    torch.manual_seed(0)
    outputs = student(**batch)
    last = outputs.encoder_last_hidden_state if case.side == "encoder" else outputs.last_hidden_state
    keep = distiller.objectives["hidden"]._positions.keep(batch)
    expected = (last - aim).square().mean(-1)[keep].mean()
    expected.backward()
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    theirs = gradients(student)
    assert theirs.keys() == {name for name, gradient in ours.items() if gradient is not None}
    for key, gradient in theirs.items():
        torch.testing.assert_close(ours[key], gradient, atol=1e-7, rtol=1e-4)


def captured_hidden(model: Any, case: Dropping, layer: int) -> dict[ActivationKey, Tensor]:
    wanted = ActivationKey(HIDDEN, layer, case.side)
    with ActivationCapture(model, "teacher").capture({wanted}) as seen:
        model(**case.batch())
    return {wanted: seen[wanted]}


@pytest.mark.parametrize("alpha", [None, 0.5])
@pytest.mark.parametrize("mixed", [False, True], ids=["fp32", "bf16"])
def test_a_labelled_backward_after_all_blocks_are_dropped(alpha: float | None, mixed: bool) -> None:
    """HuBERT zeroes the padded frames of its encoder's input in place, and the backward needs that input."""

    def make(seed: int, rate: float) -> Any:
        torch.manual_seed(seed)
        return hf.HubertForCTC(hf.HubertConfig(**SPEECH, layerdrop=rate, ctc_loss_reduction="mean"))

    student, teacher = make(1, 1.0).train(), make(2, 0.0)
    batch = DROPPING["Hubert"].batch() | {"labels": torch.tensor([[3, 4], [5, -100]])}
    distiller = Distiller(student, teacher, objectives=[HiddenMatch([(0, 0), (1, 1)]), CosineEmbedding()], alpha=alpha)
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            found = distiller(student, batch)
        found.loss.backward()
        assert found.loss.isfinite()
    assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)
    assert student.hubert.feature_projection.projection.weight.grad.any()


@pytest.mark.parametrize("reentrant", [True, False])
def test_dropped_blocks_under_gradient_checkpointing(reentrant: bool) -> None:
    case = DROPPING["Bart encoder"]
    student, teacher, batch = case.make(0.6), case.make(0.0, seed=2), case.batch()
    student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    distiller = Distiller(
        student, teacher, objectives=HiddenMatch([(1, 1)], side="encoder"), alpha=None, task="embedding"
    )
    for seed in range(8):
        torch.manual_seed(seed)
        distiller(student, batch).loss.backward()
        assert student.encoder.embed_tokens.weight.grad.any()


@pytest.mark.parametrize("rate", [1.0, 0.6])
def test_adapters_of_dropped_blocks_get_no_gradient(rate: float) -> None:
    """Then nothing trainable is in the stream; the step continues with its other micro-batches."""
    case = DROPPING["Hubert"]
    student = get_peft_model(case.make(rate), LoraConfig(target_modules=["q_proj"])).train()
    teacher, batch = case.make(0.0, seed=2), case.batch()
    distiller = Distiller(
        student, teacher, objectives=[HiddenMatch([(0, 0)]), CosineEmbedding()], alpha=None, task="embedding"
    )
    learned = 0
    for seed in range(12):
        torch.manual_seed(seed)
        distiller(student, batch).loss.backward()
        learned += any(p.grad is not None and bool(p.grad.any()) for p in student.parameters())
        student.zero_grad()
    assert learned == 0 if rate == 1.0 else 0 < learned < 12


def test_layers_above_only_frozen_parameters_still_raise() -> None:
    """Layerdrop is not the cause there."""
    case = DROPPING["Bart encoder"]
    student = case.make(0.0)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_("layers.1" in name)
    objective = HiddenMatch([(0, 0)], side="encoder")
    distiller = Distiller(student, case.make(0.0, seed=2), objectives=objective, alpha=None, task="embedding")
    with pytest.raises(SettingError, match="hidden of block 0 of the student has no gradient"):
        distiller(student, case.batch())


def test_rdrop_with_layerdrop() -> None:
    """Each pass drops its own blocks."""
    case = DROPPING["Hubert"]
    student, batch = case.make(0.8), case.batch()
    distiller = Distiller(student, RDropTeacher(), objectives=HiddenMatch([(1, 1)]), alpha=None, task="embedding")
    losses = [distiller(student, batch).loss for _ in range(12)]
    assert all(loss.isfinite() for loss in losses) and len({loss.item() for loss in losses}) > 3


@pytest.mark.parametrize("objective", [AttentionMatch, RelationMatch])
@pytest.mark.parametrize("name", DROPPING)
def test_activations_inside_droppable_blocks_raise_before_training(name: str, objective: Any) -> None:
    """The attention of a dropped block is unknown."""
    case = DROPPING[name]
    student, teacher = case.make(0.1), case.make(0.0, seed=2)
    with pytest.raises(SettingError, match=r"skips blocks at random \(layerdrop=0\.1\)"):
        Distiller(student, teacher, alpha=None, objectives=objective("even", side=case.side), task="embedding")


def test_a_training_with_a_high_drop_rate_finishes(tmp_path: Any) -> None:
    """With transformers' default of 0.1, trainings of two blocks once stopped after 62 and 168 steps."""
    case = DROPPING["Hubert"]
    student, teacher = case.make(0.8), case.make(0.0, seed=2)
    before = copy.deepcopy(student.state_dict())
    trainer = DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=arguments(tmp_path, alpha=None, max_steps=25, logging_steps=1, per_device_train_batch_size=2),
        train_dataset=[{"input_values": torch.randn(400)} for _ in range(4)],
        objectives=HiddenMatch([(-1, 0), (-1, -1)]),
    )
    trainer.train()
    assert trainer.state.global_step == 25
    assert not torch.equal(before["feature_projection.projection.weight"], student.feature_projection.projection.weight)


def test_an_error_names_a_stack_whose_blocks_are_not_called() -> None:
    """SqueezeBERT calls `block.forward`, which bypasses hooks; the error used to blame another model."""
    groups = {f"{one}_groups": 2 for one in ("q", "k", "v", "intermediate", "output")}
    shape = {"vocab_size": 20, "hidden_size": 16, "embedding_size": 16, "num_hidden_layers": 2, **groups}
    student, teacher = (
        hf.SqueezeBertModel(
            hf.SqueezeBertConfig(**shape, num_attention_heads=2, intermediate_size=16, post_attention_groups=1)
        )
        for _ in range(2)
    )
    distiller = Distiller(student, teacher, objectives=HiddenMatch(), alpha=None)
    with pytest.raises(SettingError, match=r"no block ran as a module\. SqueezeBertEncoder bypasses the hooks"):
        distiller(student, {"input_ids": torch.tensor([[1, 2, 3]])})


def test_layerdrop_rate_of_a_stack() -> None:
    def rate(model: Any, side: str | None = None) -> float:
        return layerdrop_of(ActivationCapture(model, "student").blocks(side).holder)

    assert {name: rate(case.make(0.3), case.side) for name, case in DROPPING.items()} == dict.fromkeys(DROPPING, 0.3)
    assert rate(DROPPING["Bart encoder"].make(0.3), "decoder") == 0.0
    assert layerdrop_of(nn.Linear(1, 1)) == 0.0
    bert = hf.BertModel(hf.BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1))
    assert rate(bert) == 0.0


@pytest.mark.parametrize("name", ["Hubert", "Bart decoder"])
def test_a_teacher_never_drops_blocks(name: str) -> None:
    """However it is passed, a teacher in evaluation mode drops nothing."""
    case = DROPPING[name]
    student, losses = case.make(0.0).eval(), []
    for teacher in (case.make(1.0, seed=2).train(), case.make(0.0, seed=2)):
        objective = HiddenMatch([(1, 1)], side=case.side)
        distiller = Distiller(student, teacher, objectives=objective, alpha=None, task="embedding")
        losses.append(distiller(student, case.batch()).loss.item())
    assert losses[0] == losses[1]
