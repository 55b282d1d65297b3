"""Showing the models another batch than the collator's, where the student is needed for it: before its rows are
counted."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from accelerate.utils import DistributedType
from transformers import Trainer

from hf_distill.errors import SettingError

_SHARDED = {DistributedType.FSDP: "FSDP", DistributedType.DEEPSPEED: "DeepSpeed"}

if TYPE_CHECKING:
    _Trainer = Trainer
else:
    _Trainer = object


class ViewingMixin(_Trainer):
    """Asks `view` about each micro-batch of a training step; evaluation is on the data as it is."""

    distiller: Any
    _view: Any = None
    _progress: float
    _view_fits: Any = None  # the student that was looked at

    def _check_view(self) -> None:
        """Refuse a view that this training cannot have. Called again for another student.

        Raises:
            SettingError: see the messages.
        """
        if self._view is None or self._view_fits is self.model:
            return
        _refuse_no_view(self._view)
        teacher = self.distiller.teacher
        self._view.fit(self.model, self.distiller.task, teacher=teacher, processing_class=self.processing_class)
        if self.distiller.needs_labels():
            raise SettingError(
                f"{self._view!r} shows texts that the student wrote, which are no gold labels, and alpha < 1 would "
                "teach it them as such. Pass alpha=1.0, or alpha=None with objectives."
            )
        if _looks_up(teacher):
            raise SettingError(
                f"{self._view!r} shows texts that the student writes while it trains, and a cached teacher was asked "
                "before. Use a model as teacher."
            )
        sharded = _SHARDED.get(self.accelerator.distributed_type)
        how = "tensor parallelism" if self.get_tp_size() > 1 else sharded
        if how is not None:
            raise SettingError(
                f"{self._view!r} lets the student write in each process by itself, and with {how} no process has all "
                "of it. Use data parallelism (DDP), or let the teacher write before the training: "
                "hf_distill.generate_completions."
            )
        self._view_fits = self.model

    def _with_view(self, training: Any) -> Any:
        """The facts of a training, with the view that it had."""
        return training if self._view is None else replace(training, extra={**training.extra, "view": repr(self._view)})

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """As `Trainer`'s; its count of items is that of what is shown."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._view is None or not batches:
            return batches, num_items
        self._check_view()
        shown = [
            self._view(
                batch,
                self.model,
                step=self.state.global_step,
                micro_batch=place,
                process=self.accelerator.process_index,
                progress=self._progress,
            )
            for place, batch in enumerate(batches)
        ]
        return shown, self._get_num_items_in_batch(shown, device)


def _refuse_no_view(view: Any) -> None:
    if isinstance(view, type):
        raise SettingError(f"view={view.__name__} is a class. Make one of it: view={view.__name__}(...).")
    if not callable(view) or not hasattr(view, "fit"):
        raise SettingError(
            f"view={view!r} is no view: that is an object such as hf_distill.views.OnPolicy(lmbda=0.5). Augmentations "
            "go into the collator: data_collator=hf_distill.views.AugmentingCollator(...)."
        )


def _looks_up(teacher: Any) -> bool:
    """Whether its answers, or those of a member, come with the data, which the student has not continued yet."""
    members = getattr(teacher, "teachers", None)  # an Ensemble has a collator for those of its members that have one
    return hasattr(teacher, "collator") if members is None else any(map(_looks_up, members))
