"""CachedTeacher: a teacher that was asked once. It answers from a cache; training does not know the difference."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from hf_distill.errors import SettingError, TeacherError
from hf_distill.signals import Needs, Signals
from hf_distill.tasks import Batch, Task
from hf_distill.tasks.base import batch_size, first_tensor
from hf_distill.tasks.infer import unwrapped
from hf_distill.teachers import fitting
from hf_distill.teachers.cached import fingerprints, layout
from hf_distill.teachers.cached.cache import POSITIONS, TeacherCache
from hf_distill.teachers.cached.collator import CachedCollator
from hf_distill.teachers.cached.keys import CACHED_PREFIX
from hf_distill.teachers.cached.planning import decoder_rule, task_settings
from hf_distill.vocabulary import Columns

logger = logging.getLogger(__name__)


class CachedTeacher:
    """A `Teacher` that looks up what the model said when the cache was built.

    Examples are known by their content, so order, shuffling, filtering, epochs, workers and processes do not matter.
    A batch from `collator` brings the answers with it; for any other batch they are looked up when they are asked
    for, which is slower and gives the same.

    Args:
        cache: a folder, or a `TeacherCache`.
        teacher: the model that is meant: its weights are compared with those that the cache was built with.
        label_matching: "by_name" or "by_index".

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
        self._label_matching = label_matching
        self._told = False
        mask = ("attention_mask",) if self.cache.manifest["inputs"]["masked"] else ()
        self.inputs = tuple(dict.fromkeys([*self.cache.columns, *mask]))
        if teacher is not None:
            self._refuse_other_teacher(teacher)

    @classmethod
    def from_hub(cls, repo_id: str, *, revision: str | None = None, token: str | None = None) -> CachedTeacher:
        """A cache that was pushed as a dataset, by its Hub id; downloaded once, then from huggingface_hub's cache.

        Args: as `huggingface_hub.snapshot_download`.
        """
        from huggingface_hub import snapshot_download

        return cls(snapshot_download(repo_id, repo_type="dataset", revision=revision, token=token))

    def collator(self, collator: Callable[..., Any]) -> CachedCollator:
        """That collator, with the answers beside what it makes: for the training's data loader."""
        if isinstance(collator, CachedCollator) and collator.cache is self.cache:
            return collator
        return CachedCollator(collator, self.cache)

    def __call__(self, task: Task, batch: Batch, needs: Needs) -> Signals:
        self.check_needs(needs)
        if not needs.logits:
            return Signals(logits=None, columns=self.columns)
        laid = self._answers(task, batch)
        listed = self.cache.store.sparse_rows(laid, needs.temperature)
        if listed is not None:
            return Signals(logits=None, columns=self.columns, sparse=listed)
        logits = task.read(layout.as_outputs(task, laid["logits"].float()), batch, self.columns, teacher=True)
        return Signals(logits=logits, columns=self.columns)

    def check_needs(self, needs: Needs) -> None:
        """Raises SettingError: for what it cannot be asked."""
        if needs.reads:
            raise SettingError(
                "an objective asks for the teacher's inside, and a cached teacher holds its predictions alone. Use the "
                "live teacher, or leave the objective out."
            )
        if needs.logits:
            self.cache.store.check_temperature(needs.temperature, self.cache.manifest["predictions"]["columns"])

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
        self._refuse_other_task(student, task)
        self._refuse_other_tokenizer(student_processor, task, same_inputs)
        if compares_predictions:
            tokenizer = fitting.tokenizer_in(student_processor)
            known = self.cache.manifest["processor"] is not None  # then it is the student's, or was refused
            self.columns = fitting.matched_columns(
                student,
                self._remembered(),
                task,
                tokenizers=(tokenizer, tokenizer if known else None),
                label_matching=self._label_matching,
            )
            self._refuse_other_columns()
        task.learn_from(self._remembered().config)

    def place(self, accelerator: Any) -> None:
        """Nothing: the answers travel with the batch."""

    def after_step(self, student: nn.Module) -> None:
        """Nothing: it was asked once."""

    # Answers.

    def _answers(self, task: Task, batch: Batch) -> dict[str, Tensor]:
        """The store's fields as the batch lies, on its device."""
        found = {name: value for name, value in batch.items() if name.startswith(CACHED_PREFIX)}
        if not found:
            self._tell_once()
            device = first_tensor(batch).device
            found = {name: value.to(device) for name, value in self.cache.look_up(batch, task).items()}
        elif self.cache.axis == "frames":
            real = layout.real_positions("frames", batch, task=task)
            assert real is not None
            layout.refuse_other_lengths(real.sum(1).numpy(), found[POSITIONS].cpu().numpy())
        laid = {name.removeprefix(CACHED_PREFIX): value for name, value in found.items() if name != POSITIONS}
        if self.cache.axis in ("frames", "decoder"):
            rows = task.rows(batch) // batch_size(batch)
            laid = {name: layout.lengthened(value, rows) for name, value in laid.items()}
        return laid

    def _tell_once(self) -> None:
        if not self._told:
            self._told = True
            logger.info(
                "The cached teacher is looked up in the training process. To have the data loader do it, wrap the "
                "collator: teacher.collator(data_collator)."
            )

    # Checks.

    def _remembered(self) -> Any:
        """As much of the teacher as decides which columns of the heads mean the same."""
        config = dict(self.cache.manifest["teacher"]["config"])
        if config["id2label"] is not None:
            config["id2label"] = {int(index): name for index, name in config["id2label"].items()}
            config["label2id"] = {name: index for index, name in config["id2label"].items()}
        width = self.cache.manifest["predictions"]["columns"]
        return SimpleNamespace(
            config=SimpleNamespace(**config), lm_head=SimpleNamespace(weight=torch.empty(width, 0, device="meta"))
        )

    def _refuse_other_teacher(self, teacher: nn.Module) -> None:
        there, now = self.cache.manifest["teacher"]["weights"], fingerprints.of_weights(teacher)
        if there != now:
            raise TeacherError(
                f"the cache was built with another teacher: its weights have the fingerprint {there} "
                f"({self.cache.manifest['teacher']['class']}), those of the teacher that is asked for "
                f"{now} ({type(unwrapped(teacher)).__name__}). Build a cache of this teacher, or ask for the other."
            )

    def _refuse_other_columns(self) -> None:
        """What is listed by number of column must be listed of the columns that are compared."""
        width = self.cache.manifest["predictions"]["columns"]
        if self.cache.store.lists_columns and self.columns.teacher not in (None, width):
            compared = self.columns.teacher
            raise TeacherError(
                f"the cache lists some of {width} columns, and student and teacher share "
                f"{compared if isinstance(compared, int) else 'some'} of them: what is listed may not be there. Build "
                "it with processing_class= (the student's tokenizer), or keep all: store=Dense()."
            )

    def _refuse_other_task(self, student: Any, task: Task) -> None:
        there = self.cache.manifest["task"]
        now = {"kind": task.kind, **task_settings(task)}
        if there["kind"] != now["kind"]:
            raise TeacherError(
                f"the cache holds the predictions of a {there['kind']} head, the student needs a teacher for "
                f"{task.kind}. Build a cache of a teacher with the student's kind of head."
            )
        if there != now:
            raise TeacherError(
                f"the cache was built for another {task.kind} task: "
                f"{'; '.join(fingerprints.differences(there, now))}. Build it with student= or task= of this training."
            )
        rule, ours = self.cache.manifest["inputs"]["decoder"], decoder_rule(task, student)
        if rule is not None and "decoder_input_ids" not in self.cache.columns and ours != rule:
            raise TeacherError(
                f"the cache was built with other decoder inputs: labels 5, 6, 7 became {rule} there, the student makes "
                f"{ours} of them. Give the student the start and padding tokens of the cache, or build it with "
                "student=."
            )

    def _refuse_other_tokenizer(self, student_processor: Any, task: Task, same_inputs: bool) -> None:
        there = self.cache.manifest["processor"]
        now = fingerprints.of_processor(student_processor)
        if there is None or now is None or not (task.needs_same_inputs or same_inputs):
            return
        compared = [name for name in ("vocabulary", "tokenizer", "extractor") if name in there and name in now]
        before, after = ({name: side[name] for name in compared} for side in (there, now))
        if before != after:
            raise TeacherError(
                "the cache was built with another tokenizer or extractor than the student's: "
                f"{'; '.join(fingerprints.differences(before, after))}. Rows of a {task.kind} head are positions of "
                "the input, so both must read the same. Build a cache with the student's tokenizer."
            )
