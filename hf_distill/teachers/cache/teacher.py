"""CachedTeacher: looks up the stored predictions of a teacher, and checks that they can teach this student."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_distill._types import Batch, Collator, Example, ProcessingClass
from hf_distill.errors import SettingError, TeacherError
from hf_distill.models.positions import PositionRule
from hf_distill.signals import ActivationKey, Needs, Signals, SparseRows
from hf_distill.tasks import Task
from hf_distill.tasks.base import batch_size, first_tensor
from hf_distill.tasks.infer import unwrapped
from hf_distill.tasks.language import decoder_rule
from hf_distill.teachers import model as heads
from hf_distill.teachers.base import Teacher, TeacherSetup, teacher_inputs
from hf_distill.teachers.cache import layout
from hf_distill.teachers.cache.cache import TeacherCache
from hf_distill.teachers.cache.files import POSITIONS
from hf_distill.teachers.cache.hidden import CachedActivations
from hf_distill.teachers.cache.keys import CACHED_PREFIX, read_by_teacher
from hf_distill.teachers.cache.source import check_not_random, check_same_versions
from hf_distill.teachers.cache.stores import Dense, TopKFromServer
from hf_distill.teachers.fingerprints import describe_processor, weights_fingerprint
from hf_distill.teachers.passes import differences
from hf_distill.teachers.shards import Json
from hf_distill.vocabulary import HeadAlignment, LabelMatching

if TYPE_CHECKING:
    from hf_distill.objectives import Objective

logger = logging.getLogger(__name__)


class CachedCollator:
    """Adds the stored predictions, as `teacher_cached_*` columns, to the batches of the user's collator.

    Args:
        collator: makes a batch of examples.
        cache: where to look up.
        slot: as in `TeacherCache.look_up`.
        fields: as in `TeacherCache.look_up`.

    Raises:
        SettingError: if the collator changes examples randomly, for student and teacher, unless the cache was built
            from the same versions (`AugmentingCollator(views=...)`).
    """

    def __init__(
        self, collator: Collator, cache: TeacherCache, *, slot: str = "", fields: Collection[str] | None = None
    ) -> None:
        check_not_random(collator)
        check_same_versions(collator, cache.manifest["augmentation"])
        self.collator = collator
        self.cache = cache
        self.slot = slot
        self.fields = fields

    def __repr__(self) -> str:
        return f"CachedCollator({type(self.collator).__name__}, {self.cache!r})"

    def __getattr__(self, name: str) -> Any:
        """Pass on attributes of the user's collator, such as `tokenizer`."""
        if name in ("collator", "cache"):  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.collator, name)

    def for_evaluation(self) -> Collator:
        """Return the user's collator: evaluation does not use the teacher, and the cache may lack its examples."""
        clean = getattr(self.collator, "for_evaluation", None)
        return self.collator if clean is None else clean()

    def __call__(self, features: Sequence[Example]) -> Any:
        batch = self.collator(list(features))
        if "decoder_input_ids" in self.cache.columns and "decoder_input_ids" not in batch:
            return batch  # the training makes them from the labels, and looks up then
        own = batch
        for index in filter(None, self.slot.split("_")):
            own = teacher_inputs(own, int(index))
        batch.update(self.cache.look_up(own, slot=self.slot, fields=self.fields))
        return batch

    def includes(self, other: CachedCollator) -> bool:
        """Return whether it adds to a batch everything that the other adds."""
        fields = self.fields is None or (other.fields is not None and set(other.fields) <= set(self.fields))
        return fields and self.cache is other.cache and self.slot == other.slot


