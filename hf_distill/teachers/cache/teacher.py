"""Whether what a cache holds can teach a student: task, tokenizer, decoder inputs, columns. Decided before training."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_distill.errors import SettingError, TeacherError
from hf_distill.models.positions import PositionRule
from hf_distill.signals import ActivationKey, Needs, Signals, SparseRows
from hf_distill.tasks import Batch, Task
from hf_distill.tasks.base import batch_size, first_tensor
from hf_distill.tasks.infer import unwrapped
from hf_distill.tasks.language import decoder_rule
from hf_distill.teachers import model as fitting
from hf_distill.teachers.base import Collator, Teacher, TeacherSetup, teacher_inputs
from hf_distill.teachers.cache import keys as fingerprints
from hf_distill.teachers.cache import layout
from hf_distill.teachers.cache import layout as inside_layout
from hf_distill.teachers.cache.build import check_deterministic
from hf_distill.teachers.cache.cache import TeacherCache
from hf_distill.teachers.cache.files import POSITIONS
from hf_distill.teachers.cache.hidden import CachedInside
from hf_distill.teachers.cache.keys import CACHED_PREFIX, read_by_teacher
from hf_distill.teachers.cache.source import check_same_versions
from hf_distill.teachers.cache.stores import Dense, TopKFromServer
from hf_distill.teachers.passes import differences
from hf_distill.vocabulary import HeadAlignment

if TYPE_CHECKING:
    from hf_distill.objectives import Objective


def remembered(cache: TeacherCache) -> Any:
    """As much of the teacher as decides which columns of the heads mean the same."""
    config = dict(cache.manifest["teacher"]["config"])
    if config["id2label"] is not None:
        config["id2label"] = {int(index): name for index, name in config["id2label"].items()}
        config["label2id"] = {name: index for index, name in config["id2label"].items()}
    width = cache.manifest["predictions"]["columns"]
    return SimpleNamespace(
        config=SimpleNamespace(**config), lm_head=SimpleNamespace(weight=torch.empty(width, 0, device="meta"))
    )


def matched_columns(
    cache: TeacherCache, student: Any, task: Task, *, processor: Any, label_matching: str
) -> HeadAlignment:
    """The columns that the student's head and the cache have in common.

    Raises:
        TeacherError: other labels or another vocabulary; or columns are listed that are not compared.
    """
    tokenizer = fitting.tokenizer_in(processor)
    known = cache.manifest["processor"] is not None  # then it is the student's, or was refused
    columns = fitting.matched_columns(
        student,
        remembered(cache),
        task,
        tokenizers=(tokenizer, tokenizer if known else None),
        label_matching=label_matching,
    )
    width = cache.manifest["predictions"]["columns"]
    if cache.store.is_sparse and columns.teacher not in (None, width):
        compared = columns.teacher
        raise TeacherError(
            f"the cache lists some of {width} columns, and student and teacher share "
            f"{compared if isinstance(compared, int) else 'some'} of them: what is listed may not be there. Build "
            "it with processing_class= (the student's tokenizer), or keep all: store=Dense()."
        )
    return columns


def known_columns(cache: TeacherCache, task: Task, *, processor: Any) -> HeadAlignment:
    """Of heads whose columns are not paired: over a vocabulary, those that each one's own tokenizer can write."""
    ours = fitting.known_columns(task, (fitting.tokenizer_in(processor), None))
    theirs = (cache.manifest["processor"] or {}).get("ids") if task.matched_by == "vocabulary" else None
    return HeadAlignment(ours.student, theirs)


def check_same_teacher(cache: TeacherCache, teacher: nn.Module) -> None:
    """Raises TeacherError: it is not the one that was asked."""
    there, now = cache.manifest["teacher"]["weights"], fingerprints.of_weights(teacher)
    if there != now:
        raise TeacherError(
            f"the cache was built with another teacher: its weights have the fingerprint {there} "
            f"({cache.manifest['teacher']['class']}), those of the teacher that is asked for "
            f"{now} ({type(unwrapped(teacher)).__name__}). Build a cache of this teacher, or ask for the other."
        )


