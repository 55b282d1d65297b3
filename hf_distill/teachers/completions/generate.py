"""Texts that a teacher writes to prompts: all prompts are looked at before anything is written, then shard by shard."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import AutoConfig, GenerationConfig

from hf_distill._compat import processes
from hf_distill.errors import DataError, SettingError
from hf_distill.models.generation import (
    drawn_from,
    end_tokens,
    evaluating,
    generate_causal,
    generate_seq2seq,
    generation_settings,
    sound_padding_is_read,
    try_settings,
)
from hf_distill.teachers.cache import keys as fingerprints
from hf_distill.teachers.completions.prompts import DEFAULT, Prompts
from hf_distill.teachers.load import find_tokenizer, load_teacher
from hf_distill.teachers.model import ModelTeacher, tokenizer_of
from hf_distill.teachers.passes import INFO, STATE, ResumablePass, ShardFolder, read_json

MANIFEST, PLAN = "completions.json", "completions-unfinished.json"
_CARD = """---
tags:
- hf-distill
- knowledge-distillation
configs:
- config_name: default
  data_files: "shard-*.arrow"
---

# What a teacher wrote

{rows:,} completions of {examples:,} prompts by a {model} ({name}), written by hf-distill for sequence-level
distillation. `index` is the prompt's place in the dataset that was asked about, `finished` says whether the text came
to its end, and `labels` are -100 on the prompt.

