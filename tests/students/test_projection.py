"""`narrow(width="projection")`: a rotation changes nothing, a subspace is found, other models raise errors."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from hf_distill.errors import DataError, SettingError, TeacherError
from hf_distill.students import inherit
from hf_distill.students.narrow.narrow import narrow
from tests.students.models import MODELS, reported
from tests.students.narrow_models import teacher_of
from tests.students.projection_models import NAMES, keep_in_subspace, logits, make, tiny_of

TIED = ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "T5ForConditionalGeneration", "Gemma", "mT5")


def projected(teacher: Any, hidden: int, batch: dict[str, torch.Tensor], **others: Any) -> tuple[Any, Any]:
    return reported(narrow(teacher, hidden=hidden, data=[batch], width="projection", **others))


def random_basis(width: int, kept: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.linalg.qr(torch.randn(width, kept, generator=generator, dtype=torch.float64)).Q


@pytest.mark.parametrize("name", NAMES)
def test_a_rotation_changes_nothing(name: str) -> None:
    """As many directions as channels (SliceGPT's computational invariance): the tensors change, the logits do not."""
    teacher, batch = make(name), tiny_of(name).batch()
    student, report = projected(teacher, 16, batch)
    assert_close(logits(student, batch), logits(teacher, batch), rtol=0, atol=1e-10)
    table, before = student.get_input_embeddings().weight, teacher.get_input_embeddings().weight
    assert (table - before).abs().max() > 0.01
    assert_close(table @ table.T, before @ before.T, rtol=1e-10, atol=1e-10)  # rotated, not scaled
    norms = {n: p for n, p in student.named_parameters() if "norm" in n and p.shape == (16,)}
    assert norms and all((one == (0.0 if name == "Gemma" else 1.0)).all() for one in norms.values())
    assert report.projected == pytest.approx(1.0) and report.importance is None and not report.kept
    check_weight_tying(name, student, report)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "T5ForConditionalGeneration", "Gemma", "Llama with biases"])
def test_hidden_states_in_a_subspace_are_reproduced_exactly(name: str, tmp_path: Path) -> None:
    """The hidden states lie in 12 of 16 directions, none of them a channel: 12 are enough for any eps."""
    settings = {"layer_norm_epsilon": 0.1} if "T5" in name else {"rms_norm_eps": 0.1}
    teacher, tiny = make(name, **settings), tiny_of(name)
    batch = tiny.batch()
    keep_in_subspace(teacher, random_basis(16, 12))
    theirs = logits(teacher, batch)
    student, report = projected(teacher, 12, batch)
    assert_close(logits(student, batch), theirs, rtol=0, atol=1e-9)
    assert report.projected == pytest.approx(1.0, abs=1e-12)
    student.save_pretrained(tmp_path)
    again, loading = tiny.model_class.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float64)
    assert not any(loading.values()), loading
    saved = student.state_dict()
    assert all(torch.equal(tensor, saved[key]) for key, tensor in again.state_dict().items())
    assert_close(logits(again.eval(), batch), logits(student, batch), rtol=0, atol=1e-7)  # Gemma's √12 is a float32


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "T5ForConditionalGeneration", "Gemma"])
def test_projection_loses_less_than_importance(name: str) -> None:
    """A twentieth of the teacher's hidden states lies outside of 8 directions that are not channels."""
    teacher, batch = make(name), tiny_of(name).batch()
    keep_in_subspace(teacher, random_basis(16, 8), leak=0.05)
    theirs = logits(teacher, batch).log_softmax(-1)
    lost = {}
    for width in ("projection", "importance"):
        student = narrow(teacher, hidden=8, data=[batch], width=width)
        lost[width] = float((theirs.exp() * (theirs - logits(student, batch).log_softmax(-1))).sum(-1).mean())
    assert lost["projection"] < 0.3 * lost["importance"], lost


def test_the_directions_are_the_principal_components() -> None:
    """For one layer: eigenvectors of Σ u uᵀ; u are the inputs of the three norms at attended positions, with RMS 1.

    A row of the student's embeddings is the teacher's in these directions, times √(8/16).
    """
    teacher, batch = make("LlamaForCausalLM", layers=1), MODELS["LlamaForCausalLM"].batch()
    read: list[torch.Tensor] = []
    norms = [module for name, module in teacher.named_modules() if name.endswith("norm")]
    hooks = [module.register_forward_pre_hook(lambda _, args: read.append(args[0])) for module in norms]
    logits(teacher, batch)
    for hook in hooks:
        hook.remove()
    assert len(read) == 3
    moments = torch.zeros(16, 16, dtype=torch.float64)
    for states in read:
        for x in states[batch["attention_mask"].bool()]:
            u = x / x.square().mean().sqrt()
            moments += torch.outer(u, u)
    values, vectors = torch.linalg.eigh(moments)
    student, report = projected(teacher, 8, batch)
    table = teacher.model.embed_tokens.weight.detach() @ vectors[:, -8:].flip(1) * 0.5**0.5
    assert_close(student.model.embed_tokens.weight.detach().abs(), table.abs())  # a direction has no sign
    assert report.projected == pytest.approx(float(values[-8:].sum() / values.sum()))
    assert f"the student holds {report.projected:.1%} of them" in str(report)


