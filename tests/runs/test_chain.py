"""Chains: the teacher and the start of each link, the report, the kept student, generations and their ensemble."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertForSequenceClassification

from hf_distill import Distiller, HiddenMatch
from hf_distill.presets import Stage
from hf_distill.runs import Chain, ChainResult, Link, LinkResult
from hf_distill.students import inherit
from tests.runs.tiny_chain import accuracy, links, run, student, teacher
from tests.trainer.tiny import assert_moved, assert_same_bits, bert, examples, padded, softened_kl, weights


def saved(folder: Path | str) -> Any:
    return BertForSequenceClassification.from_pretrained(folder).eval()


def logits_of(model: Any) -> torch.Tensor:
    batch = padded(examples(12))
    with torch.no_grad():
        return model.eval()(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits


def test_each_link_has_a_folder_with_a_student_of_its_size(whole) -> None:
    folder, result = whole["folder"], whole["result"]
    assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == ["1-assistant", "2-half", "3-student"]
    assert [saved(one.folder).config.num_hidden_layers for one in result.links] == [2, 1, 1]
    assert [one.parameters for one in result.links] == [saved(one.folder).num_parameters() for one in result.links]
    assert [(one.name, one.teacher) for one in result.links] == [
        ("assistant", "BertForSequenceClassification"), ("half", "assistant"), ("student", "half"),
    ]  # fmt: skip
    assert not list(folder.rglob("*.partial"))


def test_the_metrics_are_those_of_the_saved_students(whole) -> None:
    labels = torch.tensor([example["labels"] for example in examples(12)])
    for one in whole["result"].links:
        logits = logits_of(saved(one.folder))
        assert one.metrics["eval_accuracy"] == pytest.approx(float((logits.argmax(-1) == labels).float().mean()))
        loss = torch.nn.functional.cross_entropy(logits, labels)
        assert one.metrics["eval_loss"] == pytest.approx(float(loss), abs=1e-5)
        assert one.seconds > 0 and one.not_measured == {} and one.how == "trained"


def test_the_previous_student_is_the_teacher(tmp_path) -> None:
    """One step on one batch: the logged divergence is from the student before, not from the teacher of the run."""
    two = [Link("assistant", lambda: student(2)), Link("student", lambda: student(1))]
    data = examples(4)
    settings = {"max_steps": 1, "alpha": 1.0, "temperature": 3.0, "save_strategy": "no"}
    start = [bert(seed=11, num_hidden_layers=2), bert(seed=12)]
    two = [Link("assistant", start[0]), Link("student", start[1])]
    before = [weights(model) for model in start]
    result = run(tmp_path, Chain(two), settings=settings, train_dataset=data)
    batch = {name: value for name, value in padded(data).items() if name != "labels"}
    first = bert(seed=12)
    first.load_state_dict(before[1])
    with torch.no_grad():
        ours, theirs = first.eval()(**batch).logits, saved(result.links[0].folder)(**batch).logits
        far = teacher().eval()(**batch).logits
    log = json.loads((Path(result.links[1].folder) / "1-training" / "finished.json").read_text())["log_history"]
    expected = softened_kl(ours, theirs, 3.0).mean()
    assert log[0]["loss"] == pytest.approx(float(expected), rel=1e-4)
    assert abs(float(softened_kl(ours, far, 3.0).mean()) - float(expected)) > 1e-2


def test_a_student_can_start_as_a_part_of_its_teacher(tmp_path) -> None:
    """Progressive distillation with a learning rate of 0: the saved student is the initial student."""
    settings = {"max_steps": 1, "learning_rate": 0.0, "save_strategy": "no"}
    listed = [
        Link("two", lambda teacher: inherit(teacher, layers=[0, 2])),
        Link("one", lambda teacher: inherit(teacher, layers=[1])),
    ]
    given = teacher()
    result = run(tmp_path, Chain(listed), settings=settings, teacher_model=given)
    whole, two, one = given.state_dict(), saved(result.links[0].folder), saved(result.links[1].folder)
    name = "bert.encoder.layer.{}.output.dense.weight"
    torch.testing.assert_close(two.state_dict()[name.format(1)], whole[name.format(2)])
    torch.testing.assert_close(one.state_dict()[name.format(0)], whole[name.format(2)])


def test_a_link_may_have_stages_and_objectives(tmp_path) -> None:
    settings = {"max_steps": 1, "save_strategy": "no"}
    inside = Stage("inside", [HiddenMatch()], {"alpha": None})
    listed = [
        Link("staged", lambda: student(1), {"learning_rate": 0.01}, stages=[inside, Stage("logits")]),
        Link("matched", lambda: student(1), objectives=[HiddenMatch()]),
    ]
    result = run(tmp_path, Chain(listed), settings=settings)
    assert sorted(p.name for p in Path(result.links[0].folder).iterdir() if p.is_dir()) == ["1-inside", "2-logits"]

    def logged(link: int, stage: str) -> dict[str, Any]:
        return json.loads((Path(result.links[link].folder) / stage / "finished.json").read_text())["log_history"][0]

    assert "loss/hidden" in logged(0, "1-inside") and "loss/logits" not in logged(0, "1-inside")
    assert "loss/hidden" not in logged(0, "2-logits")
    assert logged(0, "2-logits")["learning_rate"] == pytest.approx(0.01)
    assert {"loss/hidden", "loss/logits", "loss/labels"} <= set(logged(1, "1-training"))


# The report, and the kept student.


def test_the_report_is_in_the_folder_and_printed(tmp_path, capsys) -> None:
    result = run(tmp_path, Chain(links()[:2], keep="last"), settings={"max_steps": 1})
    folder = tmp_path / "out"
    printed = capsys.readouterr().out
    assert result.sentence() in printed.replace("\n", " ").replace("  ", " ") or result.kept in printed
    report = (folder / "report.md").read_text()
    assert report == f"# chain\n\n{result.markdown()}"
    row = next(line for line in report.splitlines() if line.startswith("| half"))
    one = result.links[1]
    accuracy_ = f"{one.metrics['eval_accuracy']:.4f}"
    assert row == f"| half | assistant | {one.parameters:,} | {accuracy_} | {one.seconds:.1f} |"
    raw = json.loads((folder / "report.json").read_text())
    assert raw["kept"] == "half" and raw["links"][1]["metrics"] == one.metrics


def of(name: str, parameters: int, value: float, metric: str = "accuracy") -> LinkResult:
    return LinkResult(name, "teacher", f"out/{name}", parameters, {f"eval_{metric}": value})


@pytest.mark.parametrize(
    ("keep", "values", "sizes", "best", "kept", "words"),
    [
        ("best", [0.7, 0.9, 0.8], [10, 10, 10], "b", "b", "Best by accuracy: b. Kept in out: b."),
        ("best", [0.9, 0.7, 0.8], [20, 10, 10], "a", "c", "Kept in out: c (a is larger than the last student)."),
        ("best", [0.9, 0.7, 0.6], [20, 15, 10], "a", "c", "(a is larger than the last student)."),
        ("best", [float("nan"), 0.1, 0.1], [10, 10, 10], "b", "b", "Best by accuracy: b."),
        ("last", [0.7, 0.9, 0.8], [10, 10, 10], "b", "c", "Best by accuracy: b. Kept in out: c (keep='last')."),
    ],
)  # fmt: skip
def test_the_best_and_the_kept_student(tmp_path, monkeypatch, keep, values, sizes, best, kept, words) -> None:
    import hf_distill.runs.chain as module

    results = iter([of(*one) for one in zip("abc", sizes, values, strict=True)])
    copies: list[str] = []
    monkeypatch.setattr(module, "_train", lambda *given, **named: next(results))
    monkeypatch.setattr(module, "copied", lambda source, target: copies.append(source))
    chain = Chain([Link(name, lambda: student(1)) for name in "abc"], keep=keep)
    result = run(tmp_path, chain)
    assert (result.best, result.kept) == (best, kept)
    assert words in result.sentence().replace(str(tmp_path / "out"), "out")
    assert [Path(one).parts[-3:] for one in copies] == [(f"{'abc'.index(kept) + 1}-{kept}", "1-training", "student")]


def test_less_of_a_loss_is_better() -> None:
    from hf_distill.runs.results import best_of

    listed = [of("a", 1, 0.9, "loss"), of("b", 1, 0.2, "loss"), of("c", 1, float("nan"), "loss")]
    assert best_of(listed, "loss", greater_is_better=False).name == "b"
    assert best_of(listed, "loss", greater_is_better=True).name == "a"


def test_the_output_folder_holds_the_kept_student_without_its_training_state(whole) -> None:
    folder, result = whole["folder"], whole["result"]
    assert_same_bits(weights(saved(folder)), weights(saved(result.link(result.kept).folder)))
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    assert names == ["config.json", "model.safetensors", "report.json", "report.md"]


def test_without_validation_the_last_student_is_kept(tmp_path) -> None:
    chain = Chain(links()[:2], keep="last")
    settings = {"max_steps": 1, "metric_for_best_model": None}
    result = run(tmp_path, chain, settings=settings, eval_dataset=None, compute_metrics=None)
    assert (result.best, result.kept, result.metric) == (None, "half", None)
    assert "half (the last; the students were not compared: there was no eval_dataset)" in result.sentence()
    assert "- half, `metrics`: there was no eval_dataset." in result.markdown()
    assert result._headings() == ["student", "teacher", "parameters", "seconds"]


def test_the_loss_is_the_default_metric(tmp_path) -> None:
    settings = {"max_steps": 1, "metric_for_best_model": None}
    result = run(tmp_path, Chain(links()[1:]), settings=settings, compute_metrics=None)
    losses = {one.name: one.metrics["eval_loss"] for one in result.links}
    assert result.metric == "loss" and losses[result.best] == min(losses.values())


# Generations.


def test_generations_have_their_own_weights_and_form_an_ensemble(tmp_path) -> None:
    chain = Chain.generations(lambda: student(1), 3, arguments={"alpha": 0.7})
    assert [link.arguments for link in chain.links] == [{"alpha": 0.7}] * 3
    settings = {"max_steps": 1, "learning_rate": 0.0, "save_strategy": "no"}
    result = run(tmp_path, chain, settings=settings)
    assert [one.name for one in result.links] == ["generation-1", "generation-2", "generation-3"]
    born = [weights(saved(one.folder)) for one in result.links]
    for one, other in pairwise(born):
        assert_moved(one, other)  # another seed each
    ensemble = result.ensemble()
    distiller = Distiller(student(1), ensemble, alpha=1.0, temperature=2.0)
    batch = padded(examples(12))
    mean = sum((logits_of(saved(one.folder)) / 2).softmax(-1) for one in result.links) / 3
    torch.testing.assert_close((distiller.teacher_signals(batch).predictions() / 2).softmax(-1), mean)


def test_making_a_student_does_not_change_the_random_state(tmp_path) -> None:
    link = Link("one", lambda: student(1))
    torch.manual_seed(3)
    expected = torch.rand(())
    torch.manual_seed(3)
    made = [link.make_model(None, teacher_kind=None, seed=seed) for seed in (5, 5, 6)]
    assert torch.rand(()) == expected
    assert_same_bits(weights(made[0]), weights(made[1]))
    assert_moved(weights(made[0]), weights(made[2]))


def test_the_result_gives_the_reason_for_missing_values() -> None:
    why = {"seconds": "the training was interrupted, and the time before the interruption is not known"}
    one = LinkResult("a", "t", "out/1-a", 5, {"eval_loss": 0.5}, None, "resumed", "classification", why)
    text = str(ChainResult((one,), "out", "loss", False, "a", "a"))
    assert "| a | t | 5 | 0.5000 | - |" in text
    assert text.endswith(
        "- a, `seconds`: the training was interrupted, and the time before the interruption is not known."
    )


def test_the_accuracy_of_these_tests_is_correct() -> None:
    import numpy as np
    from transformers import EvalPrediction

    assert accuracy(EvalPrediction(np.eye(3), np.array([0, 1, 0]))) == {"accuracy": pytest.approx(2 / 3)}
