"""Specialists of a few classes each: which classes belong together, their training sets and heads, and the teacher."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_distill.errors import DataError, SettingError, TeacherError, check_whole_number, require
from hf_distill.functional.groups import fit_class_distribution
from hf_distill.functional.rows import in_full_precision
from hf_distill.signals import Needs, Signals
from hf_distill.tasks import Batch, Task
from hf_distill.tasks.infer import config_of, unwrapped
from hf_distill.teachers.base import Teacher, TeacherSetup
from hf_distill.teachers.make import as_teacher
from hf_distill.teachers.model import ModelTeacher, check_same_head
from hf_distill.vocabulary import HeadAlignment, has_default_names, label_ids

DUSTBIN = "dustbin"
Classes: TypeAlias = Sequence[int | str]  # label names or ids


def confusable_classes(
    predictions: Tensor | np.ndarray, *, clusters: int, temperature: float = 1.0, seed: int = 0
) -> tuple[tuple[int, ...], ...]:
    """Return sets of classes that the generalist often predicts together.

    K-means of the columns of the predictions' covariance (Hinton et al. 2015, section 5.3). The paper's K-means is
    on-line, over millions of predictions; this is scikit-learn's.

    Args:
        predictions: `[n v]`, the generalist's logits, such as `trainer.predict(...).predictions`.
        clusters: the number of sets. Sets of a single class are left out.
        temperature: softens the logits first; for a very confident generalist try 2 to 5.
        seed: the seed of K-means.

    Returns:
        Tuples of class ids, for `Specialists` and `specialist_set`, in the order of their smallest class.

    Raises:
        DataError: if the predictions are not a matrix of finite numbers.
        SettingError: if there are as many clusters as classes, or no clusters.
        MissingExtraError: if scikit-learn is not installed.

    >>> likes = torch.tensor([[4.0, 2, 0, 0], [2, 4, 0, 0], [0, 0, 4, 2], [0, 0, 2, 4]])
    >>> confusable_classes(likes, clusters=2)
    ((0, 1), (2, 3))
    """
    logits = torch.as_tensor(predictions)
    if logits.dim() != 2 or len(logits) < 2 or not bool(logits.isfinite().all()):
        shape = tuple(logits.shape)
        raise DataError(f"predictions of shape {shape}: give finite logits [n v] of at least two examples.")
    if not 1 <= clusters < logits.shape[1]:
        raise SettingError(f"confusable_classes: clusters={clusters!r} of {logits.shape[1]} classes: give 1 or more.")
    if not temperature > 0:
        raise SettingError(f"confusable_classes: temperature={temperature!r}: must be above 0.")
    kmeans = require("sklearn.cluster", extra="metrics").KMeans
    covariance = torch.cov((logits.double() / temperature).softmax(-1).T)  # [v v]
    clusters_of = kmeans(n_clusters=clusters, n_init=10, random_state=seed).fit_predict(covariance.numpy()).tolist()
    sets = [tuple(c for c, cluster in enumerate(clusters_of) if cluster == number) for number in range(clusters)]
    return tuple(sorted(classes for classes in sets if len(classes) > 1))


@dataclass(frozen=True)
class SpecialistSet:
    """The training set of a specialist.

    Attributes:
        indices: the examples, for `dataset.select`.
        labels: their labels: a place in the classes, or the number of classes for the dustbin.
        dustbin_bias: corrects the trained specialist, for `Specialists(dustbin_bias=...)`.
    """

    indices: tuple[int, ...]
    labels: tuple[int, ...]
    dustbin_bias: float


def specialist_set(labels: Sequence[int], classes: Sequence[int], *, seed: int = 0) -> SpecialistSet:
    """Return a training set: half examples of the special classes, half examples of all others, in random order.

    Hinton et al. 2015, section 5.2. Both halves have the size of the smaller group. The bias is the log of the factor
    by which the special classes are oversampled; added to the dustbin's logit, it restores the odds of the data.

    Args:
        labels: the labels of the generalist's training set, in its order; -100 is left out.
        classes: class ids, in the order of the columns of the specialist's head.
        seed: the seed of the random choice.

    Raises:
        DataError: if a special class has no example, or all examples are of special classes.

    >>> made = specialist_set([0, 1, 2, 2, 3, 3, 3, 3], [0, 1])
    >>> sorted(made.labels), round(made.dustbin_bias, 3)  # 6 others and 2 special ones: now halves
    ([0, 1, 2, 2], 1.099)
    """
    place = {label: number for number, label in enumerate(classes)}
    special = [index for index, label in enumerate(labels) if int(label) in place]
    others = [index for index, label in enumerate(labels) if int(label) not in place and int(label) >= 0]
    present = {int(labels[index]) for index in special}
    missing = [label for label in classes if label not in present]
    if missing or not others:
        which = f"of class {missing[0]}" if missing else f"outside of {tuple(classes)}"
        raise DataError(f"specialist_set: there is no example {which} in {len(labels)} labels. Give other classes.")
    half = min(len(special), len(others))
    generator = torch.Generator().manual_seed(seed)
    chosen: list[int] = []
    for group in (special, others):
        chosen += [group[i] for i in torch.randperm(len(group), generator=generator)[:half].tolist()]
    indices = [chosen[i] for i in torch.randperm(len(chosen), generator=generator).tolist()]
    return SpecialistSet(
        tuple(indices),
        tuple(place.get(int(labels[index]), len(place)) for index in indices),
        math.log(len(others) / len(special)),
    )


def specialist_head(generalist: PreTrainedModel, classes: Sequence[int]) -> PreTrainedModel:
    """Return a copy of the generalist to train as a specialist, whose head has a column for each class and a dustbin.

    "Each specialist model is initialized with the weights of the generalist" (Hinton et al. 2015, section 5.2): so are
    the columns of its classes. The dustbin's column is the mean of the others (the paper does not specify it). Label
    names are kept, so that `Specialists` finds them.

    Args:
        generalist: a classifier.
        classes: some of its class ids.

    Raises:
        SettingError: if the head cannot be identified, or the generalist does not have these classes.

    >>> from transformers import BertConfig, BertForSequenceClassification as Bert
    >>> config = BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, num_labels=5)
    >>> specialist_head(Bert(config), [1, 4]).config.id2label
    {0: 'LABEL_1', 1: 'LABEL_4', 2: 'dustbin'}
    """
    count = generalist.config.num_labels or 0
    if not set(classes) < set(range(count)) or not classes:
        raise SettingError(f"specialist_head: classes {classes!r}: give some, not all, of the ids 0 to {count - 1}.")
    heads = [
        name for name, part in generalist.named_modules() if isinstance(part, nn.Linear) and part.out_features == count
    ]
    if len(heads) != 1:
        raise SettingError(
            f"specialist_head: {len(heads)} linear layers of {type(generalist).__name__} have {count} columns, so "
            f"which one is the head is not known. Load it with num_labels={len(classes) + 1} and "
            "ignore_mismatched_sizes=True, and name its labels."
        )
    specialist: Any = copy.deepcopy(generalist)
    parent, _, name = heads[0].rpartition(".")
    old = specialist.get_submodule(heads[0])
    new = nn.Linear(old.in_features, len(classes) + 1, bias=old.bias is not None)
    new.to(device=old.weight.device, dtype=old.weight.dtype).requires_grad_(True)
    others = [label for label in range(count) if label not in classes]
    with torch.no_grad():
        for ours, theirs in zip(new.parameters(), old.parameters(), strict=True):
            dustbin = in_full_precision(theirs[others]).mean(0, keepdim=True).to(theirs.dtype)
            ours.copy_(torch.cat((theirs[list(classes)], dustbin)))
    setattr(specialist.get_submodule(parent), name, new)
    names = {index: label for label, index in label_ids(generalist.config).items()}
    specialist.config.id2label = dict(enumerate([*(names[label] for label in classes), DUSTBIN]))
    specialist.config.label2id = {label: index for index, label in specialist.config.id2label.items()}
    if hasattr(specialist, "num_labels"):
        specialist.num_labels = len(classes) + 1
    return specialist


class Specialists(Teacher):
    """A generalist that is corrected by specialists, each of a few classes and a dustbin for all others.

    Each row uses the specialists that know one of the generalist's most probable classes. The prediction is the
    distribution q over all classes that minimises `KL(p_g, q) + Σ KL(p_m, q)` (Hinton et al. 2015, section 5.4; solved
    exactly, see `functional.groups`). A specialist runs only if a row of the batch needs it.

    q is solved for at the current temperature. There a dustbin is softened as the classes that it holds (in the
    generalist's proportions), not as one class, so that specialists that agree with the generalist change nothing at
    any temperature. At temperature 1 this is the paper's method.

    Args:
        generalist: as for `teacher_model`: a single-label classifier of examples or tokens.
        specialists: classes → a model, a folder or a Hub id. Classes are the generalist's label names or ids. The
            specialist's head has a column for each class and one for the dustbin, identified by the label names; with
            transformers' default names they are in the order of the classes, with the dustbin last.
        dustbin_bias: added to each dustbin's logit, in the order of `specialists` (`SpecialistSet.dustbin_bias`). None
            adds nothing, for specialists that were trained on the original data or are corrected already.
        most_probable: how many of the generalist's most probable classes call specialists (the paper's n, 1 there).

    Raises:
        SettingError: if classes or numbers are not allowed.
        TeacherError: if heads or labels do not match (at `bind`).

    >>> from transformers import BertConfig, BertForSequenceClassification as Bert
    >>> from hf_distill import Distiller
    >>> size = {"vocab_size": 9, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    >>> student, generalist, specialist = (Bert(BertConfig(**size, num_labels=n)) for n in (4, 4, 3))
    >>> distiller = Distiller(student, Specialists(generalist, {(0, 2): specialist}))
    >>> batch = {"input_ids": torch.tensor([[1, 2]]), "labels": torch.tensor([0])}
    >>> sorted(distiller(student, batch).terms)
    ['labels', 'logits']
    """

    paper = "hinton2015distilling"

    def __init__(
        self,
        generalist: Any,
        specialists: Mapping[Classes, Any],
        *,
        dustbin_bias: Sequence[float] | None = None,
        most_probable: int = 1,
    ) -> None:
        if not isinstance(specialists, Mapping) or not specialists:
            raise SettingError("Specialists: give {classes: specialist, ...} with at least one, after the generalist.")
        for classes in specialists:
            if not isinstance(classes, tuple) or not 0 < len(classes) == len(set(classes)):
                raise SettingError(f"Specialists: classes {classes!r}: give a tuple of different label names or ids.")
        bias = [0.0] * len(specialists) if dustbin_bias is None else [float(value) for value in dustbin_bias]
        if len(bias) != len(specialists):
            raise SettingError(
                f"Specialists: {len(bias)} numbers in dustbin_bias for {len(specialists)} specialists. Give one each."
            )
        check_whole_number("Specialists: most_probable", most_probable)
        self._given_generalist, self._given = generalist, list(specialists.items())
        self._bias, self._most_probable = bias, most_probable
        self._accelerator: Accelerator | None = None
        self._members = torch.zeros(0, 0, dtype=torch.bool)  # [m v]
        self._orders: list[Tensor] = []  # each specialist's columns in the order of the classes, dustbin last
        self._generalist: Teacher | None = None
        self._specialists: list[ModelTeacher] = []
        self.alignment = HeadAlignment()

    def __repr__(self) -> str:
        classes = [list(classes) for classes, _ in self._given]
        return f"Specialists({classes}, most_probable={self._most_probable})"

    @property
    def parts(self) -> list[Teacher]:  # type: ignore[override]  # known after `bind`
        """The generalist and the specialists; empty before `bind`."""
        return [] if self._generalist is None else [self._generalist, *self._specialists]

    @property
    def inputs(self) -> tuple[str, ...]:  # type: ignore[override]  # known after `bind`
        """The inputs of all of them; known after `bind`."""
        return tuple(dict.fromkeys(name for teacher in self.parts for name in teacher.inputs))

    def bind(self, setup: TeacherSetup) -> None:
        """Check that the generalist can teach this student and each specialist knows its classes.

        Raises:
            TeacherError: if a head is of another kind, or labels do not match.
        """
        task = setup.task
        if task.matched_by != "labels" or task.on_values:
            raise TeacherError(f"Specialists: a {task} head has no classes to be a specialist of. Use a classifier.")
        if self._generalist is None:
            self._specialists = [_as_model_teacher(model, str(task), classes) for classes, model in self._given]
            self._generalist = as_teacher(self._given_generalist, str(task))
        for specialist in self._specialists:  # first, so that the task learns its label names from the generalist
            check_same_head(unwrapped(specialist.model), task)
            specialist.bind(replace(setup, compares_predictions=False))
        self._generalist.bind(setup)
        self.alignment = HeadAlignment(student=self._generalist.alignment.student)
        if setup.compares_predictions:
            self._pair_columns(setup.student)

    def __call__(self, task: Task, batch: Batch, needs: Needs) -> Signals:
        assert self._generalist is not None  # `bind` comes first
        logits = self._run(self._generalist, task, batch, needs.temperature)  # [... v]
        if logits.shape[-1] != self._members.shape[1]:
            counts = f"rows of {logits.shape[-1]} columns for {self._members.shape[1]} labels"
            raise TeacherError(f"Specialists: {counts}. Multi-label heads have no confusable classes; use one label.")
        rows = logits.reshape(-1, logits.shape[-1])
        log_q = self._correct(rows, task, batch, needs.temperature)
        return Signals(logits=(needs.temperature * log_q).view(logits.shape), alignment=self.alignment)

    def to(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        super().to(accelerator)

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self._generalist is None else self._generalist.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        assert self._generalist is not None  # `bind` comes first
        self._generalist.load_state_dict(state)

    def _run(self, teacher: Teacher, task: Task, batch: Batch, temperature: float) -> Tensor:
        needs = Needs(logits=True, temperature=temperature)
        return in_full_precision(teacher(task, batch, needs).predictions())

    def _correct(self, logits: Tensor, task: Task, batch: Batch, temperature: float) -> Tensor:
        """Return the log of the corrected distribution.

        Args:
            logits: `[n v]`, the generalist's.
            task: the student's task.
            batch: the batch.
            temperature: softens all distributions.
        """
        members = self._members = self._members.to(logits.device)
        log_sum = (logits / temperature).log_softmax(-1)  # [n v] log of the sum of all models' probabilities
        probable = logits.topk(min(self._most_probable, logits.shape[-1])).indices  # [n k]
        needed = members.T[probable].any(1)  # [n m]
        log_rest = torch.full(needed.shape, -torch.inf, dtype=logits.dtype, device=logits.device)
        # Under sharding every process must run every model.
        sharded = (DistributedType.DEEPSPEED, DistributedType.FSDP)
        runs_all = self._accelerator is not None and self._accelerator.distributed_type in sharded
        for number, specialist in enumerate(self._specialists):
            if not runs_all and not bool(needed[:, number].any()):
                continue
            special = members[number]
            own = self._run(specialist, task, batch, temperature)
            own = own.reshape(-1, own.shape[-1])[:, self._orders[number].to(own.device)]  # [n k+1]
            dustbin = (own[:, -1:] + self._bias[number]) / temperature + _spread(logits[:, ~special], temperature)
            log_p = torch.cat((own[:, :-1] / temperature, dustbin), -1).log_softmax(-1).to(logits.dtype)
            log_p = log_p.masked_fill(~needed[:, number, None], -torch.inf)
            log_sum[:, special] = torch.logaddexp(log_sum[:, special], log_p[:, :-1])
            log_rest[:, number] = log_p[:, -1]
        return fit_class_distribution(log_sum, log_rest, members)

    def _pair_columns(self, student: nn.Module) -> None:
        """Find the columns of each specialist among the compared columns."""
        assert self._generalist is not None  # `bind` comes first
        config = config_of(student)
        if config is None:
            raise TeacherError("Specialists: the student has no config, so its labels have no names. Give it one.")
        order = self._generalist.alignment.teacher  # the generalist's ids, in the order of the compared columns
        order = order if isinstance(order, tuple) else tuple(range(config.num_labels or 0))
        generalist = self._generalist
        named = config_of(generalist.model) if isinstance(generalist, ModelTeacher) else None
        ids = label_ids(named or config)  # without a model the student's names
        names = {index: name for name, index in ids.items()}
        members, orders = [], []
        for (classes, _), specialist in zip(self._given, self._specialists, strict=True):
            special = [_class_id(label, classes, ids, len(order)) for label in classes]
            if len(special) >= len(order):
                raise TeacherError(f"Specialists: {classes!r} are all classes, so there is no rest for a dustbin.")
            own = _specialist_columns(config_of(specialist.model), [names[index] for index in special], classes)
            members.append(torch.tensor([index in special for index in order]))
            orders.append(torch.tensor([*(own[special.index(index)] for index in order if index in special), own[-1]]))
        self._members, self._orders = torch.stack(members), orders


def _spread(rest: Tensor, temperature: float) -> Tensor:
    """Return the log of the weight that a dustbin gains if it is softened as its classes: 0 at temperature 1.

    Args:
        rest: `[n w]`, the generalist's logits of the classes in the dustbin.
        temperature: the temperature.
    """
    if temperature == 1:
        return rest.new_zeros(len(rest), 1)
    return (rest.log_softmax(-1) / temperature).logsumexp(-1, keepdim=True)


def _as_model_teacher(model: nn.Module | str, kind: str, classes: Classes) -> ModelTeacher:
    teacher = as_teacher(model, kind)
    if not isinstance(teacher, ModelTeacher):
        name = type(teacher).__name__
        raise TeacherError(f"Specialists: the specialist of {classes!r} is a {name}. Give a model or its folder.")
    return teacher


def _class_id(label: int | str, classes: Classes, ids: Mapping[str, int], count: int) -> int:
    found = ids.get(label, -1) if isinstance(label, str) else label
    if found not in range(count):
        known = ", ".join(sorted(ids, key=lambda name: ids[name])[:8]) + (", …" if len(ids) > 8 else "")
        where = f"the generalist. It has ids 0 to {count - 1}: {known}"
        raise TeacherError(f"Specialists: {label!r} in {classes!r} is no label of {where}.")
    return found


def _specialist_columns(config: PreTrainedConfig | None, names: list[str], classes: Classes) -> list[int]:
    """Return a specialist's columns of these classes, and last that of its dustbin."""
    width = None if config is None else config.num_labels
    if config is None or width != len(names) + 1:
        counts = f"{width} labels; it must have {len(names) + 1}"
        raise TeacherError(f"Specialists: the specialist of {classes!r} has {counts}. Make it with `specialist_head`.")
    ids = label_ids(config)
    if has_default_names(ids):
        return list(range(len(ids)))
    if set(names) < set(ids):
        (dustbin,) = set(ids) - set(names)
        return [*(ids[name] for name in names), ids[dustbin]]
    labels = f"{sorted(ids)}; expected {names} and a dustbin"
    raise TeacherError(f"Specialists: the specialist of {classes!r} has labels {labels}. Set its label2id.")