class CachedTeacher(Teacher):
    """A teacher that looks up the predictions that were stored when the cache was built.

    Examples are identified by their content, so order, filtering, workers and processes do not matter. A batch from
    `wrap_collator` brings the predictions with it; for any other batch they are looked up when they are needed, which
    is slower and gives the same. Objectives can read the activations that the cache was built with.

    Args:
        cache: a folder, or a `TeacherCache`.
        teacher: the model that is meant, if its weights are to be compared with those that the cache was built with.
        label_matching: "by_name" or "by_index".

    Attributes:
        slot: stands between the prefix of its columns in a batch and their names; an `Ensemble` gives each cache one.

    Raises:
        DataError: if the cache is unfinished or damaged.
        TeacherError: if the folder holds no cache, or a cache of another teacher.
    """

    def __init__(
        self,
        cache: TeacherCache | str | os.PathLike[str],
        *,
        teacher: nn.Module | None = None,
        label_matching: LabelMatching = "by_name",
    ) -> None:
        self.cache = cache if isinstance(cache, TeacherCache) else TeacherCache(cache)
        self.alignment = HeadAlignment()
        self.capture: CachedActivations = self.cache.activations  # type: ignore[assignment]  # knows blocks, too
        self.recorded: Json = self.cache.manifest["teacher"]
        self.slot = ""
        self._label_matching = label_matching
        self._looked_up = False
        self._fields: frozenset[str] | None = None  # of activations that objectives read; None if not known
        self._positions: dict[bool, PositionRule] = {}
        mask = ("attention_mask",) if self.cache.manifest["inputs"]["masked"] else ()
        self.inputs = tuple(dict.fromkeys([*self.cache.columns, *mask]))
        there = self.recorded["weights"]
        if teacher is not None and weights_fingerprint(teacher) != there:
            raise TeacherError(
                f"the cache was built with another teacher: its weights have the fingerprint {there} "
                f"({self.recorded['class']}), not those of teacher= ({type(unwrapped(teacher)).__name__})."
            )

    @classmethod
    def from_hub(cls, repo_id: str, *, revision: str | None = None, token: str | None = None) -> CachedTeacher:
        """Return the teacher of a cache that `TeacherCache.push_to_hub` uploaded; see `snapshot_download`."""
        from huggingface_hub import snapshot_download

        return cls(snapshot_download(repo_id, repo_type="dataset", revision=revision, token=token))

    @property
    def is_sparse(self) -> bool:  # type: ignore[override]  # the store decides
        return self.cache.store.is_sparse

    @property
    def fixed_temperature(self) -> bool:
        return self.cache.temperature is not None

    def describe(self) -> str:
        return f"the stored predictions (a cache) of {self.recorded['name'] or 'a ' + self.recorded['class']}"

    def __repr__(self) -> str:
        return f"CachedTeacher(store={self.cache.store!r})"

    # Before the training.

    def bind(self, setup: TeacherSetup) -> None:
        """Check that the stored predictions can teach this student (raises TeacherError), and align the heads."""
        student, task, compares = unwrapped(setup.student), setup.task, setup.compares_predictions
        self.slot = setup.slot
        _check_same_task(self.cache, student, task, compares_predictions=compares)
        if setup.same_inputs or (task.needs_same_inputs and compares):
            _check_same_processor(self.cache, setup.processing_class, task)
        if compares:
            self.alignment = self._align_heads(student, task, setup.processing_class)
        else:
            ours = heads.known_columns(task, (heads.tokenizer_in(setup.processing_class), None))
            theirs = (self.cache.manifest["processor"] or {}).get("ids") if task.matched_by == "vocabulary" else None
            self.alignment = HeadAlignment(ours.student, theirs)
        task.learn_from(_model_facts(self.cache).config)
        self._positions = {side: PositionRule(student, task, of_decoder=side) for side in (False, True)}

    def _align_heads(
        self, student: PreTrainedModel, task: Task, processing_class: ProcessingClass | None
    ) -> HeadAlignment:
        tokenizer = heads.tokenizer_in(processing_class)
        known = self.cache.manifest["processor"] is not None  # then it is the student's, as was checked
        aligned = heads.matched_columns(
            student,
            _model_facts(self.cache),
            task,
            tokenizers=(tokenizer, tokenizer if known else None),
            label_matching=self._label_matching,
        )
        width = self.cache.manifest["predictions"]["columns"]
        if self.is_sparse and aligned.teacher not in (None, width):
            raise TeacherError(
                f"the cache keeps some of {width} columns, and the student does not share all of them. Build it with "
                "processing_class= (the student's tokenizer), or with store=Dense()."
            )
        return aligned

    def check(self, needs: Needs, objectives: Iterable[Objective] = ()) -> None:
        """Check that the cache holds what is needed. From here on nothing else is looked up."""
        self._check_needs(needs)
        stored = [
            self.capture.check(key, objective.pools)
            for objective in objectives
            for key in sorted(objective.teacher_needs.activations, key=str)
        ]
        self._fields = frozenset(kept.field for kept in stored)

    def _check_needs(self, needs: Needs) -> None:
        for key in sorted(needs.activations, key=str):
            self.capture.find(key)
        if not needs.logits:
            return
        self.cache.store.check_temperature(needs.temperature, self.cache.manifest["predictions"]["columns"])
        known = self.cache.temperature
        if known not in (None, needs.temperature):
            raise SettingError(
                f"temperature={needs.temperature:g}: the cache holds the predictions of the {self.recorded['class']} "
                f"for temperature {known:g} only. Train at that, without a schedule, or build another cache."
            )

    def wrap_collator(self, collator: Collator) -> Collator:
        """Return a collator that adds the stored predictions to the columns that this collator makes."""
        made = CachedCollator(collator, self.cache, slot=self.slot, fields=self._fields)
        wrapped: Any = collator
        while isinstance(wrapped, CachedCollator):
            if wrapped.includes(made):
                return collator
            wrapped = wrapped.collator
        return made

    # Predictions of a batch.

    def __call__(self, task: Task, batch: Batch, needs: Needs) -> Signals:
        self._check_needs(needs)
        laid = self._stored_fields(task, batch, needs) if needs.logits or needs.activations else {}
        activations = {key: self._activation(key, laid, batch) for key in needs.activations}
        logits = sparse = None
        if needs.logits:
            store, fields = self.cache.store, self._prediction_fields(laid, task, batch)
            sparse = store.sparse_rows(fields, needs.temperature)
            if isinstance(store, Dense):
                logits = task.read(task.outputs_of_raw(store.logits(fields)), batch, self.alignment, teacher=True)
            elif isinstance(store, TopKFromServer):
                _check_known(sparse, task, batch)
        return Signals(logits=logits, alignment=self.alignment, activations=activations, sparse=sparse)

    def _stored_fields(self, task: Task, batch: Batch, needs: Needs) -> dict[str, Tensor]:
        """Return the fields that came with the batch or are looked up now, on the batch's device."""
        prefix = f"{CACHED_PREFIX}{self.slot}"
        fields = {self.capture.find(key).field for key in needs.activations}
        if any(f"{prefix}{name}" not in batch for name in (*self.cache.fields, *fields)):
            if not self._looked_up:
                self._looked_up = True
                logger.info(
                    "The cached teacher is looked up in the training process. To have the data loader do it, wrap the "
                    "collator: teacher.wrap_collator(data_collator)."
                )
            device = first_tensor(batch).device
            looked_up = self.cache.look_up(batch, task, slot=self.slot, fields=fields)
            batch = {name: value.to(device) for name, value in looked_up.items()}
        return {name.removeprefix(prefix): value for name, value in batch.items() if name.startswith(prefix)}

    def _prediction_fields(self, laid: Mapping[str, Tensor], task: Task, batch: Batch) -> dict[str, Tensor]:
        """Return the fields of predictions, as long as the task's rows are."""
        if self.cache.axis == "frames":
            real = layout.frames_of(task, batch)
            layout.check_lengths(real.sum(1).numpy(), laid[POSITIONS].cpu().numpy())
        if self.cache.axis not in ("frames", "decoder"):
            return {name: laid[name] for name in self.cache.fields}
        rows = task.rows(read_by_teacher(batch, self.cache.main)) // batch_size(batch)
        return {name: layout.lengthen(laid[name], rows) for name in self.cache.fields}

    def _activation(self, key: ActivationKey, laid: Mapping[str, Tensor], batch: Batch) -> Tensor:
        kept = self.capture.find(key)
        positions = self._positions[self.capture.blocks(key.side, key.stack).of_decoder]
        own = read_by_teacher(batch, self.cache.main)
        return layout.as_hidden_states(laid[kept.field], kept, own, positions, laid.get(kept.counts))


