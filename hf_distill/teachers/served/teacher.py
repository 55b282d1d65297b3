"""ServedTeacher: a causal language model behind an HTTP endpoint, which scores the texts of the batch."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_distill._types import ProcessingClass
from hf_distill.errors import DataError, SettingError, TeacherError, check_whole_number, did_you_mean
from hf_distill.signals import Needs, Signals, SparseRows
from hf_distill.tasks import Batch, Task
from hf_distill.tasks.infer import unwrapped
from hf_distill.teachers.base import Teacher, TeacherSetup
from hf_distill.teachers.model import head_width, tokenizer_in, tokenizer_of
from hf_distill.teachers.served.client import APIS, Endpoint, Row, Tokens, read
from hf_distill.teachers.served.rows import TopRows, top_rows
from hf_distill.vocabulary import HeadAlignment, match_vocabularies

if TYPE_CHECKING:
    from hf_distill.objectives import Objective

logger = logging.getLogger(__name__)
_PROBE_TOKENS = 32  # in the prompt that tests the server before the training


class ServedTeacher(Teacher):
    """A teacher behind an HTTP endpoint that returns log-probabilities for the batch's own tokens.

    For each position the server returns the k most likely tokens; all others are one more outcome, with the rest of the
    probability. The divergence over these k + 1 outcomes is at most that of the whole distributions, and equal to it if
    k is the whole vocabulary. Probabilities are at temperature 1; another temperature is an error unless the server
    returns all columns, because the shape of the tail is not known. A request is sent at every step.

    The address and the key are in no log, card, checkpoint or message. The key is read from the environment.

    Args:
        url: the address up to the version: http://localhost:8000/v1 (SGLang: without /v1).
        model: the name of the model at the server.
        processing_class: the tokenizer of the served model; it is compared with the student's and the server's.
        api: "vllm", "sglang" or "echo" (completions with echo, tokens named token_id:N).
        top_logprobs: k. vLLM returns up to 20 unless it is started with a higher --max-logprobs.
        batch_size: sequences in a request.
        max_concurrency: simultaneous requests of each process.
        timeout_s: the timeout of one attempt, in seconds.
        retries: further attempts after a temporary failure.
        api_key_env: the environment variable that holds the key; None sends no key.

    Raises:
        SettingError: if a value is not allowed.

    >>> ServedTeacher("http://localhost:8000/v1", "large", processing_class=None, top_logprobs=0)
    Traceback (most recent call last):
    hf_distill.errors.SettingError: top_logprobs=0: must be a whole number of at least 1.
    """

    inputs = ("input_ids", "attention_mask")
    is_sparse = True

    def __init__(
        self,
        url: str,
        model: str,
        *,
        processing_class: ProcessingClass | None,
        api: Literal["vllm", "sglang", "echo"] = "vllm",
        top_logprobs: int = 20,
        batch_size: int = 8,
        max_concurrency: int = 4,
        timeout_s: float = 60.0,
        retries: int = 4,
        api_key_env: str | None = None,
    ) -> None:
        if api not in APIS:
            raise SettingError(f"api={api!r}: allowed are {', '.join(APIS)}.{did_you_mean(api, APIS)}")
        counts = {"top_logprobs": top_logprobs, "batch_size": batch_size, "max_concurrency": max_concurrency}
        for name, value in counts.items():
            check_whole_number(name, value)
        check_whole_number("retries", retries, least=0)
        if not 0 < timeout_s < float("inf"):
            raise SettingError(f"timeout_s={timeout_s!r}: must be a number of seconds above 0.")
        tokenizer = tokenizer_in(processing_class)
        if tokenizer is None:
            name = type(processing_class).__name__
            raise SettingError(f"processing_class is a {name}: give the tokenizer of the served model.")
        self.alignment = HeadAlignment()
        self._api, self._model, self._k = APIS[api], model, top_logprobs
        self._tokenizer: PreTrainedTokenizerBase = tokenizer
        self._batch_size, self._max_concurrency = batch_size, max_concurrency
        base = str(url).rstrip("/").removesuffix("/v1") if api == "sglang" else url
        self._endpoint = Endpoint(base, timeout_s=timeout_s, retries=retries, api_key_env=api_key_env)
        self._columns_of_tokens = np.zeros(0, dtype=np.int64)
        self._returns_all = False

    def __repr__(self) -> str:
        return f"ServedTeacher({self._model!r}, top_logprobs={self._k})"  # the address is in no log

    def bind(self, setup: TeacherSetup) -> None:
        """Check the tokenizers, and score one short prompt to check the server.

        Raises:
            TeacherError: if the student is no causal LM or has another vocabulary, or the server returns too little.
        """
        task = setup.task
        if not task.shifts_labels:
            raise TeacherError(f"a served teacher scores text from left to right; the student is trained for {task}.")
        student = unwrapped(setup.student)
        ours = tokenizer_in(setup.processing_class) or tokenizer_of(student)
        if ours is None:
            logger.warning(
                "The student's tokenizer is not known, so it was not compared with the served teacher's. If they "
                "differ, the student learns from misread text: pass processing_class= to have it checked."
            )
        width = head_width(student)
        if width is None:
            raise TeacherError(f"{type(student).__name__} has no known vocabulary. Use a transformers causal LM.")
        self.alignment = match_vocabularies(
            student_width=width,
            teacher_width=max(self._tokenizer.get_vocab().values()) + 1,
            student_tokenizer=ours or self._tokenizer,
            teacher_tokenizer=self._tokenizer,
        )
        self._columns_of_tokens = _columns_of_tokens(self.alignment, width)
        self._probe()

    def check(self, needs: Needs, objectives: Iterable[Objective] = ()) -> None:
        if needs.activations:
            raise SettingError("a served teacher shows no hidden states or attentions. Leave out objectives on them.")
        if needs.logits and needs.temperature != 1 and not self._returns_all:
            raise SettingError(
                f"temperature={needs.temperature:g}: the {self._k} most likely tokens at temperature 1 cannot be "
                "softened exactly. Pass temperature=1.0 without a schedule, or top_logprobs= of the whole vocabulary."
            )

    def __call__(self, task: Task, batch: Batch, needs: Needs) -> Signals:
        self.check(needs)
        if not needs.logits:
            return Signals(logits=None, alignment=self.alignment)
        input_ids = batch["input_ids"]
        prompts = list(_prompts(task, batch))
        rows = self._request([prompt for _, _, prompt in prompts])
        top = top_rows(list(itertools.chain.from_iterable(rows)), self._columns_of_tokens)
        places = [(example, first + i) for (example, first, prompt) in prompts for i in range(len(prompt) - 1)]
        return self._signals(top, places, input_ids, needs.temperature)

    @property
    def _width(self) -> int:
        """The number of compared columns."""
        return int((self._columns_of_tokens >= 0).sum())

    def _request(self, prompts: Sequence[Tokens]) -> list[list[Row]]:
        """Return the rows of each prompt, with at most `max_concurrency` requests at a time."""
        starts = range(0, len(prompts), self._batch_size)
        parts = [prompts[start : start + self._batch_size] for start in starts]
        with ThreadPoolExecutor(self._max_concurrency, thread_name_prefix="teacher") as pool:
            answers = list(pool.map(self._score, parts))  # a failure cancels the rest
        return list(itertools.chain.from_iterable(answers))

    def _score(self, prompts: Sequence[Tokens]) -> list[list[Row]]:
        reply = self._endpoint.post(self._api.path, self._api.body(self._model, prompts, self._k))
        rows = read(self._api, reply, prompts)
        fewest = min(len(row) for row in itertools.chain.from_iterable(rows))
        if fewest < min(self._k, self._width):
            counts = f"lists {fewest} tokens at a position, and {self._k} were asked for"
            raise TeacherError(f"the teacher's server {counts}. Lower top_logprobs=, or raise the server's limit.")
        return rows

    def _signals(self, top: TopRows, places: list[tuple[int, int]], input_ids: Tensor, temperature: float) -> Signals:
        """Return signals with NaN in rows that do not count; these are never read.

        Args:
            top: the rows `[r]`.
            places: the example and position of each row.
            input_ids: `[b t]`.
            temperature: the current temperature.
        """
        width, index = self._width, tuple(torch.tensor(places, dtype=torch.long).reshape(-1, 2).T)

        def in_place(values: Tensor, filled: float) -> Tensor:
            whole = torch.full((*input_ids.shape, *values.shape[1:]), filled, dtype=values.dtype)
            whole[index] = values
            return whole.to(input_ids.device)

        log_p, softened = top.log_probabilities, 1.0
        if temperature != 1 and top.has_all_columns(width):
            log_p, softened = top.softened(temperature), temperature
        sparse = SparseRows(
            ids=in_place(top.ids, -1),
            log_probabilities=in_place(log_p, torch.nan),
            log_tail=in_place(top.log_tail, torch.nan),
            temperature=softened,
        )
        return Signals(logits=None, alignment=self.alignment, sparse=sparse)

    def _probe(self) -> None:
        """Score a prompt with tokens from the whole vocabulary, and compare their texts with the server's."""
        special = set(self._tokenizer.all_special_ids)
        known = [i for i in np.flatnonzero(self._columns_of_tokens >= 0).tolist() if i not in special]
        prompt = known[:: max(1, len(known) // _PROBE_TOKENS)][:_PROBE_TOKENS]
        prompt = prompt if len(prompt) > 1 else [*known, *known][:2]
        reply = self._endpoint.post(self._api.path, self._api.body(self._model, [prompt], self._k))
        (rows,) = read(self._api, reply, [prompt])
        texts = self._api.texts(self._api.answers(reply)[0])
        if not texts:
            logger.warning(
                "The teacher's server does not return the texts of its tokens, so processing_class= was not compared "
                "with its tokenizer."
            )
        for token, text in texts.items():
            if token not in special:
                self._compare_text(token, text)
        self._returns_all = top_rows(rows, self._columns_of_tokens).has_all_columns(self._width)

    def _compare_text(self, token: int, text: str) -> None:
        decoded = str(self._tokenizer.decode([token]))
        ours = (decoded, str(self._tokenizer.convert_ids_to_tokens(token) or ""))
        # A part of a character has no text.
        if "\ufffd" not in text and text.strip() and _without_spaces(text) not in map(_without_spaces, ours):
            raise TeacherError(
                f"the served model has another tokenizer: its token {token} is {text!r}, that of processing_class= is "
                f"{decoded!r}. Give the served model's own tokenizer; the student must have the same tokenizer."
            )


def _prompts(task: Task, batch: Batch) -> Iterator[tuple[int, int, list[int]]]:
    """Return for each example its place, its first position, and the tokens to score, up to the last needed."""
    _check_inputs(batch)
    input_ids, mask = batch["input_ids"], batch.get("attention_mask")
    attended = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
    keep = task.keep(batch)
    assert keep is not None  # a causal LM says which positions count
    counts = keep.view(input_ids.shape[0], -1).cpu()
    for example, (tokens, real) in enumerate(zip(input_ids.cpu(), attended.cpu(), strict=True)):
        rows = counts[example].nonzero().flatten()
        if not len(rows):
            continue
        where = real.nonzero().flatten()
        first, last = int(where[0]), int(where[-1])
        if len(where) != last - first + 1:
            raise DataError("the attention mask of an example has holes, which a served teacher cannot receive.")
        if int(rows[0]) < first or int(rows[-1]) > last:
            raise DataError("a label counts where the attention mask shows padding. Set such labels to -100.")
        scored = tokens[first : int(rows[-1]) + 2].tolist()
        # After the last token any token may follow: the prediction there depends only on those before.
        yield example, first, scored if rows[-1] < last else [*tokens[first : last + 1].tolist(), scored[0]]


def _check_inputs(batch: Batch) -> None:
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    if batch.get("input_ids") is None or "teacher_input_ids" in batch or (mask is not None and mask.dim() != 2):
        raise DataError(
            "a served teacher reads the student's input_ids with a plain attention_mask [b t]; the batch has "
            f"{sorted(batch)}. Leave out teacher_ columns, embeddings and masks of other shapes."
        )
    packed = positions is not None and bool((positions[..., 1:] < positions[..., :-1]).any())
    if packed or any(name.startswith("cu_seq_lens") for name in batch):
        raise DataError("a served teacher would read texts packed into one row as one text. Use a collator that pads.")


def _columns_of_tokens(columns: HeadAlignment, width: int) -> np.ndarray:
    """Return the compared column of each token id, or -1, `[tokens]`; shared tokens have the same id in both models."""
    if isinstance(columns.student, tuple):
        found = np.full(max(columns.student) + 1, -1, dtype=np.int64)
        found[list(columns.student)] = np.arange(len(columns.student))
        return found
    return np.arange(width if columns.student is None else columns.student)


def _without_spaces(text: str) -> str:
    """Return a token's text without spaces, and without the characters that tokenizers write for them."""
    return text.replace("▁", " ").replace("Ġ", " ").strip()