def check_same_task(cache: TeacherCache, student: Any, task: Task, *, compares_predictions: bool) -> None:
    """Raises TeacherError: another kind of head, another pooling, or other decoder inputs.

    A teacher that makes its own decoder inputs has none that the student's could differ from.
    """
    there = cache.manifest["task"]
    now = {"kind": str(task), **task.settings()}
    if compares_predictions and there["kind"] != now["kind"]:
        raise TeacherError(
            f"the cache holds the predictions of a {there['kind']} head, the student needs a teacher for "
            f"{task}. Build a cache of a teacher with the student's kind of head."
        )
    if compares_predictions and there != now:
        raise TeacherError(
            f"the cache was built for another {task} task: "
            f"{'; '.join(differences(there, now))}. Build it with student= or task= of this training."
        )
    rule, ours = cache.manifest["inputs"]["decoder"], decoder_rule(student)
    if rule is not None and "decoder_input_ids" not in cache.columns and ours != rule:
        raise TeacherError(
            f"the cache was built with other decoder inputs: labels 5, 6, 7 became {rule} there, the student makes "
            f"{ours} of them. Give the student the start and padding tokens of the cache, or build it again with "
            "student=."
        )


def check_same_tokenizer(cache: TeacherCache, processor: Any, task: Task, *, same_inputs: bool) -> None:
    """Raises TeacherError: positions are compared, and student and teacher were not given the same ones."""
    there = cache.manifest["processor"]
    now = fingerprints.of_processor(processor)
    if there is None or now is None or not same_inputs:
        return
    compared = [name for name in ("vocabulary", "tokenizer", "extractor") if name in there and name in now]
    before, after = ({name: side[name] for name in compared} for side in (there, now))
    if before != after:
        raise TeacherError(
            "the cache was built with another tokenizer or extractor than the student's: "
            f"{'; '.join(differences(before, after))}. Rows of a {task} head are positions of "
            "the input, so both must read the same. Build a cache with the student's tokenizer."
        )


class CachedCollator:
    """The user's collator, with `teacher_cached_*` columns beside what it makes: aligned with the batch's padding.

    For evaluation it is the user's collator alone: evaluation does not ask the teacher, and its examples need not be
    in the cache.

    Args:
        collator: makes a batch of examples.
        cache: where to look. slot, fields: as `TeacherCache.look_up`.

    Raises:
        SettingError: a collator that draws masks or augmentations at run time, for both models, unless the cache was
            built of the same versions (`AugmentingCollator(views=...)`).
    """

    def __init__(
        self,
        collator: Callable[..., Any],
        cache: TeacherCache,
        *,
        slot: str = "",
        fields: Collection[str] | None = None,
    ) -> None:
        check_deterministic(collator)
        check_same_versions(collator, cache.manifest)
        self.collator = collator
        self.cache = cache
        self.slot = slot
        self.fields = fields

    def __getattr__(self, name: str) -> Any:
        """Whatever is asked of the user's collator (`tokenizer`, say) is asked of it still."""
        if name in ("collator", "cache"):  # not there yet: being unpickled
            raise AttributeError(name)
        return getattr(self.collator, name)

    def for_evaluation(self) -> Callable[..., Any]:
        clean = getattr(self.collator, "for_evaluation", None)
        return self.collator if clean is None else clean()

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> Any:
        batch = self.collator(features)
        if "decoder_input_ids" in self.cache.columns and "decoder_input_ids" not in batch:
            return batch  # the training makes them of the labels, and looks up then
        own = batch
        for number in filter(None, self.slot.split("_")):
            own = teacher_inputs(own, int(number))
        batch.update(self.cache.look_up(own, slot=self.slot, fields=self.fields))
        return batch

    def answers_as(self, other: CachedCollator) -> bool:
        """Whether it gives a batch what the other one does."""
        mine, theirs = self.fields, other.fields
        enough = mine is None or (theirs is not None and set(theirs) <= set(mine))
        return self.cache is other.cache and self.slot == other.slot and enough


logger = logging.getLogger(__name__)


