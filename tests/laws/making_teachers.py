"""Builders for each kind of teacher, and its expected probabilities, computed separately. Table: `teacher_rows.py`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

from hf_distill.teachers import (
    BaseModelTeacher,
    CachedTeacher,
    Dense,
    Ensemble,
    Peer,
    RDropTeacher,
    Specialists,
    TeacherCache,
    TemporalEnsemble,
    quantise_dynamically,
)
from hf_distill.teachers.cache import BuildOptions
from hf_distill.teachers.served import ServedTeacher
from tests.heads import HEADS, LABELS, VOCABULARY, Example
from tests.teachers.completions_server import serving
from tests.tiny_tokenizers import tokenizer

COUNT = 8  # examples
NAMES = ("cold", "warm", "hot")
SENTENCES, TOKENS, LANGUAGE = "bert_single_label", "bert_tokens", "llama_causal_lm"
_DROPOUTS = {
    SENTENCES: ("hidden_dropout_prob", "attention_probs_dropout_prob"),
    TOKENS: ("hidden_dropout_prob", "attention_probs_dropout_prob"),
    LANGUAGE: ("attention_dropout",),
}
Says = Callable[[dict[str, Tensor], float], Tensor]


@dataclass(frozen=True)
class Place:
    """The folder in which a teacher is made, and its properties.

    Attributes:
        order: the order of the teacher's labels, as in its config. names: of the labels. seed: of the student.
        students_dropout, teachers_dropout: the dropout of each model.
    """

    head: str
    folder: Path
    stack: ExitStack
    order: tuple[int, ...] = (0, 1, 2)
    names: tuple[str, ...] = NAMES
    seed: int = 1
    students_dropout: float = 0.0
    teachers_dropout: float = 0.0

    @property
    def examples(self) -> list[Example]:
        return HEADS[self.head].examples(COUNT)

    def student(self, seed: int | None = None) -> Any:
        dropout = dict.fromkeys(_DROPOUTS[self.head], self.students_dropout)
        return HEADS[self.head].make(self.seed if seed is None else seed, **self._named(NAMES), **dropout).double()

    def model(self, seed: int = 2, **settings: Any) -> Any:
        """Return a teacher with its columns and names in this order, in training mode to test that it is reset."""
        dropout = dict.fromkeys(_DROPOUTS[self.head], self.teachers_dropout)
        named = self._named(tuple(self.names[i] for i in self.order))
        model = HEADS[self.head].make(seed, **{**named, **dropout, **settings}).double()
        if named and not settings:
            with torch.no_grad():
                model.classifier.weight.copy_(model.classifier.weight[list(self.order)].clone())
                model.classifier.bias.copy_(model.classifier.bias[list(self.order)].clone())
        return model.train()

    def _named(self, names: tuple[str, ...]) -> dict[str, Any]:
        if self.head == LANGUAGE:
            return {}
        return {"label2id": {name: i for i, name in enumerate(names)}, "id2label": dict(enumerate(names))}


@dataclass(frozen=True)
class TeacherCase:
    """A student and its teacher.

    Attributes:
        models: the models of the teacher in this process.
        says: model inputs, temperature → the expected probabilities, `[b ... v]`, in the order of `NAMES`,
            computed separately.
        once_fitted: called once a Distiller holds the teacher. processor: the student's tokenizer, if required.
    """

    student: Any
    teacher: Any
    models: tuple[nn.Module, ...] = ()
    says: Says | None = None
    once_fitted: Callable[[], None] = lambda: None
    processor: Any = None


def told_by(model: nn.Module, inputs: dict[str, Tensor], temperature: float) -> Tensor:
    """Return softened probabilities of the model in evaluation mode; its mode is restored."""
    modes = [(module, module.training) for module in model.modules()]
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    for module, mode in modes:
        module.training = mode
    return (logits.double() / temperature).softmax(-1)


def _says(place: Place, model: nn.Module) -> Says:
    """Return a function that computes a model's probabilities in the student's label order."""
    back = [place.order.index(i) for i in range(LABELS)]

    def says(inputs: dict[str, Tensor], temperature: float) -> Tensor:
        probabilities = told_by(model, inputs, temperature)
        return probabilities if place.head == LANGUAGE else probabilities[..., back]

    return says


def a_model(place: Place) -> TeacherCase:
    model = place.model()
    return TeacherCase(place.student(), model, (model,), _says(place, model))


def cached(store: Any, seed: int = 2) -> Callable[[Place], TeacherCase]:
    def make(place: Place) -> TeacherCase:
        model = place.model(seed)
        words = tokenizer(VOCABULARY) if place.head == LANGUAGE else None
        made = TeacherCase(place.student(), model, (model,), _says(place, model), processor=words)
        return _in_a_cache(place, made, str(seed), store=store)

    return make


def cache_of(make: Callable[[Place], TeacherCase], **settings: Any) -> Callable[[Place], TeacherCase]:
    """Return a builder of a cache of that kind of teacher."""
    return lambda place: _in_a_cache(place, make(place), "told", temperature=2.0, **settings)


def _in_a_cache(place: Place, made: TeacherCase, tag: str, **settings: Any) -> TeacherCase:
    words = {} if made.processor is None else {"processing_class": made.processor}
    cache = TeacherCache.build(
        made.teacher,
        place.examples,
        place.folder / "-".join(["cache", *place.names, *map(str, place.order), tag]),
        student=made.student,
        data_collator=HEADS[place.head].collate,
        batch_size=3,
        options=BuildOptions(shard_examples=6),
        progress=False,
        **words,
        **settings,
    )
    return replace(made, teacher=CachedTeacher(cache))


def ensemble(place: Place) -> TeacherCase:
    """Only one member has its labels in another order."""
    one, other = place.model(), replace(place, order=(0, 1, 2)).model(3)
    first, second = _says(place, one), _says(replace(place, order=(0, 1, 2)), other)
    teacher = Ensemble([one, other], weights=[3, 1])
    says: Says = lambda inputs, t: 0.75 * first(inputs, t) + 0.25 * second(inputs, t)  # noqa: E731
    return TeacherCase(place.student(), teacher, (one, other), says)


def ensemble_of_caches(place: Place) -> TeacherCase:
    one, other = cached(Dense("float32"))(place), cached(Dense("float32"), seed=3)(replace(place, order=(0, 1, 2)))
    assert one.says is not None and other.says is not None
    first, second = one.says, other.says
    teacher = Ensemble([one.teacher, other.teacher])
    says: Says = lambda inputs, t: (first(inputs, t) + second(inputs, t)) / 2  # noqa: E731
    return TeacherCase(one.student, teacher, (*one.models, *other.models), says)


def specialists(place: Place) -> TeacherCase:
    """A generalist and one specialist for two classes, at temperature 1.

    With probabilities g of the generalist and m of the specialist (d its dustbin), KL(g, q) + KL(m, q) is minimal at
    q = (g + m) / 2 on the special classes and, where the rest is one class, q = (g + d) / 2 on it. Rows whose likeliest
    class by g is the rest do not use the specialist.
    """
    generalist = place.model()
    special = [place.names[0], place.names[1]]
    labels = dict(enumerate([*special, "other"]))
    specialist = place.model(3, id2label=labels, label2id={name: i for i, name in labels.items()})
    of_generalist = _says(place, generalist)

    def says(inputs: dict[str, Tensor], temperature: float) -> Tensor:
        assert temperature == 1
        g, m = of_generalist(inputs, 1.0), told_by(specialist, inputs, 1.0)
        return torch.where((g.argmax(-1) < 2)[..., None], (g + m) / 2, g)

    teacher = Specialists(generalist, {tuple(special): specialist})
    return TeacherCase(place.student(), teacher, (generalist, specialist), says)


def copy_of_student(make: Callable[[], Any]) -> Callable[[Place], TeacherCase]:
    """Its predictions are those of the student before it moved."""

    def made(place: Place) -> TeacherCase:
        student = place.student()
        before = copy.deepcopy(student)

        def move() -> None:
            torch.manual_seed(4)
            with torch.no_grad():
                for parameter in student.parameters():
                    parameter.add_(0.2 * torch.randn_like(parameter))

        return TeacherCase(student, make(), (), lambda inputs, t: told_by(before, inputs, t), move)

    return made


def adapters_off(place: Place) -> TeacherCase:
    base = place.student(seed=1)
    alone = copy.deepcopy(base)
    targets = ["q_proj", "v_proj"] if place.head == LANGUAGE else ["query", "value"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(place.seed)
        config = peft.LoraConfig(r=2, target_modules=targets, lora_dropout=place.students_dropout)
        student = peft.get_peft_model(base, config).double()
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.5)
    return TeacherCase(student, BaseModelTeacher(), (), lambda inputs, t: told_by(alone, inputs, t))


def second_pass(place: Place) -> TeacherCase:
    return TeacherCase(replace(place, students_dropout=0.3).student(), RDropTeacher())


def temporal(place: Place) -> TeacherCase:
    return TeacherCase(place.student(), TemporalEnsemble())


def peer(place: Place) -> TeacherCase:
    model = replace(place, teachers_dropout=0.0).model()
    teacher = Peer(model, optimizer=partial(torch.optim.SGD, momentum=0.9), learning_rate=0.1, max_grad_norm=0.0)
    return TeacherCase(place.student(), teacher, (model,), _says(place, model))


def quantised(place: Place) -> TeacherCase:
    full = place.model().float()
    return TeacherCase(place.student(), quantise_dynamically(full), (full,), _says(place, full))


def served(place: Place) -> TeacherCase:
    model, words = place.model(), tokenizer(VOCABULARY)
    server = place.stack.enter_context(serving(model, words))
    teacher = ServedTeacher(server.url, "large", processing_class=words, top_logprobs=VOCABULARY)
    return TeacherCase(place.student(), teacher, (), _says(place, model), processor=words)
