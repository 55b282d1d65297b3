"""OnPolicy: batches that the student continues by sampling from its own distribution."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from hf_distill.errors import DataError, SettingError
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
from hf_distill.tasks.infer import unwrapped

# The settings of the student's generation_config that are used. Any other could change the distribution of its samples,
# and not all settings of `generate` are listed there, so everything else is left out.
_FOLLOWED = (
    *("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"),
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "compile_config", "disable_compile"),
)
_LANGUAGE = "forced_bos_token_id"  # the language of an encoder-decoder's text (mBART, M2M100), given like a prompt


def sampling_settings(
    student: Any, *, max_new_tokens: int, sampling_temperature: float, never: Sequence[int] = ()
) -> GenerationConfig:
    """Return the settings for sampling from all ids except those in `never`.

    Raises:
        SettingError: see `generation_settings`.
    """
    return generation_settings(
        student,
        max_new_tokens=max_new_tokens,
        do_sample=True,
        sampling_temperature=sampling_temperature,
        others={"suppress_tokens": list(never) or None},
        followed=(*_FOLLOWED, _LANGUAGE) if unwrapped(student).config.is_encoder_decoder else _FOLLOWED,
    )


def tokens_needed(settings: GenerationConfig, tokenizer: Any = None) -> dict[str, set[int]]:
    """Return the tokens that a text needs, by their purpose; one for each purpose must be allowed."""
    first, last = getattr(settings, _LANGUAGE), getattr(tokenizer, "eos_token_id", None)
    return {
        "begin": set() if first is None else {first},
        "end": end_tokens(settings) | (set() if last is None else {last}),
    }


def ids_not_shared(student: Any, teacher: Any = None, tokenizer: Any = None) -> list[int]:
    """Return the columns of the student's head that its texts must not contain, as far as is known.

    These have no token (padding), are not compared with the teacher's, or have no embedding in one of the models.

    Args:
        teacher: a bound teacher, or None.
        tokenizer: the student's, or None.

    >>> from types import SimpleNamespace
    >>> student = torch.nn.Module()
    >>> student.get_output_embeddings = lambda: torch.nn.Linear(2, 6)
    >>> ids_not_shared(student, tokenizer=SimpleNamespace(get_vocab=lambda: {"a": 0, "b": 1, "c": 3}))
    [2, 4, 5]
    """
    columns = range(_head_width(unwrapped(student)))
    written = set(tokenizer.get_vocab().values() if hasattr(tokenizer, "get_vocab") else columns)
    compared = None if teacher is None else teacher.alignment.student
    if compared is not None:
        written &= set(range(compared)) if isinstance(compared, int) else set(compared)
    for model in (student, *([] if teacher is None else teacher.models())):
        embedded = _embeddings(unwrapped(model))
        if embedded is not None:
            written &= set(range(embedded))
    return sorted(set(columns) - written)


def _head_width(model: Any) -> int:
    """Return `out_features`, since the weights of a quantised head have another shape."""
    find = getattr(model, "get_output_embeddings", None)
    width = getattr(None if find is None else find(), "out_features", None)
    return int(model.config.get_text_config(decoder=True).vocab_size if width is None else width)


def _embeddings(model: Any) -> int | None:
    """Return the number of ids that it embeds; None if not known."""
    find = getattr(model, "get_input_embeddings", None)
    found: Any = None if find is None else find()
    count = getattr(found, "num_embeddings", None)
    if count is None and isinstance(getattr(found, "weight", None), Tensor):  # under an adapter
        count = found.weight.shape[0]
    return None if count is None else int(count)


_REPLACED = ("input_ids", "attention_mask", "labels")


class OnPolicy:
    """Replaces a share of the batches by the student's continuations of their prompts.

    A prompt is the text before the first label that is not -100, or a whole text without labels. The new labels are the
    student's tokens, up to and including the end of the text, so that only they are compared with the teacher. They are
    not gold labels, so alpha must be 1 (or None): the labels' term would train on the student's own text.

    Agarwal et al. 2024 (On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes), algorithm 1,
    with its student_share; there the divergence is a generalized Jensen-Shannon (`divergence="jensen_shannon"`),
    forward_kl or reverse_kl. Sampling is from the student's distribution over all tokens that both models know
    (`bind`), not from transformers' default of the 50 likeliest. From its `generation_config` only the special tokens
    and the cache are used (and `forced_bos_token_id`, the language, of an encoder-decoder). No gradient flows through
    the sampling.

    The random numbers follow from the seed, the step and the batch's place in it only: all processes agree whether a
    batch is continued, and a resumed run equals an uninterrupted one.

    Args:
        student_share: share of the batches to replace, in [0, 1], or a schedule.
        max_new_tokens: maximal length of a continuation, in tokens.
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
        self._never_written: list[int] = []
        for share in map(self.student_share, PROGRESS):
            if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
                raise SettingError(f"OnPolicy: student_share={share!r}. It is a share of the batches, in [0, 1].")

    def bind(self, student: Any, task: Task, *, teacher: Any = None, processing_class: Any = None) -> None:
        """Check that the student can continue a batch, and find out which ids its texts may contain.

        A trainer calls it; a hand-written loop must if a head has padded columns, or tokens were added.

        Args:
            teacher: a bound teacher, as `distiller.teacher`, whose columns and embeddings limit the ids.
            processing_class: the student's tokenizer, or a processor with one.

        Raises:
            SettingError: if the student cannot continue a batch.
        """
        student = _alone(student)
        speaks = getattr(unwrapped(student), "main_input_name", "input_ids") != "input_ids"
        if not task.generates or speaks:
            what = "sound or images" if speaks else str(task)
            raise SettingError(
                f"OnPolicy continues texts, and this student is trained for {what}. Allowed: causal_lm and seq2seq, of "
                "text. For speech, let the teacher write: hf_distill.generate_completions."
            )
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        self._never_written = ids_not_shared(student, teacher, tokenizer)
        for what, tokens in tokens_needed(self._settings(student), tokenizer).items():
            if tokens and tokens <= set(self._never_written):
                raise SettingError(
                    f"OnPolicy: the student's texts {what} with {sorted(tokens)}, which student, teacher and tokenizer "
                    "do not share. Train with a teacher that knows this token, or name another one in the student's "
                    "generation_config (eos_token_id, forced_bos_token_id)."
                )

    def continues(self, step: int, micro_batch: int = 0, *, progress: float = 0.0) -> bool:
        """Return whether this batch is continued, the same on all processes."""
        return random.Random(f"{self.seed}:{step}:{micro_batch}").random() < self.student_share(progress)

    def __call__(
        self,
        batch: Mapping[str, Any],
        student: Any,
        *,
        step: int,
        micro_batch: int = 0,
        process: int = 0,
        progress: float = 0.0,
    ) -> Mapping[str, Any]:
        """Return the batch, or its continuation by the student. Call it before `Distiller.begin_step`.

        Args:
            student: the student; its mode and the random generators are restored.
            step: number of optimizer steps so far.
            micro_batch: the batch's place in the step.
            process: the number of this process.
        """
        if not self.continues(step, micro_batch, progress=progress):
            return batch
        student = _alone(student)
        device = next(student.parameters()).device
        with drawn_from(device, self.seed, step, micro_batch, process):
            if unwrapped(student).config.is_encoder_decoder:
                return self._answered(batch, student)
            return self._continued(batch, student)

    def _continued(self, batch: Mapping[str, Any], student: Any) -> dict[str, Tensor]:
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

    def _answered(self, batch: Mapping[str, Any], student: Any) -> dict[str, Any]:
        _check_columns(batch, (*_REPLACED, "decoder_input_ids", "decoder_attention_mask"))
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if batch.get(name) is not None}
        written = generate_seq2seq(student, inputs, self._settings(student))
        labels = pad_sequence([torch.tensor(text) for text in written], batch_first=True, padding_value=IGNORED)
        return {**inputs, "labels": labels.to(batch["input_ids"].device)}

    def _settings(self, student: Any) -> GenerationConfig:
        return sampling_settings(
            student,
            max_new_tokens=self.max_new_tokens,
            sampling_temperature=self.sampling_temperature,
            never=self._never_written,
        )

    def __repr__(self) -> str:
        return (
            f"OnPolicy(student_share={self.student_share(0.0):g}, max_new_tokens={self.max_new_tokens}, "
            f"sampling_temperature={self.sampling_temperature:g}, seed={self.seed})"
        )


