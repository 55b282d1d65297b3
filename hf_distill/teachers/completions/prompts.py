"""What a teacher is asked to continue or to answer, of a dataset: texts, messages, token ids, or sound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_distill.errors import DataError, SettingError
from hf_distill.tasks.base import IGNORED
from hf_distill.tasks.generating import Tokens, prompt_of
from hf_distill.tasks.infer import unwrapped
from hf_distill.teachers.fitting import tokenizer_in

FEATURES = "input_features"


class Prompts:
    """The prompts of a dataset, by index.

    Args:
        column: of texts, or of lists of messages, where the dataset has it; else its `input_ids`, up to the first label
            that counts, or its `input_features` are read.

    Raises:
        SettingError: texts without a tokenizer.
        DataError: no such column, or no prompt at all.
    """

    def __init__(self, dataset: Any, model: Any, processor: Any, column: str) -> None:
        if len(dataset) == 0:
            raise DataError("the dataset holds no prompt.")
        names = getattr(dataset, "column_names", None) or list(dataset[0])
        self._dataset = dataset
        self.tokenizer = tokenizer_in(processor)
        self.answers = bool(unwrapped(model).config.is_encoder_decoder)
        speech = unwrapped(model).main_input_name == FEATURES
        wanted = (FEATURES,) if speech else (column, "input_ids")
        found = next((name for name in wanted if name in names), None)
        if found is None:
            raise DataError(
                f"the dataset has no column {' or '.join(wanted)}, only {sorted(names)}. Name the one with the "
                "prompts: prompt_column=."
            )
        if self.tokenizer is None and (speech or found != "input_ids"):
            raise SettingError(f"{found} needs the teacher's tokenizer. Pass processing_class=.")
        self.column = found
        self._start = getattr(unwrapped(model).config, "decoder_start_token_id", None)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Any:
        """Token ids, or the features of a sound `[mel t]`."""
        example = self._dataset[index]
        value = example[self.column]
        if self.column == FEATURES:
            return torch.as_tensor(value, dtype=torch.float32)
        if isinstance(value, str):
            return self._without_end(self.tokenizer(value)["input_ids"])
        if self.column != "input_ids":
            return self._of_messages(value)
        if self.answers:
            return [int(token) for token in value]
        return prompt_of(value, example.get("attention_mask"), example.get("labels"))

    def batch(self, prompts: Sequence[Any], *, padding: int, device: torch.device) -> dict[str, Tensor]:
        """What an encoder-decoder is called with: padded on the right.

        Raises:
            DataError: sounds of unequal length.
        """
        if self.column == FEATURES:
            if len({tuple(one.shape) for one in prompts}) > 1:
                raise DataError(f"{FEATURES} of unequal length. Let the feature extractor pad them all alike.")
            return {FEATURES: torch.stack(list(prompts)).to(device)}
        width = max(map(len, prompts))
        ids = torch.tensor([[*one, *[padding] * (width - len(one))] for one in prompts], device=device)
        mask = torch.tensor([[1] * len(one) + [0] * (width - len(one)) for one in prompts], device=device)
        return {"input_ids": ids, "attention_mask": mask}

    def row(self, prompt: Any, written: Tokens, ends: set[int]) -> dict[str, Any]:
        """The columns of a completion: ready to train on, and as text where there is a tokenizer."""
        finished = bool(written) and written[-1] in ends
        text = None if self.tokenizer is None else self.tokenizer.decode(written, skip_special_tokens=True)
        if self.column == FEATURES:  # `generate` gave the text alone: its labels are as those of any transcript
            return {"labels": self._as_labels(text or ""), "completion": text}
        texts = {} if text is None else {"prompt": self.tokenizer.decode(prompt), "completion": text}
        if self.answers:
            return {"input_ids": prompt, "labels": written, **texts, "finished": finished}
        labels = [IGNORED] * len(prompt) + written
        return {"input_ids": prompt + written, "labels": labels, **texts, "finished": finished}

    def _as_labels(self, text: str) -> Tokens:
        ids = self.tokenizer(text)["input_ids"]
        return ids[1:] if ids and ids[0] == self._start else ids  # the model puts it before labels by itself

    def _without_end(self, ids: Tokens) -> Tokens:
        """An end token that the tokenizer adds would end a prompt; behind an encoder's input it belongs."""
        end = self.tokenizer.eos_token_id
        return ids[:-1] if not self.answers and len(ids) > 1 and ids[-1] == end else ids

    def _of_messages(self, messages: Any) -> Tokens:
        if not isinstance(messages, Sequence) or not all(isinstance(one, Mapping) for one in messages):
            raise DataError(
                f"{self.column} holds a {type(messages).__name__}. A prompt is a text, or a list of messages with role "
                "and content."
            )
        made = self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)
        return list(made["input_ids"])