class CachedTeacher(Teacher):
    """A `Teacher` that looks up what the model said when the cache was built.

    Examples are known by their content, so order, shuffling, filtering, epochs, workers and processes do not matter.
    A batch from `collator` brings the answers with it; for any other batch they are looked up when they are asked
    for, which is slower and gives the same. Objectives on the inside are served where the cache was built with them.

    Args:
        cache: a folder, or a `TeacherCache`.
        teacher: the model that is meant: its weights are compared with those that the cache was built with.
        label_matching: "by_name" or "by_index".

    Attributes:
        slot: between the prefix of its columns in a batch and their names; an `Ensemble` gives each cache its own.

    Raises:
        DataError: the cache is unfinished or damaged. TeacherError: no cache, or of another teacher.
    """

    def __init__(
        self,
        cache: TeacherCache | str | os.PathLike[str],
        *,
        teacher: nn.Module | None = None,
        label_matching: str = "by_name",
    ) -> None:
        self.cache = cache if isinstance(cache, TeacherCache) else TeacherCache(cache)
        self.alignment = HeadAlignment()
        self.capture: CachedInside = self.cache.inside  # type: ignore[assignment]  # knows blocks as a model's does
        self.slot = ""
        self._label_matching = label_matching
        self._told = False
        self._fields: frozenset[str] | None = None  # of the inside, that objectives ask for; None: not known
        self._positions: dict[bool, PositionRule] = {}
        mask = ("attention_mask",) if self.cache.manifest["inputs"]["masked"] else ()
        self.inputs = tuple(dict.fromkeys([*self.cache.columns, *mask]))
        if teacher is not None:
            check_same_teacher(self.cache, teacher)

    @classmethod
    def from_hub(cls, repo_id: str, *, revision: str | None = None, token: str | None = None) -> CachedTeacher:
        """A cache that was pushed as a dataset, by its Hub id; downloaded once, then from huggingface_hub's cache.

        Args: as `huggingface_hub.snapshot_download`.
        """
        from huggingface_hub import snapshot_download

        return cls(snapshot_download(repo_id, repo_type="dataset", revision=revision, token=token))

    @property
    def is_sparse(self) -> bool:  # type: ignore[override]  # the store decides
        return self.cache.store.is_sparse

    @property
    def fixed_temperature(self) -> bool:
        return self.cache.bound_to is not None

    def describe(self) -> str:
        teacher = self.cache.manifest["teacher"]
        return f"the stored predictions (a cache) of {teacher['name'] or 'a ' + teacher['class']}"

    def __repr__(self) -> str:
        return f"CachedTeacher(store={self.cache.store!r})"

    def wrap_collator(self, collator: Collator) -> Collator:
        """Return that collator, with the stored answers beside the columns that it makes."""
        made = CachedCollator(collator, self.cache, slot=self.slot, fields=self._fields)
        wrapped: Any = collator
        while isinstance(wrapped, CachedCollator):
            if wrapped.answers_as(made):
                return collator
            wrapped = wrapped.collator
        return made

    def __call__(self, task: Task, batch: Batch, needs: Needs) -> Signals:
        self._check_needs(needs)
        if not (needs.logits or needs.activations):
            return Signals(logits=None, alignment=self.alignment)
        laid = self._answers(task, batch, needs.activations)
        inside = {read: self._shown(read, laid, batch) for read in needs.activations}
        if not needs.logits:
            return Signals(logits=None, alignment=self.alignment, activations=inside)
        own = self._along_the_task(laid, task, batch)
        listed = self.cache.store.sparse_rows(own, needs.temperature)
        if listed is not None:
            if isinstance(self.cache.store, TopKFromServer):
                _check_all_scored(listed, task, batch)
            return Signals(logits=None, alignment=self.alignment, activations=inside, sparse=listed)
        assert isinstance(self.cache.store, Dense)  # every other store lists columns
        logits = task.read(task.outputs_of_raw(self.cache.store.logits(own)), batch, self.alignment, teacher=True)
        return Signals(logits=logits, alignment=self.alignment, activations=inside)

    def check(self, needs: Needs, objectives: Iterable[Objective] = ()) -> None:
        """Check that the cache holds what is needed. From here on nothing else is looked up.

        Raises:
            SettingError: if predictions are needed at a temperature that was not stored.
            TeacherError: if an activation was not stored, or not as an objective needs it.
        """
        self._check_needs(needs)
        stored = [
            self.capture.check(key, objective.pools)
            for objective in objectives
            for key in sorted(objective.teacher_needs.activations, key=str)
        ]
        self._fields = frozenset(one.field for one in stored)

    def _check_needs(self, needs: Needs) -> None:
        for read in sorted(needs.activations, key=str):
            self.capture.find(read)
        if not needs.logits:
            return
        self.cache.store.check_temperature(needs.temperature, self.cache.manifest["predictions"]["columns"])
        known = self.cache.bound_to
        if known not in (None, needs.temperature):
            whose = self.cache.manifest["teacher"]["class"]
            raise SettingError(
                f"temperature={needs.temperature:g}: the cache holds what the {whose} says at temperature "
                f"{known:g}, and at another one it would say something else. Train at {known:g}, without a schedule, "
                f"or build the cache with temperature={needs.temperature:g}."
            )

    def bind(self, setup: TeacherSetup) -> None:
        """Check that the stored answers can teach this student, and align the heads.

        Raises:
            TeacherError: if they are of another kind of head, labels, tokenizer or decoder inputs.
        """
        student, task, compares = unwrapped(setup.student), setup.task, setup.compares_predictions
        self.slot = setup.slot
        check_same_task(self.cache, student, task, compares_predictions=compares)
        same = setup.same_inputs or (task.needs_same_inputs and compares)
        check_same_tokenizer(self.cache, setup.processing_class, task, same_inputs=same)
        if compares:
            self.alignment = matched_columns(
                self.cache, student, task, processor=setup.processing_class, label_matching=self._label_matching
            )
        else:
            self.alignment = known_columns(self.cache, task, processor=setup.processing_class)
        task.learn_from(remembered(self.cache).config)
        self._positions = {side: PositionRule(student, task, of_decoder=side) for side in (False, True)}

    # Answers.

    def _answers(self, task: Task, batch: Batch, reads: Iterable[ActivationKey]) -> dict[str, Tensor]:
        """What is kept, as the batch lies, on its device: that came with the batch, or is looked up now."""
        prefix = f"{CACHED_PREFIX}{self.slot}"
        fields = {self.capture.find(read).field for read in reads}
        wanted = [*self.cache.store.fields(self.cache.manifest["predictions"]["columns"]), *fields]
        if any(f"{prefix}{name}" not in batch for name in wanted):
            self._tell_once()
            device = first_tensor(batch).device
            looked_up = self.cache.look_up(batch, task, slot=self.slot, fields=fields)
            batch = {name: value.to(device) for name, value in looked_up.items()}
        return {name.removeprefix(prefix): value for name, value in batch.items() if name.startswith(prefix)}

    def _along_the_task(self, laid: Mapping[str, Tensor], task: Task, batch: Batch) -> dict[str, Tensor]:
        """The fields of the predictions, as long as the task's rows are."""
        names = self.cache.store.fields(self.cache.manifest["predictions"]["columns"])
        if self.cache.axis == "frames":
            real = layout.real_positions("frames", batch, task=task)
            assert real is not None  # a task with frames says which are real
            layout.check_lengths(real.sum(1).numpy(), laid[POSITIONS].cpu().numpy())
        if self.cache.axis not in ("frames", "decoder"):
            return {name: laid[name] for name in names}
        rows = task.rows(read_by_teacher(batch, self.cache.main)) // batch_size(batch)
        return {name: layout.lengthened(laid[name], rows) for name in names}

    def _shown(self, read: ActivationKey, laid: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """One read as the teacher's own hidden states would be."""
        kept = self.capture.find(read)
        positions = self._positions[self.capture.blocks(read.side, read.stack).of_decoder]
        own = read_by_teacher(batch, self.cache.main)
        return inside_layout.shown(laid[kept.field], kept, own, positions, laid.get(kept.counts))

    def _tell_once(self) -> None:
        if not self._told:
            self._told = True
            logger.info(
                "The cached teacher is looked up in the training process. To have the data loader do it, wrap the "
                "collator: teacher.wrap_collator(data_collator)."
            )


def _check_all_scored(listed: SparseRows, task: Task, batch: Batch) -> None:
    """A served teacher is asked about rows that count, which labels may decide."""
    tails, kept = task.select(listed.log_tail, batch), task.kept_rows(batch)
    missing = int((tails if kept is None else tails[kept]).isnan().sum())
    if missing:
        raise TeacherError(
            f"when the cache was built the teacher was not asked about {missing} of the rows that count in this batch: "
            "other labels were -100 then. Build it with the labels of this training."
        )