def _model_facts(cache: TeacherCache) -> Any:
    """Return the parts of the teacher that decide which columns of the heads mean the same."""
    config = dict(cache.manifest["teacher"]["config"])
    if config["id2label"] is not None:
        config["id2label"] = {int(index): name for index, name in config["id2label"].items()}
        config["label2id"] = {name: index for index, name in config["id2label"].items()}
    width = cache.manifest["predictions"]["columns"]
    return SimpleNamespace(
        config=SimpleNamespace(**config), lm_head=SimpleNamespace(weight=torch.empty(width, 0, device="meta"))
    )


def _check_same_task(cache: TeacherCache, student: nn.Module, task: Task, *, compares_predictions: bool) -> None:
    """Raise TeacherError if kind of head, pooling or decoder inputs (unless the teacher made its own) differ."""
    there = cache.manifest["task"]
    now = {"kind": str(task), **task.settings()}
    if compares_predictions and there["kind"] != now["kind"]:
        raise TeacherError(
            f"the cache holds the predictions of a {there['kind']} head, the student needs a teacher for {task}."
        )
    if compares_predictions and there != now:
        raise TeacherError(
            f"the cache was built for another {task} task: {'; '.join(differences(there, now))}. Build it for this."
        )
    rule, ours = cache.manifest["inputs"]["decoder"], decoder_rule(student)
    if rule is not None and "decoder_input_ids" not in cache.columns and ours != rule:
        raise TeacherError(
            f"the cache was built with other decoder inputs: labels 5, 6, 7 became {rule} there, the student makes "
            f"{ours} of them. Give the student the same start and padding tokens, or build the cache with student=."
        )


def _check_same_processor(cache: TeacherCache, processing_class: ProcessingClass | None, task: Task) -> None:
    """Raise TeacherError if student and teacher read other positions."""
    there, now = cache.manifest["processor"], describe_processor(processing_class)
    if there is None or now is None:
        return
    compared = [name for name in ("vocabulary", "tokenizer", "extractor") if name in there and name in now]
    before, after = ({name: side[name] for name in compared} for side in (there, now))
    if before != after:
        raise TeacherError(
            "the cache was built with another tokenizer or extractor than the student's: "
            f"{'; '.join(differences(before, after))}. Rows of a {task} head are positions of the input: use the same."
        )


def _check_known(sparse: SparseRows | None, task: Task, batch: Batch) -> None:
    """Raise TeacherError if a served teacher was not queried for a row that counts, which labels may decide."""
    assert sparse is not None  # the store is sparse
    tails, kept = task.select(sparse.log_tail, batch), task.kept_rows(batch)
    missing = int((tails if kept is None else tails[kept]).isnan().sum())
    if missing:
        raise TeacherError(
            f"when the cache was built the teacher was not queried for {missing} of the rows that count in this batch. "
            "Build it with the labels of this training."
        )
