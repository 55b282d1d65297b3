"""Heads that are no longer one tensor with the embeddings: in the config, or where it cannot say so, in the model."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def without_ties(config: Any) -> Any:
    """The config of a model whose head has weights of its own. The same, where its class ties them always (T5)."""
    new = copy.deepcopy(config)
    new.tie_word_embeddings = False
    read = type(config).from_dict(copy.deepcopy(new.to_dict()))
    return new if getattr(read, "tie_word_embeddings", None) is False else config


def own_heads(student: Any, teacher: Any) -> list[str]:
    """What the student's class ties always and the teacher has apart: T5 v1.1 and mT5, as they are read from files."""
    if without_ties(student.config) is not student.config:
        return []
    theirs = dict(teacher.named_parameters(remove_duplicate=False))
    pairs = [(name, other) for name, other in student.all_tied_weights_keys.items() if {name, other} <= theirs.keys()]
    return [one for one, two in pairs if theirs[one] is not theirs[two] and not torch.equal(theirs[one], theirs[two])]


def set_apart(model: Any, names: Iterable[str]) -> None:
    """Give these parameters tensors of their own, as `from_pretrained` does for a T5 whose file has both."""
    for name in names:
        path, _, last = name.rpartition(".")
        module, tied = model.get_submodule(path), model.get_parameter(name)
        setattr(module, last, nn.Parameter(torch.empty_like(tied), requires_grad=tied.requires_grad))
        model.all_tied_weights_keys.pop(name, None)
