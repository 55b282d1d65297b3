"""CachedTeacher: a teacher that was asked once. It answers from a cache; training does not know the difference."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from hf_distill.errors import SettingError, TeacherError
from hf_distill.inside.positions import Positions
from hf_distill.signals import Needs, Read, Signals, SparseRows
from hf_distill.tasks import Batch, Task
from hf_distill.tasks.base import batch_size, first_tensor
from hf_distill.tasks.infer import unwrapped
from hf_distill.teachers.cached import inside_layout, layout, matching
from hf_distill.teachers.cached.cache import TeacherCache
from hf_distill.teachers.cached.collator import CachedCollator
from hf_distill.teachers.cached.inside import CachedInside
from hf_distill.teachers.cached.keys import CACHED_PREFIX, read_by_teacher
from hf_distill.teachers.cached.listed import Listed
from hf_distill.teachers.cached.mapped import POSITIONS
from hf_distill.teachers.cached.stores import Dense
from hf_distill.vocabulary import Columns

logger = logging.getLogger(__name__)


class CachedTeacher:
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
        self.columns = Columns()
        self.slot = ""
        self._label_matching = label_matching
        self._told = False
        self._fields: frozenset[str] | None = None  # of the inside, that objectives ask for; None: not known
        self._positions: dict[bool, Positions] = {}
        mask = ("attention_mask",) if self.cache.manifest["inputs"]["masked"] else ()
        self.inputs = tuple(dict.fromkeys([*self.cache.columns, *mask]))
        if teacher is not None:
            matching.refuse_other_teacher(self.cache, teacher)

    @classmethod
    def from_hub(cls, repo_id: str, *, revision: str | None = None, token: str | None = None) -> CachedTeacher:
        """A cache that was pushed as a dataset, by its Hub id; downloaded once, then from huggingface_hub's cache.

        Args: as `huggingface_hub.snapshot_download`.
        """
        from huggingface_hub import snapshot_download

        return cls(snapshot_download(repo_id, repo_type="dataset", revision=revision, token=token))

    @property
    def inside(self) -> CachedInside:
        """What is known of the teacher's blocks."""
        return self.cache.inside

    @property
    def bound_to_temperature(self) -> bool:
        """Whether what is kept holds for one temperature alone."""
        return self.cache.bound_to is not None

    def described(self) -> str:
        """For the card."""
        teacher = self.cache.manifest["teacher"]
        return f"what {teacher['name'] or 'a ' + teacher['class']} said when it was asked once (a cache)"

    def collator(self, collator: Callable[..., Any]) -> CachedCollator:
        """That collator, with the answers beside what it makes: for the training's data loader."""
        made = CachedCollator(collator, self.cache, slot=self.slot, fields=self._fields)
        wrapped: Any = collator
        while isinstance(wrapped, CachedCollator):
            if wrapped.answers_as(made):
                return collator  # type: ignore[return-value]  # it is one
            wrapped = wrapped.collator
        return made

    def __call__(self, task: Task, batch: Batch, needs: Needs) -> Signals:
        self.check_needs(needs)
        if not (needs.logits or needs.reads):
            return Signals(logits=None, columns=self.columns)
        laid = self._answers(task, batch, needs.reads)
        inside = {read: self._shown(read, laid, batch) for read in needs.reads}
        if not needs.logits:
            return Signals(logits=None, columns=self.columns, inside=inside)
        own = self._along_the_task(laid, task, batch)
        listed = self.cache.store.sparse_rows(own, needs.temperature)
        if listed is not None:
            if isinstance(self.cache.store, Listed):
                _refuse_not_asked(listed, task, batch)
            return Signals(logits=None, columns=self.columns, inside=inside, sparse=listed)
        assert isinstance(self.cache.store, Dense)  # every other store lists columns
        logits = task.read(layout.as_outputs(task, self.cache.store.logits(own)), batch, self.columns, teacher=True)
        return Signals(logits=logits, columns=self.columns, inside=inside)

    def check_needs(self, needs: Needs) -> None:
        """Raises SettingError, TeacherError: for what it cannot be asked."""
        for read in sorted(needs.reads, key=str):
            self.cache.inside.find(read)
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

    def check_objectives(self, objectives: Iterable[Any]) -> None:
        """Raises TeacherError: one of these asks for what was not kept. From here on no more of it is looked up."""
        kept = [
            self.cache.inside.check(read, getattr(objective, "pools", None))
            for objective in objectives
            for read in sorted(objective.teacher_needs.reads, key=str)
        ]
        self._fields = frozenset(one.field for one in kept)

    def fit(
        self,
        student: nn.Module,
        task: Task,
        *,
        student_processor: Any = None,
        compares_predictions: bool = True,
        same_inputs: bool = False,
    ) -> None:
        """Check that what was cached can teach this student, and pair the columns of the heads. See `Teacher.fit`.

        Raises:
            TeacherError: another kind of head, other labels, another tokenizer, other decoder inputs.
        """
        student = unwrapped(student)
        matching.refuse_other_task(self.cache, student, task, compares_predictions=compares_predictions)
        same = same_inputs or (task.needs_same_inputs and compares_predictions)
        matching.refuse_other_tokenizer(self.cache, student_processor, task, same_inputs=same)
        if compares_predictions:
            self.columns = matching.matched_columns(
                self.cache, student, task, processor=student_processor, label_matching=self._label_matching
            )
        else:
            self.columns = matching.known_columns(self.cache, task, processor=student_processor)
        task.learn_from(matching.remembered(self.cache).config)
        self._positions = {side: Positions(student, task, of_decoder=side) for side in (False, True)}

    def place(self, accelerator: Any) -> None:
        """Nothing: the answers travel with the batch."""

    def after_step(self, student: nn.Module) -> None:
        """Nothing: it was asked once."""

    # Answers.

    def _answers(self, task: Task, batch: Batch, reads: Iterable[Read]) -> dict[str, Tensor]:
        """What is kept, as the batch lies, on its device: that came with the batch, or is looked up now."""
        prefix = f"{CACHED_PREFIX}{self.slot}"
        fields = {self.cache.inside.find(read).field for read in reads}
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
            layout.refuse_other_lengths(real.sum(1).numpy(), laid[POSITIONS].cpu().numpy())
        if self.cache.axis not in ("frames", "decoder"):
            return {name: laid[name] for name in names}
        rows = task.rows(read_by_teacher(batch, self.cache.main)) // batch_size(batch)
        return {name: layout.lengthened(laid[name], rows) for name in names}

    def _shown(self, read: Read, laid: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """One read as the teacher's own hidden states would be."""
        kept = self.cache.inside.find(read)
        positions = self._positions[self.cache.inside.blocks(read.side, read.stack).of_decoder]
        own = read_by_teacher(batch, self.cache.main)
        return inside_layout.shown(laid[kept.field], kept, own, positions, laid.get(kept.counts))

    def _tell_once(self) -> None:
        if not self._told:
            self._told = True
            logger.info(
                "The cached teacher is looked up in the training process. To have the data loader do it, wrap the "
                "collator: teacher.collator(data_collator)."
            )


def _refuse_not_asked(listed: SparseRows, task: Task, batch: Batch) -> None:
    """A served teacher is asked about rows that count, which labels may decide."""
    tails, kept = task.select(listed.log_tail, batch), task.kept_rows(batch)
    missing = int((tails if kept is None else tails[kept]).isnan().sum())
    if missing:
        raise TeacherError(
            f"when the cache was built the teacher was not asked about {missing} of the rows that count in this batch: "
            "other labels were -100 then. Build it with the labels of this training."
        )