def check_weight_tying(name: str, student: Any, report: Any) -> None:
    head, table = student.get_output_embeddings(), student.get_input_embeddings()
    assert head is None or head.weight is not table.weight
    untied = [note for note in report.notes if "no longer tied to" in note]
    assert len(untied) == (name in TIED) and all("the student has 640 parameters more" in note for note in untied)
    if "T5" in name:  # its config cannot store it; encoder and decoder stay tied
        assert student.encoder.embed_tokens.weight is student.decoder.embed_tokens.weight is table.weight
    elif name in TIED:
        assert student.config.tie_word_embeddings is False


@pytest.mark.parametrize("importance", ["activation", "gradient"])
def test_heads_and_neurons_are_chosen_as_without_a_projection(importance: str) -> None:
    """The same units are kept as without a projection; then their tensors are rotated."""
    name = "LlamaForCausalLM"
    teacher, batch = make(name), tiny_of(name).batch()
    batch["labels"] = batch["input_ids"]
    sizes: dict[str, Any] = {"heads": 2, "intermediate": 20, "importance": importance}
    student, report = projected(teacher, 16, batch, **sizes)
    cut, other = reported(narrow(teacher, data=[batch], **sizes))
    assert report.kept == other.kept and report.importance == importance
    assert_close(logits(student, batch), logits(cut, batch), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "T5ForConditionalGeneration"])
def test_the_teacher_and_the_random_state_do_not_change(name: str) -> None:
    teacher = teacher_of(name).to(torch.bfloat16).train().requires_grad_(False)
    before, config = copy.deepcopy(teacher.state_dict()), teacher.config.to_dict()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    student = narrow(teacher, hidden=12, data=iter([tiny_of(name).batch()]), width="projection")
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1] and (np.random.get_state()[1] == states[2]).all()
    assert all(torch.equal(tensor, before[key]) for key, tensor in teacher.state_dict().items())
    assert all(module.training for module in teacher.modules()) and teacher.config.to_dict() == config
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in teacher.modules())
    assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}
    assert not student.training and all(parameter.requires_grad for parameter in student.parameters())


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("BertForMaskedLM", "LayerNorm.weight belongs to a LayerNorm: .* subtracts the mean"),
        ("GPT2LMHeadModel", "ln_1.weight belongs to a LayerNorm: .* subtracts the mean"),
        ("ViTForImageClassification", "no matrix multiplication with vit.embeddings.cls_token was traced"),
        ("BartForConditionalGeneration", "belongs to a LayerNorm: .* subtracts the mean"),
        ("Gemma2", r"reads the output of .*post_attention_layernorm.weight, .* \(post-norm\)"),
        (
            "T5EncoderModel",
            "the model returns the output of encoder.final_layer_norm.weight",
        ),
    ],
)
def test_models_that_cannot_be_rotated(name: str, why: str) -> None:
    teacher = make(name).float()
    sizes = {} if name in ("Gemma2", "ViTForImageClassification", "T5EncoderModel") else {"heads": 3}
    with pytest.raises(TeacherError, match=rf"width='projection' cannot rotate .*{why}.*Use width='importance'"):
        narrow(teacher, hidden=12, **sizes, data=[tiny_of(name).batch()], width="projection")


def test_a_hook_on_single_channels_is_found_by_trial() -> None:
    """A hook that doubles one channel of the hidden states."""
    teacher = make("LlamaForCausalLM").float()
    gate = torch.ones(16)
    gate[3] = 2
    teacher.model.layers[0].mlp.register_forward_hook(_Gate(gate))
    with pytest.raises(TeacherError, match=r"changes the logits .* uses single channels.*width='importance'"):
        narrow(teacher, hidden=12, data=[MODELS["LlamaForCausalLM"].batch()], width="projection")


class _Gate:
    def __init__(self, gate: torch.Tensor) -> None:
        self.gate = gate

    def __call__(self, module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        return out * self.gate


def test_wrong_arguments() -> None:
    teacher, data = teacher_of("LlamaForCausalLM"), [{"input_ids": torch.tensor([[3]])}]
    with pytest.raises(SettingError, match=r"width='pca': allowed are importance and projection"):
        narrow(teacher, hidden=8, data=data, width="pca")
    with pytest.raises(SettingError, match=r"width='projection' goes with hidden="):
        narrow(teacher, heads=2, data=data, width="projection")
    with pytest.raises(DataError, match=r"data= has 5 positions for 8 directions"):
        narrow(teacher, hidden=8, data=data, width="projection")


def test_a_t5_with_an_untied_head(tmp_path: Path) -> None:
    """Files of T5 v1.1 and mT5 hold an untied head, although their config says that it is tied."""
    tiny = MODELS["T5ForConditionalGeneration"]
    batch = tiny.batch()
    first = teacher_of("T5ForConditionalGeneration", tie_word_embeddings=False)
    first.lm_head.weight = torch.nn.Parameter(torch.randn(first.lm_head.weight.shape))
    first.all_tied_weights_keys.pop("lm_head.weight")
    first.save_pretrained(tmp_path)
    teacher = tiny.model_class.from_pretrained(tmp_path).double().eval()
    assert teacher.lm_head.weight is not teacher.shared.weight and teacher.config.tie_word_embeddings
    student, report = projected(teacher, 16, batch)
    assert_close(logits(student, batch), logits(teacher, batch), rtol=0, atol=1e-10)
    assert not report.notes  # there was no tie
    same = narrow(inherit(teacher, encoder_layers=2, decoder_layers=2), hidden=16, heads=4, data=[batch])
    assert_close(logits(same, batch), logits(teacher, batch), rtol=0, atol=1e-10)
