"""A served teacher gives the live teacher's predictions over real HTTP; a training with it stores no secret."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_distill import TeacherError
from hf_distill.errors import DataError
from hf_distill.signals import Signals
from hf_distill.teachers.served.rows import LEAST_TAIL, top_rows
from tests.heads import HEADS, VOCABULARY
from tests.laws import measuring as m
from tests.teachers.asking import NAME, SECRET, WORDS, batch_of, distiller_of, served
from tests.teachers.completions_server import CompletionsServer, serving
from tests.trainer.tiny import make, weights


def dense(signals: Signals) -> Tensor:
    """Return `[b t v]` of signals that list every column."""
    sparse = signals.sparse
    assert sparse is not None and sparse.ids.max() == VOCABULARY - 1
    rows = torch.full((*sparse.ids.shape[:2], VOCABULARY + 1), torch.nan, dtype=torch.float64)
    ids = sparse.ids.masked_fill(sparse.ids < 0, VOCABULARY)  # missing entries go to an extra column
    return rows.scatter(-1, ids, sparse.log_probabilities.double())[..., :-1]


def left_padded(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rotate each row so that its padding comes first."""
    lengths, longest = batch["attention_mask"].sum(-1).tolist(), batch["input_ids"].shape[1]
    return {
        name: torch.stack([row.roll(longest - length) for row, length in zip(x, lengths, strict=True)])
        for name, x in batch.items()
    }


# Predictions.


@pytest.mark.parametrize("speaks", ["vllm", "sglang", "echo"])
def test_the_whole_vocabulary_equals_the_live_teacher(speaks: str) -> None:
    """At any temperature. Log-probabilities are in fp32: 1e-6."""
    with serving(m.teacher_of(NAME), WORDS, speaks=speaks) as server:
        for settings in ({}, {"temperature": 3.0}, {"temperature": 0.5, "divergence": "reverse_kl"}):
            batch = batch_of()
            teacher = served(server, top_logprobs=VOCABULARY, api=speaks, batch_size=4)
            expected, gradient = m.step(distiller_of(m.teacher_of(NAME), **settings), m.student_of(NAME), [batch])
            loss, found = m.step(distiller_of(teacher, **settings), m.student_of(NAME), [batch])
            assert loss == pytest.approx(expected, rel=1e-6)
            assert m.difference(found, gradient) < 1e-5


@pytest.mark.parametrize("speaks", ["vllm", "sglang", "echo"])
def test_the_divergence_over_listed_tokens_and_the_tail(speaks: str) -> None:
    """From the definition: the k likeliest tokens, the actual token (which servers return too), and all others."""
    batch = batch_of()
    task = m.task_of(NAME)
    with serving(m.teacher_of(NAME), WORDS, speaks=speaks) as server, torch.no_grad():
        loss = distiller_of(served(server, api=speaks), alpha=1.0)(m.student_of(NAME), batch).loss
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        q, p = (model(**inputs).logits.softmax(-1) for model in (m.student_of(NAME), m.teacher_of(NAME)))
    total, count = 0.0, 0
    keep = task.keep(batch).view(len(q), -1)
    for example, position in keep.nonzero().tolist():
        row_q, row_p = q[example, position].tolist(), p[example, position].tolist()
        likeliest = sorted(range(VOCABULARY), key=lambda i: -row_p[i])[:6]
        listed = {*likeliest, int(batch["input_ids"][example, position + 1])}
        rest_q, rest_p = 1 - sum(row_q[i] for i in listed), 1 - sum(row_p[i] for i in listed)
        total += sum(row_p[i] * math.log(row_p[i] / row_q[i]) for i in listed) + rest_p * math.log(rest_p / rest_q)
        count += 1
    assert count > 10 and loss.item() == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("k", [3, VOCABULARY])
