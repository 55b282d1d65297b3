"""`narrow` for every architecture: kept units compute the same, saving, and an unchanged teacher."""

from __future__ import annotations

import copy
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from hf_distill.errors import HfDistillError
from hf_distill.students import inherit
from hf_distill.students.narrow.narrow import narrow
from tests.students.models import MODELS, Tiny, one_an_architecture, reported
from tests.students.narrow_models import (
    HIDDEN,
    N_HEADS,
    NEURONS,
    READS_HEADS,
    READS_NEURONS,
    WRITES_HEADS,
    error_for,
    has_head_size,
    inner_axes,
    masked,
    sizes_for,
    teacher_of,
)
from tests.students.test_inherit_architectures import outputs

NAMES = list(MODELS)
CUTTABLE = [name for name in NAMES if error_for(name, "hidden") is None]


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert one.keys() == two.keys() and one
    for key, value in one.items():
        assert_close(value, two[key], rtol=tolerance, atol=tolerance, msg=lambda text, key=key: f"{key}: {text}")


def read_back(student: Any, tiny: Tiny, folder: Path) -> Any:
    student.save_pretrained(folder)
    again, loading = tiny.model_class.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    return again.eval()


@pytest.mark.parametrize("name", one_an_architecture(name for name in NAMES if error_for(name, "intermediate") is None))
def test_kept_neurons_equal_the_teacher_with_the_others_masked(name: str, tmp_path: Path) -> None:
    tiny = MODELS[name]
    teacher, batch = teacher_of(name), tiny.batch()
    neurons = 64 if "GPT2" in name else NEURONS
    student, report = reported(narrow(teacher, intermediate=12, data=[batch]))
    masks = {module: torch.zeros(neurons) for module in report.kept}
    for module, kept in report.kept.items():
        assert len(kept) == 12 and list(kept) == sorted(set(kept))
        masks[module][list(kept)] = 1
    hooks = masked(teacher, READS_NEURONS, masks)
    assert len(hooks) == len(masks)  # the names written by hand and the names found agree
    theirs = outputs(teacher, batch)
    for hook in hooks:
        hook.remove()
    same(outputs(student, batch), theirs)
    same(outputs(read_back(student, tiny, tmp_path), batch), outputs(student, batch), 1e-6)


