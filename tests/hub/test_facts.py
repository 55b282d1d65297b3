"""Facts: the JSON round trip, names that may be shown, and evaluations in a Trainer's log."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from hf_distill.errors import SettingError
from hf_distill.hub import facts as facts_module
from hf_distill.hub.facts import (
    CardData,
    DatasetFacts,
    ModelFacts,
    TrainingFacts,
    dataset_facts,
    evaluations_from_log,
    history_from_log,
    looks_like_hub_id,
    model_facts,
    training_facts,
    without_paths,
)
from tests.hub.sample_facts import TEACHER, sample_facts

PATHS = ["/home/me/x", "~/x", "~", "./x", "../x", "C:\\me\\x", "file:///home/me", "/srv", "."]


def test_json_round_trip() -> None:
    facts = sample_facts()
    assert CardData.from_json(facts.to_json()) == facts


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"name": 1', '{"name": "a", "nme": 2}'])
def test_other_json_is_rejected(text: str) -> None:
    with pytest.raises(SettingError, match=r"was not written by CardData\.to_json"):
        CardData.from_json(text)


@pytest.mark.parametrize("path", PATHS)
def test_a_path_is_not_a_hub_id_and_never_shown(path: str) -> None:
    assert not looks_like_hub_id(path)
    assert without_paths(path) == "(local path)"
    assert without_paths(f"run '{path}' now") == "run '(local path)' now" or path in ("~", ".")
    assert ModelFacts(hub_id=path).hub_id is None
    assert DatasetFacts(path, path) == DatasetFacts("a local dataset")


@pytest.mark.parametrize(
    "text", ["loss/labels", "org/model", "https://hf.co/a/b", "1/2", "a and/or b", "T / 2", "~2 h"]
)
def test_other_texts_are_unchanged(text: str) -> None:
    assert without_paths(text) == text


def test_an_existing_folder_is_not_a_hub_id(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert looks_like_hub_id("out/teacher")
    (tmp_path / "out" / "teacher").mkdir(parents=True)
    assert not looks_like_hub_id("out/teacher")
    assert ModelFacts(hub_id="out/teacher").hub_id is None
    assert sample_facts(base_model="out/teacher").base_model is None
    assert DatasetFacts("out/teacher").name == "a local dataset"
    assert sample_facts(repo_id="out/teacher").repo_id == "out/teacher"  # where it is pushed to


@pytest.mark.parametrize("name", [None, "", 3, "a/b/c", "a//b", "-a", "a b", "a.git", "x" * 100])
def test_not_in_the_hubs_spelling(name: object) -> None:
    assert not looks_like_hub_id(name)


def test_the_title_is_not_a_path() -> None:
    assert sample_facts(name="/home/me/runs/small/").name == "small"
    assert sample_facts(name="C:\\runs\\small").name == "small"
    assert sample_facts(name="").name == "student"


class Weights(SimpleNamespace):
    def numel(self) -> int:
        return self.size


def test_model_facts_of_a_sharded_model_count_the_whole() -> None:
    class Sharded:
        config = SimpleNamespace(num_hidden_layers=2, hidden_size=8, num_labels=3)
        main_input_name = "input_values"
        dtype = "torch.bfloat16"

        def parameters(self) -> list[Weights]:
            whole = Weights(size=0, ds_numel=30, requires_grad=True)
            return [whole, Weights(size=5, requires_grad=False)]

    assert model_facts(Sharded(), hub_id="/home/me/model") == ModelFacts(
        None, "Sharded", 35, 30, 2, 8, 3, "bfloat16", "input_values"
    )


def test_dataset_facts_find_the_hub_id() -> None:
    info = SimpleNamespace(
        config_name="sst2",
        download_checksums={"hf://datasets/nyu-mll/glue@abc/sst2/train.parquet": {}},
    )
    found = dataset_facts(SimpleNamespace(info=info, split="train"))
    assert found == DatasetFacts("nyu-mll/glue", "nyu-mll/glue", "sst2", "train")


def test_dataset_facts_of_local_and_unknown_datasets() -> None:
    assert dataset_facts([1, 2]) is None
    assert dataset_facts([1, 2], name="my phrases") == DatasetFacts("my phrases")
    info = SimpleNamespace(config_name="default", download_checksums={"/home/me/a.csv": {}})
    assert dataset_facts(SimpleNamespace(info=info, split=None)) is None


LOG = [
    {"loss": 0.9, "loss/labels": 0.8, "loss/logits": 1.0, "grad_norm": 1.0, "step": 5},
    {"eval_loss": 0.7, "eval_accuracy": 0.9, "eval_runtime": 1.0, "epoch": 1.0, "step": 5},
    {"loss": 0.6, "step": 10},
    {"eval_loss": 0.8, "eval_accuracy": 0.8, "eval_runtime": 1.0, "epoch": 2.0, "step": 10},
    {"train_runtime": 9.0, "train_loss": 0.75, "step": 10},
]


def test_the_last_evaluation_is_found_with_its_step() -> None:
    (found,) = evaluations_from_log(LOG, DatasetFacts("words"))
    assert found.metrics == {"loss": 0.8, "accuracy": 0.8}
    assert (found.step, found.dataset) == (10, DatasetFacts("words"))


def test_the_best_steps_evaluation_describes_the_best_weights() -> None:
    (found,) = evaluations_from_log(LOG, best_step=5)
    assert (found.metrics["accuracy"], found.step) == (0.9, 5)


def test_an_evaluation_after_training_is_preferred_and_describes_the_loaded_weights() -> None:
    after = {"eval_accuracy": 0.91, "step": 10}
    (found,) = evaluations_from_log([*LOG, after], best_step=5)
    assert (found.metrics["accuracy"], found.step) == (0.91, 5)
    (found,) = evaluations_from_log([*LOG, after])
    assert (found.metrics["accuracy"], found.step) == (0.91, 10)


def test_several_evaluation_datasets_are_kept_apart() -> None:
    log = [{"eval_a_loss": 1.0, "step": 1}, {"eval_a_b_loss": 2.0, "step": 1}]
    found = evaluations_from_log(log, {"a": None, "a_b": DatasetFacts("both"), "c": None})
    assert [(e.metrics, e.dataset) for e in found] == [
        ({"loss": 1.0}, None),
        ({"loss": 2.0}, DatasetFacts("both")),
    ]


def test_metrics_that_are_not_numbers_have_a_reason() -> None:
    row = {"eval_loss": float("nan"), "eval_table": [[1, 2]], "eval_ok": True, "eval_f1": 1}
    (found,) = evaluations_from_log([row])
    assert found.metrics == {"f1": 1.0}
    not_single = "not a single number"
    assert found.not_measured == {"loss": "it was nan", "table": not_single, "ok": not_single}


def test_a_log_without_evaluations_gives_no_facts() -> None:
    assert evaluations_from_log([{"loss": 1.0}]) == ()
    assert history_from_log([{"loss": 1.0}]) == ()


def test_history_has_one_row_an_evaluation() -> None:
    assert history_from_log([*LOG, {"eval_accuracy": 0.9}]) == (
        {"epoch": 1.0, "step": 5, "loss": 0.9, "loss/labels": 0.8, "loss/logits": 1.0,
         "eval_loss": 0.7, "eval_accuracy": 0.9},
        {"epoch": 2.0, "step": 10, "loss": 0.6, "eval_loss": 0.8, "eval_accuracy": 0.8},
    )  # fmt: skip


def test_training_facts_of_real_arguments(tmp_path) -> None:
    from transformers import TrainerState, TrainingArguments

    args = TrainingArguments(
        output_dir=str(tmp_path), learning_rate=1e-4, seed=3, optim="sgd", use_cpu=True,
        per_device_train_batch_size=4, gradient_accumulation_steps=2, warmup_steps=5,
    )  # fmt: skip
    state = TrainerState(epoch=1.5, global_step=10, log_history=LOG)
    assert training_facts(args, state) == TrainingFacts(
        epochs=1.5, steps=10, learning_rate=1e-4, learning_rate_schedule="linear", warmup=5,
        optimizer="sgd", weight_decay=0.0, max_grad_norm=1.0, batch_size=4, accumulation=2,
        processes=1, seed=3, train_loss=0.75,
    )  # fmt: skip


def test_facts_import_neither_torch_nor_the_rest_of_the_library() -> None:
    imported = set()
    for node in ast.walk(ast.parse(Path(facts_module.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            imported.add(str(node.module))
        elif isinstance(node, ast.Import):
            imported.update(alias.name for alias in node.names)
    foreign = {name for name in imported if name.split(".")[0] not in sys.stdlib_module_names}
    assert foreign == {"hf_distill.errors", "huggingface_hub.errors", "huggingface_hub.utils"}


def test_facts_are_frozen() -> None:
    with pytest.raises(AttributeError):
        TEACHER.parameters = 1  # type: ignore[misc]  # this must fail