def prompts_of(batch: Mapping[str, Any]) -> list[list[int]]:
    """Return the ids before the first valid label of each example, or all of them if none is valid."""
    ids = batch["input_ids"].tolist()
    read, labels = (
        [None] * len(ids) if batch.get(name) is None else batch[name].tolist() for name in ("attention_mask", "labels")
    )
    return [prompt_of(*one) for one in zip(ids, read, labels, strict=True)]


def _alone(student: Any) -> Any:
    """Return the model without its DDP wrapper, since generation needs no other process."""
    return student.module if isinstance(student, DistributedDataParallel) else student


def _check_columns(batch: Mapping[str, Any], known: tuple[str, ...]) -> None:
    packed = "position_ids" in batch or "shift_labels" in batch
    others = sorted(name for name, value in batch.items() if name not in known and value is not None)
    if not others and batch.get("input_ids") is not None:
        return
    if packed:
        raise DataError("OnPolicy: texts are packed into a row, which cannot be continued. Use a collator that pads.")
    if any(name.startswith(TEACHER_PREFIX) for name in others):
        raise DataError(
            f"OnPolicy: the teacher has columns of its own ({', '.join(others)}), which do not hold what the student "
            "writes. Use a teacher with the student's tokenizer, or student_share=0."
        )
    raise DataError(
        f"OnPolicy continues a batch of {', '.join(known)}, and this one has {sorted(batch)}. Leave the other columns "
        "out: they would not fit the new texts."
    )
