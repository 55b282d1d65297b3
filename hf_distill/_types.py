"""Types that many signatures share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import datasets
import torch.utils.data
from transformers import FeatureExtractionMixin, ImageProcessingMixin, PreTrainedTokenizerBase, ProcessorMixin

Batch: TypeAlias = Mapping[str, Any]
"""What a collator returns and a model is called with: tensors by name, and sometimes lists or numbers."""

Example: TypeAlias = Mapping[str, Any]
"""One row of a dataset."""

Keywords: TypeAlias = dict[str, Any]
"""Keyword arguments that are passed on."""

State: TypeAlias = dict[str, Any]
"""What a checkpoint stores of an object."""

Collator: TypeAlias = Callable[[Any], Any]
"""Makes a batch of a list of examples."""

Data: TypeAlias = datasets.Dataset | datasets.IterableDataset | torch.utils.data.Dataset[Any] | list[Example]
"""Whatever a Trainer reads examples from."""

ProcessingClass: TypeAlias = PreTrainedTokenizerBase | FeatureExtractionMixin | ImageProcessingMixin | ProcessorMixin
"""A tokenizer, feature extractor, image processor or processor, as `Trainer(processing_class=)` takes it."""


@dataclass(frozen=True, eq=False)
class OneOf:
    """Annotates a setting that is a name in a catalogue, to which users may add: `Annotated[str, OneOf(CATALOGUE)]`.

    Attributes:
        choices: the catalogue.
    """

    choices: Collection[str]

    def __repr__(self) -> str:
        return f"OneOf({', '.join(map(repr, self.choices))})"
