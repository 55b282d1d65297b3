"""OnPolicy: batches with continuations sampled from the student's own distribution."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_distill._types import Batch, ProcessingClass
from hf_distill.errors import DataError, SettingError, is_number
from hf_distill.models.generation import (
    drawn_from,
    end_tokens,
    generate_causal,
    generate_seq2seq,
    generation_settings,
    prompt_of,
)
from hf_distill.schedules import PROGRESS, Schedule, constant
from hf_distill.tasks import Task
from hf_distill.tasks.base import IGNORED, TEACHER_PREFIX
from hf_distill.tasks.infer import main_input_of, unwrapped
from hf_distill.vocabulary import HeadAlignment

# The used settings of the student's generation_config. Any other could change the distribution of the samples, and the
# config does not list all settings of `generate`, so all others are left out.
_FOLLOWED = (
    *("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"),
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "compile_config", "disable_compile"),
)
_LANGUAGE = "forced_bos_token_id"  # the language of an encoder-decoder's text (mBART, M2M100), as in a prompt


class _BoundTeacher(Protocol):
    """The members of a bound `Teacher` that are used here."""

    @property
    def alignment(self) -> HeadAlignment: ...

    def models(self) -> Iterable[nn.Module]: ...


def ids_not_shared(
    student: PreTrainedModel, teacher: _BoundTeacher | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> list[int]:
    """Return the known columns of the student's head that its texts must not contain.

    These have no token (padding), are not compared with the teacher's, or have no embedding in one of the models.

    Args:
        student: the student.
        teacher: a bound teacher, or None.
        tokenizer: the student's tokenizer, or None.

    >>> from types import SimpleNamespace
    >>> student = torch.nn.Module()
    >>> student.get_output_embeddings = lambda: torch.nn.Linear(2, 6)
    >>> ids_not_shared(student, tokenizer=SimpleNamespace(get_vocab=lambda: {"a": 0, "b": 1, "c": 3}))
    [2, 4, 5]
    """
    columns = range(_head_width(unwrapped(student)))
    shared = set(columns if tokenizer is None else tokenizer.get_vocab().values())
    compared = None if teacher is None else teacher.alignment.student
    if compared is not None:
        shared &= set(range(compared) if isinstance(compared, int) else compared)
    for model in (student, *([] if teacher is None else teacher.models())):
        count = _embedding_count(unwrapped(model))
        if count is not None:
            shared &= set(range(count))
    return sorted(set(columns) - shared)


def _head_width(model: PreTrainedModel) -> int:
    """Return `out_features`, since the weights of a quantised head have another shape."""
    width = getattr(model.get_output_embeddings(), "out_features", None)
    return int(model.config.get_text_config(decoder=True).vocab_size if width is None else width)


def _embedding_count(model: nn.Module) -> int | None:
    """Return the number of ids that a model embeds, or None if it is unknown."""
    find: Any = getattr(model, "get_input_embeddings", lambda: None)
    table = find()
    weight = getattr(table, "weight", None)  # under an adapter
    return getattr(table, "num_embeddings", len(weight) if isinstance(weight, Tensor) else None)


_REPLACED = ("input_ids", "attention_mask", "labels")


class OnPolicy:
    """Replaces a share of the batches by the student's continuations of their prompts.

    A prompt is the text before the first label that is not -100, or a whole text without labels. The new labels are the
    student's tokens, up to and including the end of the text, so that only they are compared with the teacher. They are
    not gold labels, so alpha must be 1 (or None): the labels' term would train on the student's own text.

    Agarwal et al. 2024 (On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes), algorithm 1,
    with its student_share. The paper's divergence is a generalized Jensen-Shannon (`divergence="jensen_shannon"`),
    forward_kl or reverse_kl. Sampling is from the student's distribution over all tokens that both models know
    (`bind`), not from transformers' default of the 50 most likely. From its `generation_config` only the special tokens
    and the cache are used (and `forced_bos_token_id`, the language, of an encoder-decoder). No gradient flows through
    the sampling.

    The random numbers depend on the seed, the step and the batch's place in it only: all processes agree on the batches
    to continue, and a resumed run equals an uninterrupted one.

    Args:
        student_share: share of the batches to replace, in [0, 1], or a schedule.
        max_new_tokens: maximum length of a continuation, in tokens.
        sampling_temperature: temperature of the student's sampling.
        seed: seed of the texts.

    Raises:
        SettingError: if a number is out of range, or, in `bind`, the student does not generate text.
        DataError: when called, for packed texts, an empty prompt, or columns that would not fit the new texts.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> shape = dict(hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1)
    >>> student = LlamaForCausalLM(LlamaConfig(vocab_size=9, eos_token_id=2, **shape))
    >>> batch = {"input_ids": torch.tensor([[1, 5, 6]]), "labels": torch.tensor([[-100, -100, 6]])}
    >>> shown = OnPolicy(student_share=1.0, max_new_tokens=4)(batch, student, step=0)
    >>> shown["input_ids"][0, :2].tolist(), shown["labels"][0, :2].tolist()
    ([1, 5], [-100, -100])
    """

    paper: ClassVar[str | None] = "agarwal2024onpolicy"

    def __init__(
        self,
        *,
        student_share: float | Schedule = 0.5,
        max_new_tokens: int = 128,
        sampling_temperature: float = 1.0,
        seed: int = 0,
    ) -> None:
        self.student_share: Schedule = student_share if callable(student_share) else constant(student_share)
        self.max_new_tokens = max_new_tokens
        self.sampling_temperature = sampling_temperature
        self.seed = seed
        self._excluded_ids: list[int] = []
        for share in map(self.student_share, PROGRESS):
            if not is_number(share) or not 0 <= share <= 1:
                raise SettingError(f"OnPolicy: student_share={share!r}. It is a share of the batches, in [0, 1].")

    def bind(
        self,
        student: nn.Module,
        task: Task,
        *,
        teacher: _BoundTeacher | None = None,
        processing_class: ProcessingClass | None = None,
    ) -> None:
        """Check that the student can continue a batch, and determine the ids that its texts may contain.

        The trainer calls it; your own loop must do so if a head has padded columns, or tokens were added.

        Args:
            student: the student.
            task: the student's task.
            teacher: a bound teacher, such as `distiller.teacher`, whose columns and embeddings limit the ids.
            processing_class: the student's tokenizer, or a processor with a tokenizer.

        Raises:
            SettingError: if the student cannot continue a batch.
        """
        model = _without_ddp(student)
        has_other_inputs = main_input_of(model) != "input_ids"
        if not task.generates or has_other_inputs:
            kind = "sound or images" if has_other_inputs else str(task)
            raise SettingError(
                f"OnPolicy continues texts, and this student is trained for {kind}. Allowed: causal_lm and seq2seq, of "
                "text. For speech, let the teacher generate: hf_distill.generate_completions."
            )
        tokenizer: Any = getattr(processing_class, "tokenizer", processing_class)
        tokenizer = tokenizer if hasattr(tokenizer, "get_vocab") else None
        self._excluded_ids = ids_not_shared(model, teacher, tokenizer)
        settings = self._settings(model)
        first, last = getattr(settings, _LANGUAGE), None if tokenizer is None else tokenizer.eos_token_id
        needed = {"begin": {first}, "end": end_tokens(settings) | {last}}
        for place, tokens in needed.items():
            tokens -= {None}
            if tokens and tokens <= set(self._excluded_ids):
                raise SettingError(
                    f"OnPolicy: the student's texts {place} with {sorted(tokens)}, which student, teacher and "
                    "tokenizer do not share. Train with a teacher that knows this token, or set another in the "
                    "student's generation_config (eos_token_id, forced_bos_token_id)."
                )

    def continues(self, step: int, micro_batch: int = 0, *, progress: float = 0.0) -> bool:
        """Return whether this batch is continued, the same on all processes."""
        return random.Random(f"{self.seed}:{step}:{micro_batch}").random() < self.student_share(progress)

    def __call__(
        self,
        batch: Batch,
        student: nn.Module,
        *,
        step: int,
        micro_batch: int = 0,
        process: int = 0,
        progress: float = 0.0,
    ) -> Batch:
        """Return the batch, or its continuation by the student. Call it before `Distiller.begin_step`.

        Args:
            batch: the batch.
            student: the student; its mode and the random generators are restored.
            step: number of optimizer steps so far.
            micro_batch: the batch's place in the step.
            process: number of this process.
            progress: share of the training that is done, for the schedule.
        """
        if not self.continues(step, micro_batch, progress=progress):
            return batch
        model = _without_ddp(student)
        device = next(model.parameters()).device
        with drawn_from(device, self.seed, step, micro_batch, process):
            if unwrapped(model).config.is_encoder_decoder:
                return self._continue_seq2seq(batch, model)
            return self._continue_causal(batch, model)

    def _continue_causal(self, batch: Batch, student: PreTrainedModel) -> dict[str, Tensor]:
        _check_columns(batch, _REPLACED)
        device = batch["input_ids"].device
        prompts = prompts_of(batch)
        written = generate_causal(student, prompts, self._settings(student))
        whole = [torch.tensor(prompt + text) for prompt, text in zip(prompts, written, strict=True)]
        labels = [torch.tensor([IGNORED] * len(p) + text) for p, text in zip(prompts, written, strict=True)]
        masks = [torch.ones_like(ids) for ids in whole]
        return {
            "input_ids": pad_sequence(whole, batch_first=True).to(device),
            "attention_mask": pad_sequence(masks, batch_first=True).to(device),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED).to(device),
        }

    def _continue_seq2seq(self, batch: Batch, student: PreTrainedModel) -> dict[str, Tensor]:
        _check_columns(batch, (*_REPLACED, "decoder_input_ids", "decoder_attention_mask"))
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if batch.get(name) is not None}
        written = generate_seq2seq(student, inputs, self._settings(student))
        labels = pad_sequence([torch.tensor(text) for text in written], batch_first=True, padding_value=IGNORED)
        return {**inputs, "labels": labels.to(batch["input_ids"].device)}

    def _settings(self, student: PreTrainedModel) -> GenerationConfig:
        return generation_settings(
            student,
            max_new_tokens=self.max_new_tokens,
            do_sample=True,
            sampling_temperature=self.sampling_temperature,
            others={"suppress_tokens": self._excluded_ids or None},
            followed=(*_FOLLOWED, _LANGUAGE) if unwrapped(student).config.is_encoder_decoder else _FOLLOWED,
        )

    def __repr__(self) -> str:
        return (
            f"OnPolicy(student_share={self.student_share(0.0):g}, max_new_tokens={self.max_new_tokens}, "
            f"sampling_temperature={self.sampling_temperature:g}, seed={self.seed})"
        )


def prompts_of(batch: Batch) -> list[list[int]]:
    """Return the ids before the first valid label of each example, or all of them if none is valid."""
    ids = batch["input_ids"].tolist()
    masks, labels = (
        [None] * len(ids) if batch.get(name) is None else batch[name].tolist() for name in ("attention_mask", "labels")
    )
    return [prompt_of(*row) for row in zip(ids, masks, labels, strict=True)]


def _without_ddp(student: nn.Module) -> Any:
    """Return the model without its DDP wrapper, since generation needs no other process."""
    return student.module if isinstance(student, DistributedDataParallel) else student


def _check_columns(batch: Batch, known: tuple[str, ...]) -> None:
    others = sorted(name for name, value in batch.items() if name not in known and value is not None)
    if not others and batch.get("input_ids") is not None:
        return
    if "position_ids" in batch or "shift_labels" in batch:
        raise DataError("OnPolicy: texts are packed into a row, which cannot be continued. Use a collator that pads.")
    if any(name.startswith(TEACHER_PREFIX) for name in others):
        raise DataError(
            f"OnPolicy: the teacher has columns of its own ({', '.join(others)}), which lack the student's new tokens. "
            "Use a teacher with the student's tokenizer, or student_share=0."
        )
    raise DataError(
        f"OnPolicy continues a batch of {', '.join(known)}, and this one has {sorted(batch)}. Leave the other columns "
        "out: they would not fit the new texts."
    )