@pytest.mark.parametrize("name", [name for name in NAMES if has_head_size(name)])
def test_kept_heads_equal_the_teacher_with_the_others_masked(name: str, tmp_path: Path) -> None:
    tiny = MODELS[name]
    teacher, batch = teacher_of(name), tiny.batch()
    student, report = reported(narrow(teacher, heads=2, data=[batch]))
    masks = {}
    for names, kept in report.kept.items():
        for module in names.split(", "):  # T5: all layers of a side share a table of positions, so they keep the same
            width = teacher.get_submodule(module).weight.shape[1]
            mask = torch.zeros(N_HEADS, width // N_HEADS)
            mask[list(kept)] = 1
            masks[module] = mask.flatten()
    hooks = masked(teacher, READS_HEADS, masks)
    assert len(hooks) == len(masks)
    theirs = outputs(teacher, batch)
    for hook in hooks:
        hook.remove()
    same(outputs(student, batch), theirs)
    same(outputs(read_back(student, tiny, tmp_path), batch), outputs(student, batch), 1e-6)


@pytest.mark.parametrize("name", one_an_architecture(CUTTABLE))
def test_every_tensor_is_a_slice_of_the_teachers(name: str, tmp_path: Path) -> None:
    """Hidden states and heads together: axes of length 16 are cut to the kept channels, except along heads."""
    tiny = MODELS[name]
    teacher, batch = teacher_of(name), tiny.batch()
    student, report = reported(narrow(teacher, **sizes_for(name), data=[batch]))
    theirs = teacher.state_dict()
    compared = 0
    for tensor_name, ours in student.state_dict().items():
        module = tensor_name.rpartition(".")[0]
        if has_head_size(name) and (inner_axis(teacher, module) is not None or "relative_attention_bias" in module):
            continue  # see the test of heads
        if "pos_conv_embed" in tensor_name:
            continue  # a grouped convolution, which has its own test
        expected = theirs[tensor_name]
        for axis, (size, left) in enumerate(zip(expected.shape, ours.shape, strict=True)):
            if size != left:
                expected = expected.index_select(axis, positions(teacher, tensor_name, axis, size, report.kept))
        assert torch.equal(ours, expected), tensor_name
        compared += ours.shape != theirs[tensor_name].shape
    assert compared > 5
    same(outputs(read_back(student, tiny, tmp_path), batch), outputs(student, batch), 1e-6)


def inner_axis(model: Any, module: str) -> int | None:
    """Return the axis of a matrix along which heads lie; GPT-2 stores its matrices transposed."""
    axes = inner_axes(module)
    if "Conv1D" in type(model.get_submodule(module)).__name__:
        return next((1 - axis for axis in axes), None)
    return next(iter(axes), None)


def positions(model: Any, name: str, axis: int, size: int, kept: dict[str, tuple[int, ...]]) -> torch.Tensor:
    """Return the kept positions of an axis, in blocks of 16: heads of 4 along heads, otherwise channels."""
    module, _, part = name.rpartition(".")
    heads = {reader: ids for readers, ids in kept.items() for reader in readers.split(", ")}
    channels = torch.tensor(heads.pop("hidden states"))
    if "relative_attention_bias" in module:
        return torch.tensor(next(iter(heads.values())))
    inner = inner_axis(model, module)
    made_here = WRITES_HEADS.search(module) is not None
    if inner is not None and (made_here if part == "bias" else axis == inner):
        (ids,) = {tuple(ids) for reader, ids in heads.items() if same_attention(reader, module)}
        channels = torch.cat([torch.arange(4) + 4 * head for head in ids])
    return torch.cat([channels + start for start in range(0, size, HIDDEN)])


def same_attention(reader: str, module: str) -> bool:
    """Whether two matrices belong to one attention: same layer, and both self- or both cross-attention."""
    ends = [re.sub(r"(output\.dense|self\.\w+|[^.]+)$", "", name) for name in (reader, module)]
    return ends[0] == ends[1]


@pytest.mark.parametrize("name", one_an_architecture(CUTTABLE))
def test_a_student_with_all_units_equals_the_teacher(name: str) -> None:
    tiny = MODELS[name]
    teacher, batch = teacher_of(name), tiny.batch()
    student = narrow(teacher, hidden=HIDDEN, heads=N_HEADS, data=[batch])
    same(outputs(student, batch), outputs(teacher, batch), 1e-6)


@pytest.mark.parametrize(
    "name", [name for name in NAMES if error_for(name, "hidden") or error_for(name, "intermediate")]
)
def test_sizes_that_cannot_be_cut_are_errors(name: str) -> None:
    for kind, sizes in (("hidden", sizes_for(name)), ("intermediate", {"intermediate": 12})):
        message = error_for(name, kind)
        if message is not None:
            with pytest.raises(HfDistillError, match=message):
                narrow(teacher_of(name), **sizes, data=[MODELS[name].batch()])


# Each is tested alone for every architecture; both together for one of a kind, and for all in slow tests.
COMPOSED = (
    *("BertForMaskedLM", "DistilBertForMaskedLM", "AlbertForMaskedLM", "GPT2LMHeadModel", "LlamaForCausalLM"),
    *("T5ForConditionalGeneration", "WhisperForConditionalGeneration", "Wav2Vec2ForCTC", "ViTForImageClassification"),
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in COMPOSED else pytest.mark.slow) for name in NAMES]
)
def test_depth_and_width_compose_in_both_orders(name: str, tmp_path: Path) -> None:
    """Importance depends on what a layer computes, so the two orders may keep different neurons: both must work."""
    tiny = MODELS[name]
    teacher, batch = teacher_of(name), tiny.batch()
    sizes = {} if error_for(name, "hidden") else dict(sizes_for(name))
    sizes |= {} if error_for(name, "intermediate") else {"intermediate": 12}
    depth = dict.fromkeys(tiny.stacks, 2 if name.startswith("Longformer") else 1)
    thin_then_short = inherit(narrow(teacher, **sizes, data=[batch]), **depth)
    short_then_thin = narrow(inherit(teacher, **depth), **sizes, data=[batch])
    ours, others = thin_then_short.state_dict(), short_then_thin.state_dict()
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in others.items()}
    assert thin_then_short.config.to_dict() == short_then_thin.config.to_dict()
    same(outputs(read_back(short_then_thin, tiny, tmp_path), batch), outputs(short_then_thin, batch), 1e-6)


@pytest.mark.parametrize(
    "name", ["BertForMaskedLM", "T5ForConditionalGeneration", "Wav2Vec2ForCTC", "LlamaForCausalLM"]
)
def test_the_teacher_and_the_random_state_do_not_change(name: str) -> None:
    tiny = MODELS[name]
    teacher = teacher_of(name).train()
    teacher.requires_grad_(False)
    before, config = copy.deepcopy(teacher.state_dict()), teacher.config.to_dict()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    student = narrow(teacher, **sizes_for(name), intermediate=12, data=[tiny.batch()])
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1] and (np.random.get_state()[1] == states[2]).all()
    assert all(torch.equal(tensor, before[key]) for key, tensor in teacher.state_dict().items())
    assert all(module.training for module in teacher.modules()) and teacher.config.to_dict() == config
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not student.training and any(parameter.requires_grad for parameter in student.parameters())
    theirs = {tensor.data_ptr() for tensor in before.values()} | {p.data_ptr() for p in teacher.parameters()}
    assert not any(parameter.data_ptr() in theirs for parameter in student.parameters())
