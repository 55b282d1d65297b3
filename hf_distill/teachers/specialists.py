"""Making specialists: which classes belong together, a specialist's training set and its head. It trains nothing."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from hf_distill.errors import DataError, SettingError, TeacherError, require
from hf_distill.functional.groups import fit_class_distribution
from hf_distill.functional.rows import in_full_precision
from hf_distill.signals import Needs, Signals
from hf_distill.tasks import Batch, Task
from hf_distill.tasks.infer import unwrapped
from hf_distill.teachers.base import Teacher, TeacherSetup
from hf_distill.teachers.make import as_teacher
from hf_distill.teachers.model import ModelTeacher, check_same_head
from hf_distill.vocabulary import HeadAlignment, label_ids

DUSTBIN = "dustbin"


def confusable_classes(
    predictions: Any, *, clusters: int, temperature: float = 1.0, seed: int = 0
) -> tuple[tuple[int, ...], ...]:
    """Sets of classes that the generalist often predicts together: K-means of the columns of the predictions'
    covariance.

    Hinton et al. 2015, section 5.3. There K-means is on-line, over millions of predictions; here it is scikit-learn's,
    over all that are given.

    Args:
        predictions: `[n v]` the generalist's logits, as `trainer.predict(...).predictions` has them.
        clusters: how many sets to make. One of a single class is left out: there is nothing to tell apart.
        temperature: softens them first. A generalist that is very sure shows more at 2 to 5.
        seed: of K-means.

    Returns:
        Tuples of class ids, for `Specialists` and `specialist_set`; in the order of their smallest class.

    Raises:
        DataError: no matrix of finite numbers. SettingError: as many clusters as classes, or fewer than one.
        MissingExtraError: scikit-learn is not installed.

    >>> likes = torch.tensor([[4.0, 2, 0, 0], [2, 4, 0, 0], [0, 0, 4, 2], [0, 0, 2, 4]])
    >>> confusable_classes(likes, clusters=2)
    ((0, 1), (2, 3))
    """
    logits = torch.as_tensor(predictions)
    if logits.dim() != 2 or len(logits) < 2 or not bool(logits.isfinite().all()):
        raise DataError(
            f"confusable_classes: predictions of shape {tuple(logits.shape)}: give logits [n v] of at least two "
            "examples, all finite numbers."
        )
    if not 1 <= clusters < logits.shape[1]:
        raise SettingError(f"confusable_classes: clusters={clusters!r} of {logits.shape[1]} classes: give 1 or more.")
    if not temperature > 0:
        raise SettingError(f"confusable_classes: temperature={temperature!r}: must be above 0.")
    kmeans = require("sklearn.cluster", extra="metrics").KMeans
    covariance = torch.cov((logits.double() / temperature).softmax(-1).T)  # [v v]
    found = kmeans(n_clusters=clusters, n_init=10, random_state=seed).fit_predict(covariance.numpy()).tolist()
    sets = [tuple(c for c, cluster in enumerate(found) if cluster == one) for one in range(clusters)]
    return tuple(sorted(one for one in sets if len(one) > 1))


@dataclass(frozen=True)
class SpecialistSet:
    """What a specialist is trained on.

    Attributes:
        indices: of the examples, for `dataset.select`.
        labels: of these examples: a place in the classes, or their number for the dustbin.
        dustbin_bias: what corrects the trained specialist, for `Specialists(dustbin_bias=...)`.
    """

    indices: tuple[int, ...]
    labels: tuple[int, ...]
    dustbin_bias: float


def specialist_set(labels: Sequence[int], classes: Sequence[int], *, seed: int = 0) -> SpecialistSet:
    """Half examples of the special classes, half of all others drawn at random, in random order.

    Hinton et al. 2015, section 5.2. The larger half is cut down, so that both are whole. The bias is the log of how
    many times the special classes are oversampled: by it the dustbin's logit is raised, and the odds of the dustbin are
    those of the data again.

    Args:
        labels: of the generalist's training set, in its order; -100 is left out.
        classes: ids, in the order that the specialist's head gets.

    Raises:
        DataError: no example of a special class, or none of another.

    >>> made = specialist_set([0, 1, 2, 2, 3, 3, 3, 3], [0, 1])
    >>> sorted(made.labels), round(made.dustbin_bias, 3)  # 6 others for 2 special ones, and both are halves now
    ([0, 1, 2, 2], 1.099)
    """
    place = {one: number for number, one in enumerate(classes)}
    special = [index for index, label in enumerate(labels) if int(label) in place]
    others = [index for index, label in enumerate(labels) if int(label) not in place and int(label) >= 0]
    lacking = [one for one in classes if one not in {int(labels[index]) for index in special}]
    if lacking or not others:
        what = f"of class {lacking[0]}" if lacking else f"outside of {tuple(classes)}"
        raise DataError(f"specialist_set: there is no example {what} in {len(labels)} labels. Give other classes.")
    half = min(len(special), len(others))
    generator = torch.Generator().manual_seed(seed)
    drawn = [one[i] for one in (special, others) for i in torch.randperm(len(one), generator=generator)[:half].tolist()]
    indices = [drawn[i] for i in torch.randperm(len(drawn), generator=generator).tolist()]
    return SpecialistSet(
        tuple(indices),
        tuple(place.get(int(labels[index]), len(place)) for index in indices),
        math.log(len(others) / len(special)),
    )


def specialist_head(generalist: Any, classes: Sequence[int]) -> Any:
    """A copy of the generalist, to be trained as a specialist: its head has a column for each class and a dustbin.

    "Each specialist model is initialized with the weights of the generalist" (Hinton et al. 2015, section 5.2): so are
    the columns of its classes. The dustbin's are the mean of the others (the paper does not say). Names of labels are
    kept, so that `Specialists` finds them.

    Raises:
        SettingError: which layer is the head cannot be told, or classes that it does not have.

    >>> from transformers import BertConfig, BertForSequenceClassification as Bert
    >>> config = BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, num_labels=5)
    >>> specialist_head(Bert(config), [1, 4]).config.id2label
    {0: 'LABEL_1', 1: 'LABEL_4', 2: 'dustbin'}
    """
    count = generalist.config.num_labels
    if not all(isinstance(one, int) and 0 <= one < count for one in classes) or not 0 < len(set(classes)) < count:
        raise SettingError(f"specialist_head: classes {classes!r}: give some, not all, of the ids 0 to {count - 1}.")
    heads = [
        name for name, part in generalist.named_modules() if isinstance(part, nn.Linear) and part.out_features == count
    ]
    if len(heads) != 1:
        raise SettingError(
            f"specialist_head: {len(heads)} linear layers of {type(generalist).__name__} have {count} columns, so "
            f"which one is the head is not known. Load the generalist with num_labels={len(classes) + 1} and "
            "ignore_mismatched_sizes=True, and name its labels."
        )
    specialist = copy.deepcopy(generalist)
    parent, _, name = heads[0].rpartition(".")
    old = specialist.get_submodule(heads[0])
    new = nn.Linear(old.in_features, len(classes) + 1, bias=old.bias is not None)
    new.to(device=old.weight.device, dtype=old.weight.dtype).requires_grad_(True)
    with torch.no_grad():
        for ours, theirs in zip(new.parameters(), old.parameters(), strict=True):
            ours.copy_(_with_dustbin(theirs, classes))
    setattr(specialist.get_submodule(parent), name, new)
    names = {index: label for label, index in label_ids(generalist.config).items()}
    specialist.config.id2label = dict(enumerate([*(names[one] for one in classes), DUSTBIN]))
    specialist.config.label2id = {label: index for index, label in specialist.config.id2label.items()}
    if hasattr(specialist, "num_labels"):
        specialist.num_labels = len(classes) + 1
    return specialist


def _with_dustbin(rows: Tensor, classes: Sequence[int]) -> Tensor:
    others = [one for one in range(len(rows)) if one not in classes]
    mean = in_full_precision(rows[others]).mean(0, keepdim=True).to(rows.dtype)
    return torch.cat((rows[list(classes)], mean))


Classes = Sequence[int | str]


class Specialists(Teacher):
    """A teacher whose generalist is corrected by specialists, each of a few classes and a dustbin for all others.

    For each row those specialists are asked that know one of the generalist's most probable classes; the answer is the
    distribution q over all classes that minimises `KL(p_g, q) + Σ KL(p_m, q)`. Hinton et al. 2015, section 5.4 (solved
    exactly, see `functional.groups`). A specialist runs where a row of the batch asks for it.

    It is solved at the temperature of the moment. There a dustbin is softened as the classes that it holds (in the
    proportions of the generalist), not as one class: specialists that agree with the generalist change nothing, at any
    temperature. At 1 this is the paper's.

    Args:
        generalist: as `teacher_model` takes it. Classification of one label, a row an example or a token.
        specialists: classes → a model, a folder or a Hub id. Classes are the generalist's label names or ids. The
            head has one column more than classes; label names say which is which (the one that is no class is the
            dustbin), or, where they are transformers' default names, the classes' order with the dustbin last.
        dustbin_bias: added to each dustbin's logit, in the order of `specialists`: `SpecialistSet.dustbin_bias`. None:
            nothing, for specialists that were trained on data as it is, or are corrected already.
        most_probable: how many of the generalist's classes ask for specialists (the paper's n, there 1).

    Raises:
        SettingError, TeacherError: see the messages.

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
            if not isinstance(classes, tuple) or not classes or len(set(classes)) != len(classes):
                raise SettingError(f"Specialists: classes {classes!r}: give a tuple of different label names or ids.")
        bias = [0.0] * len(specialists) if dustbin_bias is None else [float(one) for one in dustbin_bias]
        if len(bias) != len(specialists):
            raise SettingError(
                f"Specialists: {len(bias)} numbers in dustbin_bias for {len(specialists)} specialists. Give one for "
                "each, in their order."
            )
        if not isinstance(most_probable, int) or most_probable < 1:
            raise SettingError(f"Specialists: most_probable={most_probable!r}: must be a whole number, at least 1.")
        self._given_generalist, self._given = generalist, list(specialists.items())
        self._bias, self._most_probable = bias, most_probable
        self._accelerator: Any = None
        self._members = torch.zeros(0, 0, dtype=torch.bool)  # [m v]
        self._orders: list[Tensor] = []  # of each specialist: its columns in the order of the classes, dustbin last
        self._generalist: Teacher | None = None
        self._specialists: list[ModelTeacher] = []
        self.alignment = HeadAlignment()

    def __repr__(self) -> str:
        classes = [list(classes) for classes, _ in self._given]
        return f"Specialists({classes}, most_probable={self._most_probable})"

    @property
    def teachers(self) -> list[Teacher]:
        """The generalist, then the specialists; none before `bind`."""
        return [] if self._generalist is None else [self._generalist, *self._specialists]

    @property
    def inputs(self) -> tuple[str, ...]:  # type: ignore[override]  # known after `bind`
        """What any of them reads; known after `bind`."""
        return tuple(dict.fromkeys(name for teacher in self.teachers for name in teacher.inputs))

    def bind(self, setup: TeacherSetup) -> None:
        """The generalist must be able to teach this student, and each specialist know its classes.

        Raises:
            TeacherError: another kind of head, or labels that do not match.
        """
        task = setup.task
        if task.matched_by != "labels" or task.on_values:
            raise TeacherError(
                f"Specialists: a {task} head has no classes to be a specialist of. They are for classification of "
                "one label: a sequence, an image, a sound, or each token."
            )
        if self._generalist is None:
            self._specialists = [_as_model_teacher(model, str(task), classes) for classes, model in self._given]
            self._generalist = as_teacher(self._given_generalist, str(task))
        for specialist in self._specialists:  # before the generalist: what the task learns of configs is of the last
            check_same_head(unwrapped(specialist.model), task)
            specialist.bind(replace(setup, compares_predictions=False))
        self._generalist.bind(setup)
        self.alignment = HeadAlignment(student=self._generalist.alignment.student)
        if setup.compares_predictions:
            self._pair_columns(setup.student)

    def __call__(self, task: Task, batch: Batch, needs: Needs) -> Signals:
        assert self._generalist is not None  # `bind` comes first
        logits = self._ask(self._generalist, task, batch, needs.temperature)  # [... v]
        if logits.shape[-1] != self._members.shape[1]:
            raise TeacherError(
                f"Specialists: rows of {logits.shape[-1]} columns for {self._members.shape[1]} labels: several labels "
                "an example, where each is a yes or no of its own, have no confusable classes. Use one label."
            )
        rows = logits.reshape(-1, logits.shape[-1])
        log_q = self._agreed(rows, task, batch, needs.temperature)
        return Signals(logits=(needs.temperature * log_q).view(logits.shape), alignment=self.alignment)

    def to(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        for teacher in self.teachers:
            teacher.to(accelerator)

    def on_step(self, student: nn.Module) -> None:
        for teacher in self.teachers:
            teacher.on_step(student)

    def models(self) -> list[nn.Module]:
        return [model for teacher in self.teachers for model in teacher.models()]

    def members(self) -> list[Teacher]:
        return [member for teacher in self.teachers for member in teacher.members()]

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self._generalist is None else self._generalist.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        assert self._generalist is not None  # `bind` comes first
        self._generalist.load_state_dict(state)

    @property
    def changes_in_training(self) -> bool:
        return self._generalist is not None and self._generalist.changes_in_training

    def _ask(self, teacher: Teacher, task: Task, batch: Batch, temperature: float) -> Tensor:
        needs = Needs(logits=True, temperature=temperature)
        return in_full_precision(teacher(task, batch, needs).predictions())

    def _agreed(self, logits: Tensor, task: Task, batch: Batch, temperature: float) -> Tensor:
        """`[n v]`: the log of the agreed distribution."""
        members = self._members = self._members.to(logits.device)
        log_told = (logits / temperature).log_softmax(-1)
        probable = logits.topk(min(self._most_probable, logits.shape[-1])).indices  # [n k]
        asked = members.T[probable].any(1)  # [n m]
        log_rest = torch.full(asked.shape, -torch.inf, dtype=logits.dtype, device=logits.device)
        for number, specialist in enumerate(self._specialists):
            if not self._is_sharded() and not bool(asked[:, number].any()):
                continue
            special = members[number]
            said = self._ask(specialist, task, batch, temperature)
            said = said.reshape(-1, said.shape[-1])[:, self._orders[number].to(said.device)]  # [n k+1]
            dustbin = (said[:, -1:] + self._bias[number]) / temperature + _spread(logits[:, ~special], temperature)
            log_p = torch.cat((said[:, :-1] / temperature, dustbin), -1).log_softmax(-1).to(logits.dtype)
            log_p = log_p.masked_fill(~asked[:, number, None], -torch.inf)
            log_told[:, special] = torch.logaddexp(log_told[:, special], log_p[:, :-1])
            log_rest[:, number] = log_p[:, -1]
        return fit_class_distribution(log_told, log_rest, members)

    def _is_sharded(self) -> bool:
        """Then every process must run every model, whatever its rows ask for."""
        kind = getattr(self._accelerator, "distributed_type", None)
        return kind in (DistributedType.DEEPSPEED, DistributedType.FSDP)

    def _pair_columns(self, student: Any) -> None:
        assert self._generalist is not None
        config = getattr(unwrapped(student), "config", None)
        if config is None:
            raise TeacherError("Specialists: the student has no config, so its labels have no names. Give it one.")
        order = self._generalist.alignment.teacher
        order = order if isinstance(order, tuple) else tuple(range(config.num_labels))  # the generalist's ids in place
        named = getattr(unwrapped(getattr(self._generalist, "model", student)), "config", config)
        members, orders = [], []
        for (classes, _), specialist in zip(self._given, self._specialists, strict=True):
            ids = [_id_of(one, classes, label_ids(named), len(order)) for one in classes]
            if len(ids) >= len(order):
                raise TeacherError(f"Specialists: {classes!r} are all classes, so there is no rest for a dustbin.")
            special = torch.tensor([index in ids for index in order])
            names = {index: name for name, index in label_ids(named).items()}
            own = _own_columns(specialist, [names[index] for index in ids], classes)
            in_place = [own[ids.index(index)] for index in order if index in ids]
            members.append(special)
            orders.append(torch.tensor([*in_place, own[-1]]))
        self._members, self._orders = torch.stack(members), orders


def _spread(rest: Tensor, temperature: float) -> Tensor:
    """`[n 1]` the log of how much more a dustbin weighs when it is softened as its classes; 0 at temperature 1."""
    if temperature == 1:
        return rest.new_zeros(len(rest), 1)
    return (rest.log_softmax(-1) / temperature).logsumexp(-1, keepdim=True)


def _as_model_teacher(model: Any, kind: str, classes: Classes) -> ModelTeacher:
    teacher = as_teacher(model, kind)
    if not isinstance(teacher, ModelTeacher):
        raise TeacherError(
            f"Specialists: the specialist of {classes!r} is a {type(teacher).__name__}. Give a model, a folder or a "
            "Hub id; a specialist's head has columns of its own."
        )
    return teacher


def _id_of(one: int | str, classes: Classes, ids: Mapping[str, int], count: int) -> int:
    found = ids.get(one) if isinstance(one, str) else one
    if not isinstance(found, int) or not 0 <= found < count:
        raise TeacherError(
            f"Specialists: {one!r} in {classes!r} is no label of the generalist. It has ids 0 to {count - 1}: "
            f"{', '.join(sorted(ids, key=lambda name: ids[name])[:8])}{', …' if len(ids) > 8 else ''}."
        )
    return found


def _own_columns(specialist: ModelTeacher, names: list[str], classes: Classes) -> list[int]:
    """The specialist's columns of these classes, then that of its dustbin."""
    config = getattr(unwrapped(specialist.model), "config", None)
    width = None if config is None else config.num_labels
    if width != len(names) + 1:
        raise TeacherError(
            f"Specialists: the specialist of {classes!r} has {width} labels; it must have {len(names) + 1}: one for "
            "each class, and the dustbin. `specialist_head` makes such a head."
        )
    ids = label_ids(config)
    if ids == {f"LABEL_{index}": index for index in range(len(ids))}:  # numbers of columns, not names of classes
        return list(range(len(ids)))
    if set(names) < set(ids):
        (dustbin,) = set(ids) - set(names)
        return [*(ids[name] for name in names), ids[dustbin]]
    raise TeacherError(
        f"Specialists: the specialist of {classes!r} has labels {sorted(ids)}; expected {names} and a dustbin. Set its "
        "config.label2id and id2label to the generalist's names."
    )
