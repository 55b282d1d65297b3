"""ServedTeacher: a causal language model behind an HTTP endpoint, which scores the batch's texts and writes none."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hf_distill.errors import DataError, SettingError, TeacherError, did_you_mean
from hf_distill.signals import Needs, Signals, SparseRows
from hf_distill.tasks import Batch, Task
from hf_distill.tasks.infer import unwrapped
from hf_distill.teachers import model as fitting
from hf_distill.teachers.base import Teacher, TeacherSetup
from hf_distill.teachers.served.client import APIS, Endpoint, Row, Tokens, read
from hf_distill.teachers.served.rows import ListedRows, listed_rows
from hf_distill.vocabulary import HeadAlignment, match_vocabularies

if TYPE_CHECKING:
    from hf_distill.objectives import Objective

logger = logging.getLogger(__name__)
_PROBED = 32  # tokens of the prompt that is scored before the training, to see what the server can do


class ServedTeacher(Teacher):
    """A teacher that is asked over HTTP for the log-probabilities of the batch's own tokens.

    At each position it tells its k likeliest tokens; all others are one outcome more, with what is left of the
    probability. The divergence is over these k + 1 outcomes: at most that of the whole distributions, and equal to it
    where k is the whole vocabulary. Probabilities are those at temperature 1, and softening them would need the tail's
    own shape: another temperature is refused, unless the server tells every column. It is asked at every step.

    The address and the key are in no log, card, checkpoint or message. The key is read from the environment.

    Args:
        url: up to the version: http://localhost:8000/v1 (SGLang: without /v1).
        model: the name that the server knows.
        processing_class: the tokenizer of the served model; compared with the student's and the server's.
        api: "vllm", "sglang" or "echo" (completions with echo, tokens named token_id:N).
        top_logprobs: k. vLLM gives up to 20 unless it is started with a higher --max-logprobs.
        batch_size: sequences a request.
        max_concurrency: requests at a time, of each process.
        timeout_s: of one attempt.
        retries: more attempts after a failure that may pass.
        api_key_env: name of the environment variable that holds the key; None: none is sent.

    Raises:
        SettingError: a value that cannot be.

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
        processing_class: Any,
        api: str = "vllm",
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
        for name, value, least in [*((n, v, 1) for n, v in counts.items()), ("retries", retries, 0)]:
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise SettingError(f"{name}={value!r}: must be a whole number of at least {least}.")
        if not 0 < timeout_s < float("inf"):
            raise SettingError(f"timeout_s={timeout_s!r}: must be a number of seconds above 0.")
        if not hasattr(fitting.tokenizer_in(processing_class), "get_vocab"):
            raise SettingError(
                f"processing_class is a {type(processing_class).__name__}: give the tokenizer of the served model."
            )
        self.alignment = HeadAlignment()
        self._api, self._model, self._k = APIS[api], model, top_logprobs
        self._tokenizer = fitting.tokenizer_in(processing_class)
        self._batch_size, self._max_concurrency = batch_size, max_concurrency
        base = str(url).rstrip("/").removesuffix("/v1") if api == "sglang" else url
        self._endpoint = Endpoint(base, timeout_s=timeout_s, retries=retries, api_key_env=api_key_env)
        self._columns_of_tokens = np.zeros(0, dtype=np.int64)
        self._tells_all = False

    def __repr__(self) -> str:
        return f"ServedTeacher({self._model!r}, top_logprobs={self._k})"  # the address is in no log

    def bind(self, setup: TeacherSetup) -> None:
        """Check the tokenizers, and score one short prompt to see that the server can do it.

        Raises:
            TeacherError: if the student is no causal LM or has another vocabulary, or the server gives too little.
        """
        task = setup.task
        if not task.shifts_labels:
            raise TeacherError(
                f"a served teacher scores text from left to right, and the student is trained for {task}. Use a "
                "model as teacher, or train a causal language model."
            )
        student = unwrapped(setup.student)
        ours = fitting.tokenizer_in(setup.processing_class) or fitting.tokenizer_of(student)
        if ours is None:
            logger.warning(
                "The student's tokenizer is not known, so it was not compared with the served teacher's. If it is "
                "another one, the student learns from misread text: pass processing_class= to have it checked."
            )
        width = _head_width(student)
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
            raise SettingError("a served teacher shows no hidden states or attentions. Leave out those objectives.")
        if needs.logits and needs.temperature != 1 and not self._tells_all:
            raise SettingError(
                f"temperature={needs.temperature:g}: the server gives the {self._k} likeliest tokens at temperature 1 "
                "and the rest as one sum, which cannot be softened exactly. Pass temperature=1.0 without a schedule; "
                "or top_logprobs= as large as the vocabulary, where the server allows it."
            )

    def __call__(self, task: Task, batch: Batch, needs: Needs) -> Signals:
        self.check(needs)
        if not needs.logits:
            return Signals(logits=None, alignment=self.alignment)
        input_ids = batch["input_ids"]
        asked = list(_prompts(task, batch))
        rows = self._ask([prompt for _, _, prompt in asked])
        found = listed_rows(list(itertools.chain.from_iterable(rows)), self._columns_of_tokens)
        places = [(example, first + i) for (example, first, prompt) in asked for i in range(len(prompt) - 1)]
        return self._signals(found, places, input_ids, needs.temperature)

    @property
    def _width(self) -> int:
        """How many columns are compared."""
        return int((self._columns_of_tokens >= 0).sum())

    def _ask(self, prompts: Sequence[Tokens]) -> list[list[Row]]:
        """The rows of each prompt, in order; at most `max_concurrency` requests are under way."""
        starts = range(0, len(prompts), self._batch_size)
        parts = [prompts[start : start + self._batch_size] for start in starts]
        with ThreadPoolExecutor(self._max_concurrency, thread_name_prefix="teacher") as pool:
            answers = list(pool.map(self._score, parts))  # after a failure the rest is not asked any more
        return list(itertools.chain.from_iterable(answers))

    def _score(self, prompts: Sequence[Tokens]) -> list[list[Row]]:
        reply = self._endpoint.post(self._api.path, self._api.body(self._model, prompts, self._k))
        rows = read(self._api, reply, prompts)
        fewest = min(len(row) for row in itertools.chain.from_iterable(rows))
        if fewest < min(self._k, self._width):
            raise TeacherError(
                f"the teacher's server lists {fewest} tokens at a position, and {self._k} were asked for. Lower "
                "top_logprobs=, or raise the server's limit."
            )
        return rows

    def _signals(
        self, found: ListedRows, places: list[tuple[int, int]], input_ids: Tensor, temperature: float
    ) -> Signals:
        """Where nothing was asked there is NaN: no row that counts, so never looked at."""
        width, index = self._width, tuple(torch.tensor(places, dtype=torch.long).reshape(-1, 2).T)

        def spread(values: Tensor, filled: float) -> Tensor:
            whole = torch.full((*input_ids.shape, *values.shape[1:]), filled, dtype=values.dtype)
            whole[index] = values
            return whole.to(input_ids.device)

        log_p, softened = found.log_probabilities, 1.0
        if temperature != 1 and found.all_columns(width):
            log_p, softened = found.softened(temperature), temperature
        sparse = SparseRows(
            ids=spread(found.ids, -1),
            log_probabilities=spread(log_p, torch.nan),
            log_tail=spread(found.log_tail, torch.nan),
            temperature=softened,
        )
        return Signals(logits=None, alignment=self.alignment, sparse=sparse)

    def _probe(self) -> None:
        """Score a prompt of tokens from all over the vocabulary, and compare the texts that the server gives them."""
        special = set(self._tokenizer.all_special_ids)
        known = [i for i in np.flatnonzero(self._columns_of_tokens >= 0).tolist() if i not in special]
        prompt = known[:: max(1, len(known) // _PROBED)][:_PROBED]
        prompt = prompt if len(prompt) > 1 else [*known, *known][:2]
        body = self._api.body(self._model, [prompt], self._k)
        reply = self._endpoint.post(self._api.path, body)
        (rows,) = read(self._api, reply, [prompt])
        texts = self._api.texts(self._api.answers(reply)[0])
        if not texts:
            logger.warning(
                "The teacher's server does not tell the texts of its tokens, so whether processing_class= is "
                "the served model's was not checked."
            )
        for token, text in texts.items():
            if token not in special:
                self._compare_text(token, text)
        found = listed_rows(rows, self._columns_of_tokens)
        self._tells_all = found.all_columns(self._width)

    def _compare_text(self, token: int, told: str) -> None:
        ours = {self._tokenizer.decode([token]), self._tokenizer.convert_ids_to_tokens(token) or ""}
        # Half a character has no text of its own.
        if "\ufffd" in told or not told.strip() or _plain(told) in map(_plain, ours):
            return
        raise TeacherError(
            f"the served model has another tokenizer: its token {token} is {told!r}, that of processing_class= is "
            f"{self._tokenizer.decode([token])!r}. Give the served model's own tokenizer; the student must have the "
            "same one."
        )


def _prompts(task: Task, batch: Batch) -> Iterator[tuple[int, int, list[int]]]:
    """Example, its first position, and the tokens to be scored: up to the one after the last row that counts."""
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
            raise DataError("the attention mask of an example has holes, which a served teacher cannot be told of.")
        if int(rows[0]) < first or int(rows[-1]) > last:
            raise DataError("a label counts where the attention mask shows padding. Set such labels to -100.")
        scored = tokens[first : int(rows[-1]) + 2].tolist()
        # Behind the last token anything may stand: what is predicted there depends on what comes before.
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
        raise DataError(
            "several texts are packed into one row, and a served teacher would read them as one. Use a collator that "
            "pads."
        )


def _head_width(student: Any) -> int:
    find = getattr(student, "get_output_embeddings", None)
    weight = None if find is None else getattr(find(), "weight", None)
    if weight is not None:
        return int(weight.shape[0])
    return int(student.config.get_text_config(decoder=True).vocab_size)


def _columns_of_tokens(columns: HeadAlignment, width: int) -> np.ndarray:
    """`[tokens]` the compared column of each token id, -1: none. (Shared tokens have one id in both vocabularies.)"""
    if isinstance(columns.student, tuple):
        found = np.full(max(columns.student) + 1, -1, dtype=np.int64)
        found[list(columns.student)] = np.arange(len(columns.student))
        return found
    return np.arange(width if columns.student is None else columns.student)


def _plain(text: str) -> str:
    """A token's text without what tokenizers write for a space."""
    return text.replace("▁", " ").replace("Ġ", " ").strip()
