"""The prompts in a dataset: texts, messages, token ids, or sounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import datasets
import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from hf_distill._types import Data, Example, Keywords, ProcessingClass
from hf_distill.errors import DataError, SettingError
from hf_distill.models.generation import Limits, Tokens, prompt_of, source_of, window_of
from hf_distill.tasks.base import IGNORED
from hf_distill.tasks.infer import forward_names, unwrapped
from hf_distill.teachers.model import tokenizer_in

SOUNDS = ("input_features", "input_values")
DEFAULT = "prompt"  # the default column
Prompt: TypeAlias = Any  # token ids as a list, or a sound as a tensor


class Prompts:
    """The prompts of a dataset, by index.

    Args:
        dataset: a dataset with a length.
        model: the teacher.
        processing_class: its tokenizer or processor, or None.
        column: the column of texts, or of lists of messages. If the default column is missing, `input_ids` are read, up
            to the first label that counts. A speech model reads its `input_features` or `input_values`, up to the end
            of their `attention_mask` if there is one.
        max_new_tokens: how many tokens will follow each prompt.

    Attributes:
        column: the column that is read.
        has_encoder: whether the model is an encoder-decoder.
        is_speech: whether it reads sounds.
        window: the number of frames that it always reads, or None.

    Raises:
        SettingError: if texts come without a tokenizer, or this model does not read the column.
        DataError: if there is no such column, or no prompt.
    """

    def __init__(
        self,
        dataset: Data,
        model: PreTrainedModel,
        processing_class: ProcessingClass | None,
        column: str,
        *,
        max_new_tokens: int,
    ) -> None:
        if not hasattr(dataset, "__len__"):
            name = type(dataset).__name__
            raise DataError(f"a {name} has no length. Give datasets.Dataset.from_list(list(dataset)).")
        if len(dataset) == 0:
            raise DataError("the dataset has no prompts.")
        names = getattr(dataset, "column_names", None) or list(dataset[0])
        self._dataset: Any = dataset
        self.processing_class = processing_class
        self._limits = Limits.of(model, max_new_tokens)
        self.tokenizer: Any = tokenizer_in(processing_class)  # None only for sounds and token ids
        self.has_encoder = bool(unwrapped(model).config.is_encoder_decoder)
        source = source_of(model)
        self.is_speech = source in SOUNDS
        self.window = window_of(model) if self.is_speech else None
        self._masked = "attention_mask" in forward_names(model)
        if self.is_speech and column not in (DEFAULT, source):
            raise SettingError(
                f"prompt_column={column!r}: {type(unwrapped(model)).__name__} reads {source}. Leave prompt_column= out."
            )
        wanted = (source,) if self.is_speech else (column, "input_ids") if column == DEFAULT else (column,)
        found = next((name for name in wanted if name in names), None)
        if found is None:
            tried = " or ".join(wanted)
            raise DataError(f"no column {tried}, only {sorted(names)}. Name the column of the prompts: prompt_column.")
        if self.tokenizer is None and not self.is_speech and found != "input_ids":
            raise SettingError(f"{found} needs the teacher's tokenizer. Pass processing_class=.")
        self.column = found
        if self.is_speech and isinstance(dataset, datasets.Dataset) and dataset.format["type"] is None:
            self._dataset = dataset.with_format("numpy")  # ten times as fast as lists

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Prompt:
        """Return token ids, or a sound: `[mel frames]` for Whisper, else `[time ...]`.

        Raises:
            SettingError: if there are messages but no chat template.
            DataError: if the prompt cannot be used, by column and index.
        """
        example = self._dataset[index]
        try:
            prompt = self._read(example[self.column], example)
            reason = self._too_long(prompt) if self.is_speech else self._limits.obstacle(prompt)
        except _NoPromptError as error:
            reason = str(error)
        if reason is not None:
            raise DataError(f"{self.column}[{index}]: {reason}")
        return prompt

    def _read(self, value: Any, example: Example) -> Prompt:
        if value is None:
            raise _NoPromptError("None instead of a prompt")
        if self.is_speech:
            return self._as_sound(value, example.get("attention_mask"))
        if isinstance(value, str):
            return self._without_end(self.tokenizer(value)["input_ids"])
        if self.column != "input_ids":
            return self._messages_to_ids(value)
        labels = None if self.has_encoder else example.get("labels")
        try:
            return prompt_of(value, example.get("attention_mask"), labels)
        except (TypeError, ValueError) as error:
            raise _NoPromptError(f"not a list of token ids with a mask and labels of its length ({error})") from error

    def batch(self, prompts: Sequence[Prompt], *, padding: int, device: torch.device) -> dict[str, Tensor]:
        """Return the inputs of an encoder-decoder, padded on the right."""
        if self.window is not None:  # all have one shape: see `shape_difference`
            return {self.column: torch.stack(list(prompts)).to(device)}
        if self.is_speech:
            padded = {self.column: list(prompts)}
            if self._masked:
                padded["attention_mask"] = [torch.ones(len(sound), dtype=torch.long) for sound in prompts]
            return {name: pad_sequence(rows, batch_first=True).to(device) for name, rows in padded.items()}
        width = max(map(len, prompts))
        ids = torch.tensor([[*prompt, *[padding] * (width - len(prompt))] for prompt in prompts], device=device)
        mask = torch.tensor([[1] * len(prompt) + [0] * (width - len(prompt)) for prompt in prompts], device=device)
        return {"input_ids": ids, "attention_mask": mask}

    def row(self, prompt: Prompt, completion: Tokens, ends: set[int]) -> Keywords:
        """Return the columns of a completion, as ids, and as text if there is a tokenizer.

        Args:
            prompt: the prompt.
            completion: the generated tokens.
            ends: the end tokens.
        """
        finished = bool(completion) and completion[-1] in ends
        text = None if self.tokenizer is None else self.tokenizer.decode(completion, skip_special_tokens=True)
        if self.is_speech:
            return {"labels": completion, **({} if text is None else {"completion": text}), "finished": finished}
        texts = {} if text is None else {"prompt": self.tokenizer.decode(prompt), "completion": text}
        if self.has_encoder:
            return {"input_ids": prompt, "labels": completion, **texts, "finished": finished}
        labels = [IGNORED] * len(prompt) + completion
        return {"input_ids": prompt + completion, "labels": labels, **texts, "finished": finished}

    def shape_difference(self, sound: Tensor, usual: Tensor) -> str | None:
        """Return why two sounds cannot share a batch, or None if they can."""
        if sound.shape == usual.shape:
            return None
        if self.window is None and sound.shape[1:] == usual.shape[1:]:
            return None  # they are padded in time
        return (
            f"a sound of shape {list(sound.shape)}, and others are {list(usual.shape)}: let the feature extractor pad "
            "all to the same length, or pass batch_size=1"
        )

    def _as_sound(self, value: Any, mask: Sequence[int] | None) -> Tensor:
        try:
            sound = torch.as_tensor(value, dtype=torch.float32)
            real = len(sound) if mask is None or self.window is not None else int(torch.as_tensor(mask).sum())
        except (TypeError, ValueError) as error:
            raise _NoPromptError(f"not the features of a sound ({error})") from error
        axes = "[mel, time]" if self.window is not None else "[time]" if self.column == SOUNDS[1] else "[time, mel]"
        if sound.dim() != axes.count(",") + 1 or real == 0:
            raise _NoPromptError(f"features of shape {list(sound.shape)} instead of {axes}")
        return sound[:real]

    def _too_long(self, sound: Tensor) -> str | None:
        if self.window is None or sound.shape[-1] <= self.window:
            return None
        return (
            f"{sound.shape[-1]} frames, more than the {self.window} that the model reads at once: cut the recording "
            "into parts with their own labels"
        )

    def _without_end(self, ids: Tokens) -> Tokens:
        """Remove an end token that the tokenizer added, except at the end of an encoder's input."""
        end = self.tokenizer.eos_token_id
        return ids[:-1] if not self.has_encoder and len(ids) > 1 and ids[-1] == end else ids

    def _messages_to_ids(self, messages: Any) -> Tokens:
        """Return the ids of the messages without the assistant's at the end."""
        if not isinstance(messages, Sequence) or not all(isinstance(message, Mapping) for message in messages):
            kind = type(messages).__name__
            raise _NoPromptError(f"of type {kind}, not a text or a list of messages (token ids belong into input_ids)")
        if getattr(self.tokenizer, "chat_template", "unknown") is None:
            raise SettingError(
                f"{self.column} holds messages, and the tokenizer has no chat_template. Set one, or give texts."
            )
        prompt = list(messages)
        while prompt and prompt[-1].get("role") == "assistant":
            prompt.pop()
        if not prompt:
            raise _NoPromptError("only messages of the assistant" if messages else "an empty list of messages")
        try:
            encoded = self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)
        except (TemplateError, KeyError, TypeError, ValueError) as error:
            raise _NoPromptError(f"messages that the chat template rejects ({error})") from error
        return list(encoded["input_ids"])


class _NoPromptError(Exception):
    """A row that holds no usable prompt."""