def test_padding_and_padding_side_change_nothing(server: CompletionsServer, k: int) -> None:
    distiller = distiller_of(served(server, top_logprobs=k), alpha=1.0)
    batch = batch_of()
    loss, gradient = m.step(distiller, m.student_of(NAME), [batch])
    assert m.step(distiller, m.student_of(NAME), [batch_of(pad_to=17)])[0] == pytest.approx(loss, rel=1e-6)
    turned = left_padded(batch)
    positions = (turned["attention_mask"].cumsum(-1) - 1).clamp(min=0)  # as in generation
    found = m.step(distiller, m.student_of(NAME), [{**turned, "position_ids": positions}])
    assert found[0] == pytest.approx(loss, rel=1e-6) and m.difference(found[1], gradient) < 1e-5


@pytest.mark.parametrize("k", [3, VOCABULARY])
def test_accumulation_changes_nothing(server: CompletionsServer, k: int) -> None:
    examples, distiller = HEADS[NAME].examples(8), distiller_of(served(server, top_logprobs=k))
    _, gradient = m.step(distiller, m.student_of(NAME), [m.collated(NAME, examples)])
    parts = [m.collated(NAME, examples[i : i + 2]) for i in range(0, 8, 2)]
    assert m.difference(m.step(distiller, m.student_of(NAME), parts)[1], gradient) < 1e-6


@pytest.mark.parametrize("k", [3, VOCABULARY])
def test_no_rows_need_no_request_and_give_zero(server: CompletionsServer, k: int) -> None:
    distiller, batch = distiller_of(served(server, top_logprobs=k), alpha=1.0), batch_of()
    asked = len(server.asked)
    loss, gradient = m.step(
        distiller, m.student_of(NAME), [{**batch, "labels": torch.full_like(batch["labels"], -100)}]
    )
    assert loss == 0 and gradient.abs().max() == 0 and len(server.asked) == asked


def test_the_row_after_the_last_token_is_requested_if_it_counts(server: CompletionsServer) -> None:
    """For padding whose labels are not -100 (the end token as padding), and for labels that are already shifted."""
    batch = batch_of(count=3)
    del batch["labels"]
    ended = {**batch, "labels": batch["input_ids"].clone()}  # every padded position has a label
    next_tokens = ended["labels"].roll(-1, -1)
    shifted = {**batch, "shift_labels": next_tokens.masked_fill(batch["attention_mask"] == 0, -100)}
    asked = distiller_of(served(server, top_logprobs=VOCABULARY), alpha=1.0)
    live, task = distiller_of(m.teacher_of(NAME)), asked.task
    for one in (ended, shifted):
        keep = task.kept_rows(one)
        expected, found = live.teacher_signals(one).predictions().log_softmax(-1), dense(asked.teacher_signals(one))
        expected, found = task.select(expected, one)[keep], task.select(found, one)[keep]
        sent = [len(prompt) for prompt in server.asked[-1][2]["prompt"]]
        lengths = batch["attention_mask"].sum(-1).tolist()
        longest = max(lengths)
        assert sent == [n + 1 if one is shifted or n < longest else n for n in lengths]  # one more token, of any kind
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    with pytest.raises(DataError, match="a label counts where the attention mask shows padding"):
        asked.teacher_signals({**shifted, "shift_labels": next_tokens})


