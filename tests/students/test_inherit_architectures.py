"""`inherit` for every architecture: the source of each tensor, saving, and an unchanged teacher."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_distill.layer_map import LayerMap
from hf_distill.students import inherit
from tests.students.models import LAYERS, MODELS, Tiny, one_an_architecture

NAMES = list(MODELS)
# The argument, and the layers of a teacher with 4 layers that it selects, written by hand.
CHOICES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "a number": (3, (0, 2, 3)),
    "a list": ([0, -2], (0, 2)),
    "a map": (LayerMap.first_last(3, LAYERS), (0, 1, 3)),
}


def choices_in_turn() -> list[Any]:
    """Return every model with one of the choices; the other choices are slow."""
    return [
        pytest.param(name, choice, marks=() if turn % len(CHOICES) == number else pytest.mark.slow)
        for turn, name in enumerate(NAMES)
        for number, choice in enumerate(CHOICES)
    ]


def inherited(tiny: Tiny, teacher: Any, layers: Any) -> Any:
    return inherit(teacher, **dict.fromkeys(tiny.stacks, layers))


def outputs(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        given = model(**batch, output_hidden_states=True)
    return {key: value for key, value in given.items() if isinstance(value, torch.Tensor)} | {
        f"{key}.{index}": state
        for key, states in given.items()
        if key.endswith("hidden_states") and isinstance(states, tuple)
        for index, state in enumerate(states)
    }


def assert_close_outputs(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    """Compare up to rounding: loaded tensors may be laid out differently, which changes the order of sums."""
    assert one.keys() == two.keys() and one
    for key, value in one.items():
        near = 2e-2 if value.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(value, two[key], rtol=near, atol=near, msg=lambda text, key=key: f"{key}: {text}")


def source_of(name: str, tiny: Tiny, kept: tuple[int, ...]) -> str:
    """Return the teacher's tensor that a tensor of the student must equal, without the code under test."""
    for path in tiny.stacks.values():
        if path is not None and name.startswith(f"{path}."):
            layer, rest = name.removeprefix(f"{path}.").split(".", 1)
            if "relative_attention_bias" in rest or "rel_attn_embed" in rest:  # one table, kept in layer 0
                assert layer == "0"
                return name
            return f"{path}.{kept[int(layer)]}.{rest}"
    return name


@pytest.mark.parametrize(("name", "choice"), choices_in_turn())
def test_every_tensor_comes_from_the_chosen_layer(name: str, choice: str) -> None:
    tiny = MODELS[name]
    asked, kept = CHOICES[choice]
    teacher = tiny.make()
    student = inherited(tiny, teacher, asked)
    theirs = teacher.state_dict()
    for tensor_name, tensor in student.state_dict().items():
        expected = theirs[source_of(tensor_name, tiny, kept)]
        if tensor_name == "layer_weights":  # one for the embeddings, and one for each layer
            expected = expected[[0, *(layer + 1 for layer in kept)]]
        assert torch.equal(tensor, expected), tensor_name
        assert tensor.data_ptr() != expected.data_ptr(), tensor_name
    for path in tiny.stacks.values():
        assert path is None or len(student.get_submodule(path)) == len(kept)


@pytest.mark.parametrize("name", one_an_architecture())
def test_a_student_with_all_layers_equals_the_teacher(name: str) -> None:
    tiny = MODELS[name]
    teacher = tiny.make()
    assert_close_outputs(outputs(inherited(tiny, teacher, LAYERS), tiny.batch()), outputs(teacher, tiny.batch()))


@pytest.mark.parametrize("name", one_an_architecture())
def test_a_saved_student_loads_unchanged(name: str, tmp_path: Path) -> None:
    tiny = MODELS[name]
    student = inherited(tiny, tiny.make(), [0, -1])
    student.save_pretrained(tmp_path)
    again, loading = tiny.model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values()), loading
    saved, read = student.state_dict(), again.state_dict()
    assert saved.keys() == read.keys() and all(torch.equal(read[key], value) for key, value in saved.items())
    assert_close_outputs(outputs(again.eval(), tiny.batch()), outputs(student, tiny.batch()))
    assert again.config.num_hidden_layers == 2


@pytest.mark.parametrize("name", one_an_architecture(name for name, tiny in MODELS.items() if len(tiny.stacks) == 1))
def test_the_first_layers_compute_the_teachers_hidden_states(name: str) -> None:
    """With the first two layers, the inner hidden states are the teacher's: nothing around the layers changed."""
    tiny = MODELS[name]
    teacher = tiny.make()
    ours, theirs = (outputs(model, tiny.batch()) for model in (inherited(tiny, teacher, [0, 1]), teacher))
    inner = [f"hidden_states.{index}" for index in (0, 1)]
    assert_close_outputs({key: ours[key] for key in inner}, {key: theirs[key] for key in inner})


@pytest.mark.parametrize("name", one_an_architecture())
def test_the_teacher_and_the_random_state_do_not_change(name: str) -> None:
    tiny = MODELS[name]
    teacher = tiny.make().train()
    teacher.requires_grad_(False)
    before, config = copy.deepcopy(teacher.state_dict()), teacher.config.to_dict()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    student = inherited(tiny, teacher, 2)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1] and (np.random.get_state()[1] == states[2]).all()
    assert all(torch.equal(tensor, before[key]) for key, tensor in teacher.state_dict().items())
    assert teacher.training and teacher.config.to_dict() == config
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not student.training and any(parameter.requires_grad for parameter in student.parameters())


@pytest.mark.parametrize("name", [name for name, tiny in MODELS.items() if tiny.generates])
def test_the_cache_fits_the_layers(name: str) -> None:
    tiny = MODELS[name]
    student = inherited(tiny, tiny.make(), [0, -1])
    batch = {key: value[:1] for key, value in tiny.batch().items() if not key.startswith(("decoder", "attention"))}
    settings = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}
    written = [student.generate(**batch, **settings, use_cache=use_cache) for use_cache in (True, False)]
    assert torch.equal(*written) and written[0].shape[-1] >= 5
    for path in tiny.stacks.values():
        for index, block in enumerate(student.get_submodule(path)):
            known = {module.layer_idx for module in block.modules() if getattr(module, "layer_idx", None) is not None}
            assert known <= {index}
