"""Collators around the user's own: one turns masks of answers into labels, one adds the teacher's inputs.

`assistant_masks` (chat templates) and `completion_mask` (TRL) hold a 1 for each token of an answer, else a 0.
"""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, Self, TypeAlias

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_distill._types import Batch, Collator, Example, ProcessingClass
from hf_distill.data.audio import AudioFeatures
from hf_distill.errors import DataError
from hf_distill.tasks.base import IGNORED, TEACHER_PREFIX
from hf_distill.teachers.base import RAW_INPUTS

ANSWER_MASKS = ("assistant_masks", "completion_mask")
Columns: TypeAlias = dict[str, list[Any]]


class WrappingCollator:
    """A base class of collators around the user's own, whose other attributes (such as `tokenizer`) they have too.

    Args:
        collator: the user's.
    """

    def __init__(self, collator: Collator) -> None:
        self.collator = collator

    def __getattr__(self, name: str) -> Any:
        if name == "collator":  # not set yet while unpickling
            raise AttributeError(name)
        return getattr(self.collator, name)

    def for_evaluation(self) -> Self:
        """Return the collator for evaluation: without augmentation, if the user's collator has such a version."""
        other = copy.copy(self)
        other.collator = without_augmentation(self.collator)
        return other


def without_augmentation(collator: Collator) -> Collator:
    """Return a collator's `for_evaluation()`, or the collator itself if it has none."""
    clean = getattr(collator, "for_evaluation", None)
    return collator if clean is None else clean()


class AnswerMaskCollator(WrappingCollator):
    """Wraps the user's collator and sets labels to -100 wherever a mask of the examples is 0.

    If the collator makes no labels, `input_ids` become the labels. Examples without masks are not changed.

    Args:
        collator: makes batches.
        reads_masks: whether the collator may read the masks itself. If it does and makes labels, they are kept.
    """

    def __init__(self, collator: Collator, *, reads_masks: bool) -> None:
        super().__init__(collator)
        self._reads_masks = reads_masks

    def __call__(self, features: Sequence[Example]) -> Batch:
        first = features[0] if isinstance(features[0], Mapping) else {}
        names = [name for name in ANSWER_MASKS if name in first]
        if not names or "input_ids" not in first:
            return self.collator(features)
        given = [dict(feature) for feature in features]
        if not self._reads_masks:
            given = [{k: v for k, v in feature.items() if k not in ANSWER_MASKS} for feature in given]
        batch = self.collator(given)
        has_labels = batch.get("labels") is not None or batch.get("shift_labels") is not None
        if not (self._reads_masks and has_labels):
            examples = [_mask_of(feature, names) for feature in features]
            _set_labels(batch, _aligned(batch["input_ids"], batch.get("attention_mask"), examples))
        for name in names:
            batch.pop(name, None)  # the model's forward does not take it
        return batch


