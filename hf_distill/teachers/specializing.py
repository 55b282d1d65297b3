"""Making specialists: which classes belong together, a specialist's training set and its head. It trains nothing."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_distill.errors import DataError, SettingError, require
from hf_distill.functional.rows import in_full_precision
from hf_distill.vocabulary import label_ids

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
