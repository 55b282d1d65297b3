"""A collator that makes the teacher's own inputs: `teacher_*` columns, padded or made from raw text, audio, image."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from hf_distill.audio import AudioFeatures
from hf_distill.errors import DataError
from hf_distill.tasks.base import TEACHER_PREFIX
from hf_distill.trainer_parts.answers import padded_as, with_answers_marked

RAW = ("teacher_text", "teacher_text_pair", "teacher_prompt", "teacher_audio", "teacher_image")


class TeacherInputsCollator:
    """The user's collator for the student's columns; the teacher's are made beside it.

    `teacher_text` (and `teacher_text_pair`; or `teacher_prompt`, what it begins with and is no answer),
    `teacher_audio` (whatever `hf_distill.audio.read_recording` reads) and `teacher_image` go through the teacher's
    processing class; ready `teacher_input_ids`, `teacher_labels` and the like are padded by it. The student never sees
    either.

    Args:
        collator: for everything else. processor: the teacher's tokenizer, feature extractor, image processor or
        processor.
    """

    def __init__(self, collator: Callable[..., Any], processor: Any = None) -> None:
        self.collator = collator
        self.processor = processor
        extractor = getattr(processor, "feature_extractor", processor)
        reads_audio = getattr(extractor, "sampling_rate", None) is not None
        self._audio = AudioFeatures(extractor, "teacher_audio") if reads_audio else None

    def __getattr__(self, name: str) -> Any:
        """Whatever is asked of the user's collator (`tokenizer`, say) is asked of it still."""
        if name in ("collator", "processor"):  # not there yet: being unpickled
            raise AttributeError(name)
        return getattr(self.collator, name)

    def for_evaluation(self) -> TeacherInputsCollator:
        """Around the collator that the user's own names for evaluation, where it augments."""
        clean = getattr(self.collator, "for_evaluation", None)
        if clean is None:
            return self
        other = copy.copy(self)
        other.collator = clean()
        return other

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> Any:
        own, theirs = [], []
        for feature in features:
            own.append({k: v for k, v in feature.items() if not k.startswith(TEACHER_PREFIX)})
            theirs.append({k: v for k, v in feature.items() if k.startswith(TEACHER_PREFIX)})
        batch = self.collator(own)
        if theirs and theirs[0]:
            made = self.teacher_batch(theirs)
            for name in [name for name in batch if name.startswith(TEACHER_PREFIX)]:
                del batch[name]  # the clean example of an augmentation: the dataset's own columns win
            batch.update({f"{TEACHER_PREFIX}{name}": value for name, value in made.items()})
        return batch

    def teacher_batch(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """Inputs from `teacher_*` columns, without the prefix.

        Raises:
            DataError: some examples have other columns, or nothing in one; or what cannot be read or padded.
        """
        _refuse_unlike(features)
        columns = {name: [feature[name] for feature in features] for name in features[0]}
        raw = {name: columns.pop(name) for name in RAW if name in columns}
        made = self._processed(raw) if raw else {}
        ready = {name.removeprefix(TEACHER_PREFIX): values for name, values in columns.items()}
        return {**made, **self._padded(ready)} if ready else made

    def _processed(self, raw: dict[str, list[Any]]) -> dict[str, Any]:
        if self.processor is None:
            raise DataError(
                f"the dataset has {', '.join(raw)}, which only the teacher's processor can read. Pass "
                "teacher_processing_class=."
            )
        if "teacher_text" in raw:
            tokenizer = getattr(self.processor, "tokenizer", self.processor)
            pairs = raw.get("teacher_text_pair")
            if "teacher_prompt" in raw:
                return with_answers_marked(tokenizer, raw["teacher_text"], raw["teacher_prompt"])
            made = tokenizer(raw["teacher_text"], pairs, padding=True, truncation=True, return_tensors="pt")
        elif "teacher_audio" in raw:
            audio = self._audio or AudioFeatures(self.processor, "teacher_audio")  # the latter raises: no audio is read
            made = audio(raw["teacher_audio"])
        else:
            images = getattr(self.processor, "image_processor", self.processor)
            made = images(raw["teacher_image"], return_tensors="pt")
        return dict(made)

    def _padded(self, ready: dict[str, list[Any]]) -> dict[str, Any]:
        if isinstance(getattr(self.processor, "tokenizer", self.processor), PreTrainedTokenizerBase):
            tokenizer = getattr(self.processor, "tokenizer", self.processor)
            labels = ready.pop("labels", None)
            made = dict(tokenizer.pad(ready, padding=True, return_tensors="pt"))
            return made if labels is None else {**made, "labels": padded_as(made["attention_mask"], labels)}
        try:
            return {name: torch.as_tensor(np.asarray(values)) for name, values in ready.items()}
        except ValueError as error:
            names = ", ".join(f"{TEACHER_PREFIX}{name}" for name in ready)
            raise DataError(
                f"{names}: rows of different lengths, and nothing to pad them with. Pass teacher_processing_class=."
            ) from error


def _refuse_unlike(features: list[dict[str, Any]]) -> None:
    names = set(features[0])
    for feature in features:
        if set(feature) != names:
            raise DataError(
                f"one example of a batch has the columns {sorted(names)} for the teacher, another {sorted(feature)}. "
                "Give all the same."
            )
        empty = [name for name, value in feature.items() if value is None]
        if empty:
            raise DataError(f"{', '.join(empty)}: None in an example. Give each a value, or leave the example out.")