def _mask_of(feature: Example, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return the ids `[t]` of an example, and whether every mask of it marks each token as an answer `[t]`."""
    ids = torch.as_tensor(feature["input_ids"])
    keep = torch.ones(ids.shape, dtype=torch.bool)
    for name in names:
        mask = feature.get(name)
        if mask is None or len(mask) != len(ids):
            found = "none" if mask is None else f"{len(mask)} entries"
            raise DataError(
                f"an example has {len(ids)} input_ids, and its {name} has {found}. Give each token of each example a 0 "
                "or a 1."
            )
        keep &= torch.as_tensor(mask).bool()
    return ids, keep


def _aligned(input_ids: Tensor, attention_mask: Tensor | None, examples: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the masks of the examples, `[b t]` bool, at the positions of their tokens in the batch.

    Raises:
        DataError: if the batch does not hold the examples' tokens, one example a row or all in one row.
    """
    if len(input_ids) == 1 and len(examples) > 1:  # packed without padding
        ids, keep = (torch.cat(parts) for parts in zip(*examples, strict=True))
        examples = [(ids, keep)]
    if len(input_ids) == len(examples):
        rows = []
        for row, (ids, keep) in enumerate(examples):
            attended = attention_mask[row] if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2 else None
            rows.append(_placed(input_ids[row], attended, ids, keep))
        if all(row is not None for row in rows):
            return torch.stack([row for row in rows if row is not None])
    raise DataError(
        f"{' or '.join(ANSWER_MASKS)} says which tokens are of answers, and the collator's batch "
        f"{list(input_ids.shape)} does not hold the tokens of its {len(examples)} examples as they are, padded on one "
        "side. Make labels of the masks in the dataset (-100 where a mask is 0), and pad them too."
    )


def _placed(row: Tensor, attended: Tensor | None, ids: Tensor, keep: Tensor) -> Tensor | None:
    """Return an example's mask at its place in a padded or truncated row `[t]`; None if its tokens are not there."""
    length, width = len(ids), len(row)
    made = torch.zeros(width, dtype=torch.bool)
    if length >= width:
        for part in (slice(0, width), slice(length - width, length)):
            if torch.equal(ids[part], row):
                return keep[part]
        return None
    for start in (0, width - length):
        beside = torch.ones(width, dtype=torch.bool)
        beside[start : start + length] = False
        if torch.equal(row[start : start + length], ids) and (attended is None or not attended[beside].any()):
            made[start : start + length] = keep
            return made
    return None


def _set_labels(batch: MutableMapping[str, Any], answers: Tensor) -> None:
    shifted = batch.get("shift_labels")
    if shifted is not None:  # the label of a token is at the position before it
        following = torch.cat((answers[:, 1:], torch.zeros_like(answers[:, :1])), 1)
        batch["shift_labels"] = shifted.masked_fill(~following, IGNORED)
    labels = batch.get("labels")
    if labels is not None or shifted is None:
        batch["labels"] = (batch["input_ids"] if labels is None else labels).masked_fill(~answers, IGNORED)


def with_answers_marked(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], prompts: Sequence[str]
) -> dict[str, Tensor]:
    """Return the teacher's inputs and labels `[b t]`: -100 except for the tokens of a text that follow its prompt.

    A token that the tokenizer adds after the text (such as the end of sequence) belongs to the answer; one that it adds
    before the text does not.

    Args:
        tokenizer: a fast one, because it must return the offsets of its tokens.
        prompts: the beginning of each text, which is not an answer.

    Raises:
        DataError: if a text does not begin with its prompt, or the tokenizer returns no offsets.
    """
    for text, prompt in zip(texts, prompts, strict=True):
        if not text.startswith(prompt):
            raise DataError(
                f"teacher_text begins with {text[:40]!r}, its teacher_prompt is {prompt[:40]!r}. Give in teacher_text "
                "the prompt and the answer, in teacher_prompt the prompt alone."
            )
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"teacher_prompt needs a fast tokenizer, and {type(tokenizer).__name__} is none. Give the dataset "
            "teacher_input_ids and teacher_labels."
        )
    made = dict(tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt", return_offsets_mapping=True))
    ends = made.pop("offset_mapping")[..., 1]  # 0 for tokens that the tokenizer adds
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    answers = ((ends > lengths[:, None]).cumsum(-1) > 0) & made["attention_mask"].bool()
    return {**made, "labels": made["input_ids"].masked_fill(~answers, IGNORED)}


def padded_as(mask: Tensor, labels: Sequence[Sequence[int]]) -> Tensor:
    """Return labels `[b t]` padded with -100 in the same places as the inputs of each example.

    Raises:
        DataError: if an example has more or fewer labels than tokens.

    >>> padded_as(torch.tensor([[1, 1], [0, 1]]), [[-100, 7], [8]]).tolist()
    [[-100, 7], [-100, 8]]
    """
    lengths, expected = [len(one) for one in labels], mask.sum(-1).tolist()
    if lengths != expected:
        raise DataError(f"teacher_labels have lengths {lengths}, teacher_input_ids {expected}. Give a label a token.")
    padded = torch.full(mask.shape, IGNORED)
    padded[mask.bool()] = torch.tensor([label for one in labels for label in one], dtype=torch.long)
    return padded


RAW = tuple(f"{TEACHER_PREFIX}{name}" for name in RAW_INPUTS)


class TeacherInputsCollator(WrappingCollator):
    """Wraps the user's collator, which collates the student's columns, and collates the teacher's columns itself.

    `teacher_text` (with `teacher_text_pair`, or with `teacher_prompt`, the beginning that is not an answer),
    `teacher_audio` (whatever `hf_distill.data.audio.read_recording` reads) and `teacher_image` go through the teacher's
    processing class; ready `teacher_input_ids`, `teacher_labels` and the like are padded by it. The student never sees
    either.

    Args:
        collator: collates all other columns.
        processor: the teacher's tokenizer, feature extractor, image processor or processor.
    """

    def __init__(self, collator: Collator, processor: ProcessingClass | None = None) -> None:
        super().__init__(collator)
        self.processor = processor
        self._tokenizer: Any = getattr(processor, "tokenizer", processor)
        extractor = getattr(processor, "feature_extractor", processor)
        reads_audio = getattr(extractor, "sampling_rate", None) is not None
        self._audio = AudioFeatures(extractor, "teacher_audio") if reads_audio else None

    def __call__(self, features: Sequence[Example]) -> Batch:
        own, theirs = [], []
        for feature in features:
            own.append({k: v for k, v in feature.items() if not k.startswith(TEACHER_PREFIX)})
            theirs.append({k: v for k, v in feature.items() if k.startswith(TEACHER_PREFIX)})
        batch = self.collator(own)
        if theirs and theirs[0]:
            made = self.teacher_batch(theirs)
            for name in [name for name in batch if name.startswith(TEACHER_PREFIX)]:
                del batch[name]  # written by an augmentation; the dataset's own columns take precedence
            batch.update({f"{TEACHER_PREFIX}{name}": value for name, value in made.items()})
        return batch

    def teacher_batch(self, features: Sequence[Example]) -> Batch:
        """Return the teacher's inputs from the `teacher_*` columns, without the prefix.

        Raises:
            DataError: if examples differ in their columns, a value is missing, or a value cannot be read or padded.
        """
        _check_same_columns(features)
        columns = {name: [feature[name] for feature in features] for name in features[0]}
        raw = {name: columns.pop(name) for name in RAW if name in columns}
        made = self._processed(raw) if raw else {}
        ready = {name.removeprefix(TEACHER_PREFIX): values for name, values in columns.items()}
        return {**made, **self._padded(ready)} if ready else made

    def _processed(self, raw: Columns) -> Batch:
        if self.processor is None:
            raise DataError(
                f"the dataset has {', '.join(raw)}, which only the teacher's processor can read. Pass "
                "teacher_processing_class=."
            )
        if "teacher_text" in raw:
            if "teacher_prompt" in raw:
                return with_answers_marked(self._tokenizer, raw["teacher_text"], raw["teacher_prompt"])
            pairs = raw.get("teacher_text_pair")
            made = self._tokenizer(raw["teacher_text"], pairs, padding=True, truncation=True, return_tensors="pt")
            _check_not_empty(made, raw["teacher_text"])
        elif "teacher_audio" in raw:
            audio = self._audio or AudioFeatures(self.processor, "teacher_audio")  # the latter raises: no audio is read
            made = audio(raw["teacher_audio"])
        else:
            images: Any = getattr(self.processor, "image_processor", self.processor)
            made = images(_images(raw["teacher_image"]), return_tensors="pt")
        return dict(made)

    def _padded(self, ready: Columns) -> Batch:
        if isinstance(self._tokenizer, PreTrainedTokenizerBase):
            labels = ready.pop("labels", None)
            made = dict(self._tokenizer.pad(ready, padding=True, return_tensors="pt"))
            return made if labels is None else {**made, "labels": padded_as(made["attention_mask"], labels)}
        try:
            return {name: torch.as_tensor(np.asarray(values)) for name, values in ready.items()}
        except ValueError as error:
            names = ", ".join(f"{TEACHER_PREFIX}{name}" for name in ready)
            raise DataError(
                f"{names}: rows of different lengths, and nothing to pad them with. Pass teacher_processing_class=."
            ) from error


def _check_same_columns(features: Sequence[Example]) -> None:
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


def _check_not_empty(made: Batch, texts: Sequence[str]) -> None:
    """Raise if the tokenizer makes no token of a text, so that the teacher would have no input."""
    mask = made.get("attention_mask")
    if mask is None:
        return
    lengths = mask.sum(-1).tolist() if mask.numel() else [0] * len(texts)
    if 0 in lengths:
        example = lengths.index(0)
        raise DataError(
            f"teacher_text: the teacher's tokenizer makes no token of example {example} of the batch "
            f"({texts[example]!r}). Leave empty texts out of the dataset."
        )


def _images(cells: Sequence[object]) -> list[object]:
    """Return images in a form that a processor takes; undecoded ones (`datasets.Image(decode=False)`) are opened."""
    found = list(cells)
    for number, cell in enumerate(cells):
        if isinstance(cell, Mapping) and (cell.get("bytes") or cell.get("path")):
            from PIL import Image  # every image processor needs it anyway

            try:
                found[number] = Image.open(io.BytesIO(cell["bytes"]) if cell.get("bytes") else cell["path"])
            except OSError as error:
                raise DataError(f"teacher_image: example {number} of the batch cannot be opened: {error}") from error
    return found


_NUMBERED = re.compile(rf"{TEACHER_PREFIX}(\d+)_(.+)")


def teacher_inputs_collator(
    collator: Collator, processor: ProcessingClass | Sequence[ProcessingClass | None] | None
) -> TeacherInputsCollator | SeveralInputsCollator:
    """Return the collator for one processor that all teachers share, or for a list with one for each teacher."""
    if isinstance(processor, Sequence):
        return SeveralInputsCollator(collator, processor)
    return TeacherInputsCollator(collator, processor)


class SeveralInputsCollator(WrappingCollator):
    """Wraps the user's collator, which collates the student's columns; collates each teacher's itself.

    `teacher_text` (audio, image) is read by every processor; `teacher_0_text` replaces it for the first one. If the
    list has None for a teacher, that teacher reads the student's inputs, or its own numbered columns if they are there.

    Args:
        collator: collates all other columns.
        processors: of each teacher, in the order of the ensemble.
    """

    def __init__(self, collator: Collator, processors: Sequence[ProcessingClass | None]) -> None:
        super().__init__(collator)
        self.processors = list(processors)
        self._each = [TeacherInputsCollator(collator, processor) for processor in self.processors]

    def __call__(self, features: Sequence[Example]) -> Batch:
        batch = self.collator([{k: v for k, v in one.items() if not k.startswith(TEACHER_PREFIX)} for one in features])
        for number, inputs in enumerate(self._each):
            theirs = [_of_teacher(one, number, shares=inputs.processor is not None) for one in features]
            if theirs and theirs[0]:
                made = inputs.teacher_batch(theirs)
                batch.update({f"{TEACHER_PREFIX}{number}_{name}": value for name, value in made.items()})
        return batch


def _of_teacher(feature: Example, number: int, *, shares: bool) -> Batch:
    """Return the columns of one teacher, named as if it were the only one."""
    own, shared = {}, {}
    for name, value in feature.items():
        found = _NUMBERED.fullmatch(name)
        if found is not None and int(found[1]) == number:
            own[f"{TEACHER_PREFIX}{found[2]}"] = value
        elif found is None and name.startswith(TEACHER_PREFIX):
            shared[name] = value
    return own or (shared if shares else {})