def test_tokens_that_the_student_lacks_are_excluded(server: CompletionsServer) -> None:
    """As between two models: the server's padded columns are removed and the rest is renormalized (L7)."""
    wide = HEADS[NAME].make(2, vocab_size=VOCABULARY + 8).double()
    with serving(wide, WORDS) as padded, torch.no_grad():
        distiller = distiller_of(served(padded, top_logprobs=VOCABULARY + 8), alpha=1.0)
        found = dense(distiller.teacher_signals(batch := batch_of()))
        expected = wide(input_ids=batch["input_ids"]).logits[..., :VOCABULARY].log_softmax(-1)
    keep = distiller.task.kept_rows(batch)
    expected, found = distiller.task.select(expected, batch)[keep], distiller.task.select(found, batch)[keep]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_one_row_by_hand() -> None:
    """Tokens 0 and 7 have 1/2 and 1/4; the student lacks 7, so token 0 has 2/3 of the remaining 3/4."""
    found = top_rows([{0: math.log(0.5), 7: math.log(0.25)}, {1: 0.0, 0: -9999.0}], np.arange(4))
    assert found.ids.tolist() == [[0, -1], [1, 0]]
    assert found.log_probabilities[0].exp().tolist() == pytest.approx([2 / 3, 0])
    assert found.log_tail[0].exp().item() == pytest.approx(1 / 3)
    assert found.log_probabilities[1, 1] == -torch.inf  # as vLLM writes it
    assert found.log_tail[1].exp().item() == pytest.approx(LEAST_TAIL, rel=1e-4)  # rounding would hide a smaller tail
    with pytest.raises(TeacherError, match=r"100\.00% of the probability at one position to tokens that the student"):
        top_rows([{7: 0.0, 0: -20.0, 1: -20.0, 2: -20.0, 3: -20.0}], np.arange(4))
    for wrong in ({0: 2.5, 1: 1.0}, {0: -0.1, 1: -0.2}, {0: math.nan}):
        with pytest.raises(TeacherError, match="no numbers, or of which a row sums to more than 1"):
            top_rows([wrong], np.arange(4))


def test_requests_keep_order_and_respect_size_and_concurrency(server: CompletionsServer) -> None:
    """Rows return to their examples; requests stay within the size and concurrency limits."""
    server.pause_s = 0.02
    batch = batch_of(count=8)
    one = distiller_of(served(server, batch_size=8, max_concurrency=1)).teacher_signals(batch).sparse
    assert server.most_at_once == 1
    many = distiller_of(served(server, batch_size=1, max_concurrency=3)).teacher_signals(batch).sparse
    assert server.most_at_once == 3 and len(server.asked[-1][2]["prompt"]) == 1
    assert torch.equal(one.ids, many.ids)
    torch.testing.assert_close(one.log_probabilities, many.log_probabilities, equal_nan=True)


# In a training.


def test_a_training_stores_no_address(
    server: CompletionsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Checkpoints, card, log: no address and no key; the random numbers are those of a training with a live teacher."""
    monkeypatch.setenv("TEACHER_KEY", SECRET)
    head, students = HEADS[NAME], []
    for teacher in (head.make(2).double(), served(server, top_logprobs=VOCABULARY, api_key_env="TEACHER_KEY")):
        student = head.make(1).double()
        with caplog.at_level(logging.INFO):
            trainer = make(
                tmp_path / type(teacher).__name__,
                student,
                teacher,
                temperature=1.0,
                save_strategy="steps",
                save_steps=1,
                evaluate_with_teacher=True,
                eval_strategy="epoch",
                train_dataset=head.examples(8),
                eval_dataset=head.examples(4, seed=9),
                data_collator=head.collate,
                processing_class=WORDS,
            )
            trainer.train()
        trainer.create_model_card()
        students.append((weights(student), trainer.state.log_history))
    live, asked = students
    for name, value in live[0].items():
        torch.testing.assert_close(asked[0][name], value, rtol=1e-5, atol=1e-7)
    measured = [next(row for row in log if "eval_teacher_agreement" in row) for _, log in students]
    assert measured[1]["eval_teacher_agreement"] == measured[0]["eval_teacher_agreement"]
    assert measured[1]["eval_divergence"] == pytest.approx(measured[0]["eval_divergence"], rel=1e-5)
    folder = tmp_path / "ServedTeacher"
    written = [path for path in folder.rglob("*") if path.is_file()]
    assert {"README.md", "trainer_state.json"} <= {path.name for path in written}
    held = [caplog.text.encode(), *(path.read_bytes() for path in written)]
    for secret in (SECRET, "TEACHER_KEY", "127.0.0.1", str(server.port)):
        assert not any(secret.encode() in one for one in held)