Generation: {settings}.
"""
_TYPES = {
    "index": pa.int64(),
    "input_ids": pa.list_(pa.int64()),
    "labels": pa.list_(pa.int64()),
    "prompt": pa.string(),
    "completion": pa.string(),
    "finished": pa.bool_(),
}
_SHOWN = 4  # of the rows that cannot be asked; the others are counted


def digests_of(prompts: Prompts, shards: Iterable[range], *, batch_size: int, processes: int = 1) -> list[str]:
    """Of what each of these shards asks. Each process reads its own, and all of them refuse alike.

    Raises:
        SettingError: the prompts cannot be read with this tokenizer.
        DataError: rows that cannot be asked, by column and index.
    """
    digests, wrong = [], []
    usual = None
    for indices in shards:
        asked: list[Any] = []
        for index in indices:
            try:
                asked.append(prompts[index])
            except DataError as error:
                wrong.append((index, str(error)))
                continue
            if batch_size > 1 and isinstance(asked[-1], torch.Tensor):
                usual = asked[-1] if usual is None else usual
                reason = prompts.other_shape(asked[-1], usual) if asked[-1].shape != usual.shape else None
                if reason is not None:
                    wrong.append((index, f"{prompts.column}[{index}]: {reason}"))
        digests.append(digest_of(asked))
    _refuse(sorted(wrong if processes == 1 else gather_object(wrong)), len(prompts))
    return digests


def _refuse(wrong: list[tuple[int, str]], count: int) -> None:
    if not wrong:
        return
    more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
    raise DataError(
        f"{len(wrong)} of {count} prompts cannot be asked. {'; '.join(told for _, told in wrong[:_SHOWN])}{more}. Mend "
        "such rows, or leave them out (dataset.filter)."
    )


logger = logging.getLogger(__name__)


def generate_completions(
    teacher: Any,
    dataset: Any,
    path: str | os.PathLike[str],
    *,
    processing_class: Any = None,
    max_new_tokens: int = 256,
    do_sample: bool = False,
    sampling_temperature: float = 1.0,
    num_return_sequences: int = 1,
    generation: Mapping[str, Any] | None = None,
    prompt_column: str = DEFAULT,
    batch_size: int = 8,
    shard_examples: int = 128,
    seed: int = 0,
) -> datasets.Dataset:
    """A dataset of what the teacher writes to each prompt, in the folder `path`; made again, it is opened.

    Columns: `index` (of the prompt in `dataset`), `input_ids` and `labels` (-100 on the prompt), ready to train on,
    `prompt` and `completion` as texts, and `finished`: whether the teacher wrote the end of the text. An
    encoder-decoder's labels are its answer. Of speech there are no `input_ids`: take sounds from `dataset` by `index`.
    All labels are the ids that the teacher wrote: Whisper's begin with its tokens for language, task and timestamps,
    and none has an end that was not written. Killed at any moment, the same call goes on with the shard it was at, to
    the same bytes. Several processes share the shards.

    Kim and Rush 2016 (Sequence-Level Knowledge Distillation), section 3.2, with `generation={"num_beams": 5}`; their
    interpolation with gold texts is not here. Pseudo-labels: Gandhi et al. 2023 (Distil-Whisper), without its filter.

    Args:
        teacher: a model that can generate, a folder or a Hub id.
        dataset: with `prompt_column` (texts, or messages for the chat template), or `input_ids` (up to the first label
            that counts), or the features of sounds (`input_features` or `input_values`). Gold answers are cut off: of
            messages, those of the assistant at the end. All are checked before anything is written.
        path: the folder to fill.
        processing_class: the teacher's tokenizer or processor; None: the one beside its weights.
        max_new_tokens: the longest completion.
        do_sample: draw the tokens; else the likeliest one is written at each step.
        sampling_temperature: with do_sample, of all tokens, whatever the teacher's `generation_config` says.
        num_return_sequences: for each prompt, one after the other.
        generation: further settings by transformers' names (`num_beams`, `top_p`, `forced_bos_token_id`), the last word
            where both are given. Whisper also takes `language`, `task`, `return_timestamps` and `prompt_ids`, which
            guides the teacher and is not in the labels. All other settings come from the teacher's `generation_config`,
            except `forced_eos_token_id`, which would end texts that were cut off.
        prompt_column: the column of texts or messages.
        batch_size: prompts at once; rounding, and what is drawn, depend on it.
        shard_examples: prompts a file. An interrupted pass loses at most one file; within it prompts of like length
            are asked together.
        seed: another seed draws other completions.

    Raises:
        SettingError: a setting that `generate` does not know or refuses, or a model that writes no text.
        DataError: prompts that cannot be asked, by index, or a folder that holds something else.
        TeacherError: no teacher can be loaded.

    >>> import tempfile
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> shape = dict(hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1)
    >>> teacher = LlamaForCausalLM(LlamaConfig(vocab_size=9, eos_token_id=None, pad_token_id=0, **shape))
    >>> prompts = datasets.Dataset.from_dict({"input_ids": [[1, 5], [1, 6, 7]]})
    >>> generate_completions(teacher, prompts, tempfile.mkdtemp(), max_new_tokens=2)["labels"][0][:2]
    [-100, -100]
    """
    sampling = max_new_tokens, do_sample, sampling_temperature, num_return_sequences
    settings = _Settings(*sampling, dict(generation or {}), prompt_column, batch_size, shard_examples, seed)
    _prepared(teacher, processing_class, dataset, Path(path), settings).run()
    return datasets.load_from_disk(str(path))


@dataclass(frozen=True)
class _Settings:
    """See `generate_completions`."""

    max_new_tokens: int
    do_sample: bool
    sampling_temperature: float
    num_return_sequences: int
    generation: dict[str, Any]
    prompt_column: str
    batch_size: int
    shard_examples: int
    seed: int

    def check(self) -> None:
        for name in ("batch_size", "shard_examples"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise SettingError(f"{name}={value!r}: a whole number, at least 1.")


def _prepared(teacher: Any, processor: Any, dataset: Any, path: Path, given: _Settings) -> CompletionsPass:
    """Everything is checked; nothing is written."""
    given.check()
    model, processor = _loaded(teacher, processor)
    settings = generation_settings(
        model,
        max_new_tokens=given.max_new_tokens,
        do_sample=given.do_sample,
        sampling_temperature=given.sampling_temperature,
        others={"num_return_sequences": given.num_return_sequences, **given.generation},
    )
    prompts = Prompts(dataset, model, processor, given.prompt_column, max_new_tokens=settings.max_new_tokens)
    plan = {
        "format": "hf-distill completions",
        "version": 2 if prompts.listens else 1,  # in 1, labels of sounds were made from the text
        "teacher": fingerprints.of_teacher(model),
        "processor": fingerprints.of_processor(processor),
        "generation": {k: value for k, value in settings.to_diff_dict().items() if k != "transformers_version"},
        "column": prompts.column,
        "seed": given.seed if settings.do_sample else None,
        "batch_size": given.batch_size,
        "shard_examples": given.shard_examples,
        "shard_count": -(-len(prompts) // given.shard_examples),
        "examples": len(prompts),
    }
    return CompletionsPass(model, prompts, settings, plan, path, given.seed)


class CompletionsPass(ResumablePass):
    """The teacher writes to every prompt, shard by shard.

    Args:
        model: the teacher.
        prompts: what it is given.
        settings: of the generation.
        planned: everything that the texts follow from.
        path: of the folder to fill.
        seed: of what is drawn.
    """

    def __init__(
        self,
        model: Any,
        prompts: Prompts,
        settings: GenerationConfig,
        planned: dict[str, Any],
        path: Path,
        seed: int,
    ) -> None:
        folder = ShardFolder(
            path, finished="completions", unfinished="unfinished completions", manifest=MANIFEST, plan=PLAN
        )
        super().__init__(folder, processes())
        self.model = model
        self.prompts = prompts
        self.settings = settings
        self.seed = seed
        self._planned = planned
        self._reads_padding: bool | None = None  # None: not tried yet

    # What is planned.

    def check_finished(self, manifest: dict[str, Any]) -> None:
        """Check that the finished folder holds these completions, whole.

        Raises:
            DataError: if it holds others, or a file is damaged.
        """
        self.folder.check_same(manifest, self._planned, finished=True)
        for name in (INFO, STATE):
            read_json(self.folder.path / name)
        for receipt in manifest["shards"]:
            self.folder.check_whole(receipt)
        self._digests = self._digests_of_mine()
        for shard, digest in self._digests.items():
            self._check_prompts(shard, manifest["shards"][shard], digest)

    def begun_plan(self, plan: dict[str, Any]) -> dict[str, Any]:
        self.folder.check_same(plan, self._planned, finished=False)
        return self.new_plan()

    def new_plan(self) -> dict[str, Any]:
        """Look at all prompts, and try the settings on the first one where that may fail late."""
        self._digests = self._digests_of_mine()
        if self.prompts.window is not None:
            try_settings(self.model, self._inputs([self.prompts[0]]), self.settings)
        return self._planned

    def _digests_of_mine(self) -> dict[int, str]:
        """Return the digest of the prompts of each of this process's shards.

        Raises:
            DataError: if a prompt cannot be given to the teacher.
        """
        plan, state = self._planned, self.state
        mine = range(state.process_index, plan["shard_count"], state.num_processes)
        shards = [self._indices(shard) for shard in mine]
        found = digests_of(self.prompts, shards, batch_size=plan["batch_size"], processes=state.num_processes)
        return dict(zip(mine, found, strict=True))

    def _indices(self, shard: int) -> range:
        each = self._planned["shard_examples"]
        return range(shard * each, min((shard + 1) * each, self._planned["examples"]))

    # The shards.

    def is_done(self, shard: int) -> bool:
        receipt = self.folder.receipt(shard)
        if receipt is None:
            return False
        self._check_prompts(shard, receipt, self._digests[shard])
        return True

    def _check_prompts(self, shard: int, receipt: dict[str, Any], digest: str) -> None:
        if receipt["asked"] != digest:
            raise DataError(
                f"shard {shard} of {self.folder.path} was written to other prompts than the dataset now has there. "
                "Give the dataset that it was begun with, or choose another folder."
            )

    def make(self, shards: list[int], *, done: list[int]) -> None:
        """Let the teacher write to the prompts of these shards."""
        for shard in shards:
            indices = self._indices(shard)
            prompts = [self.prompts[index] for index in indices]
            rows = self._written(shard, indices, prompts)
            columns = {name: pa.array([row[name] for row in rows], type=_TYPES[name]) for name in rows[0]}
            self.folder.write_shard(shard, columns, rows=len(rows), asked=digest_of(prompts))

    def finalize(self, receipts: list[dict[str, Any]]) -> None:
        """Write the files of a dataset, the card and the manifest."""
        content = hashlib.blake2b("".join(one["blake2b"] for one in receipts).encode(), digest_size=8).hexdigest()
        teacher, settings = self.plan["teacher"], self.plan["generation"]
        card = _CARD.format(
            rows=sum(one["rows"] for one in receipts),
            examples=self.plan["examples"],
            model=teacher["class"],
            name=teacher["name"] or "no name",
            settings=", ".join(f"{name} {value}" for name, value in sorted(settings.items())),
        )
        self.folder.finish({**self.plan, "shards": receipts}, receipts, fingerprint=content, card=card)

    def kept(self) -> str:
        kept = self.folder.written("rows") // (self.settings.num_return_sequences or 1)
        return f"The answers to {kept:,} of {self._planned['examples']:,} prompts are kept in {self.folder.path}"

    def _written(self, shard: int, indices: range, asked: list[Any]) -> list[dict[str, Any]]:
        """The rows of a shard; prompts of like length are asked together."""
        each = self.settings.num_return_sequences or 1
        rows: list[list[dict[str, Any]]] = [[] for _ in asked]
        for at, places in self._batches(asked):
            written = self._ask([asked[place] for place in places], shard, at)
            for position, place in enumerate(places):
                for tokens in written[position * each : (position + 1) * each]:
                    row = self.prompts.row(asked[place], tokens, end_tokens(self.settings))
                    rows[place].append({"index": indices[place], **row})
        return [row for of_prompt in rows for row in of_prompt]

    def _batches(self, asked: list[Any]) -> Iterator[tuple[int, list[int]]]:
        """Batches as places in `asked`, each with the number of prompts before it."""
        size, order = self._planned["batch_size"], sorted(range(len(asked)), key=lambda place: -len(asked[place]))
        at = 0
        while at < len(order):
            places = order[at : at + size]
            if self.prompts.listens and self._padding_is_read(asked, places):
                places = [place for place in places if len(asked[place]) == len(asked[places[0]])]
            yield at, places
            at += len(places)

    def _padding_is_read(self, asked: list[Any], places: list[int]) -> bool:
        """Whether these sounds would be padded and the model reads padding; tried once, with the first sound."""
        if len(asked[places[0]]) == len(asked[places[-1]]):
            return False
        if self._reads_padding is None:
            column, start = self.prompts.column, self.settings.decoder_start_token_id
            (sound,) = self._inputs([self.prompts[0]])[column]
            with evaluating(self.model):
                self._reads_padding = sound_padding_is_read(self.model, sound, column, start)
            if self._reads_padding:
                logger.info(
                    f"{type(self.model).__name__} reads the padding behind a recording, so recordings of unequal "
                    "length are given to it one after the other."
                )
        return self._reads_padding

    def _ask(self, prompts: list[Any], shard: int, at: int) -> list[list[int]]:
        device = next(self.model.parameters()).device
        with drawn_from(device, self.seed, shard, at):
            if not self.prompts.answers:
                return generate_causal(self.model, prompts, self.settings)
            return generate_seq2seq(self.model, self._inputs(prompts), self.settings)

    def _inputs(self, prompts: list[Any]) -> dict[str, Any]:
        device = next(self.model.parameters()).device
        batch = self.prompts.batch(prompts, padding=self.settings.pad_token_id, device=device)
        return {name: x.to(self.model.dtype) if x.is_floating_point() else x for name, x in batch.items()}


def digest_of(prompts: Sequence[Any]) -> str:
    """Of what was asked, in order."""
    found = hashlib.blake2b(digest_size=16)
    for one in prompts:
        data = one.numpy().tobytes() if isinstance(one, torch.Tensor) else repr(list(one)).encode()
        found.update(b"%d:" % len(data) + data)
    return found.hexdigest()


def _loaded(teacher: Any, processor: Any) -> tuple[Any, Any]:
    """The model, and its tokenizer where that is known."""
    if isinstance(teacher, ModelTeacher):
        return teacher.model, processor or tokenizer_of(teacher.model)
    if isinstance(teacher, nn.Module):
        return teacher, processor or tokenizer_of(teacher)
    if isinstance(teacher, (str, os.PathLike)):
        return load_teacher(teacher, _kind_at(teacher)), processor or find_tokenizer(teacher)
    raise SettingError(f"generate_completions asks a model, a folder or a Hub id, not a {type(teacher).__name__}.")


def _kind_at(path: str | os.PathLike[str]) -> str:
    """The kind of head; where nothing can be read, `load_teacher` says why, whatever the kind."""
    try:
        return "seq2seq" if AutoConfig.from_pretrained(path).is_encoder_decoder else "causal_lm"
    except (OSError, ValueError, KeyError):
        return "causal_lm"
