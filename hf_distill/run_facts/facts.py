"""What one distillation run was: frozen dataclasses with a JSON round trip. Renders nothing.

What is unknown is None, never a guess. Building an object takes local paths out of every text.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from hf_distill.errors import SettingError
from hf_distill.run_facts.names import has_hub_spelling, is_path, looks_like_hub_id, without_paths


def _clean(value: Any) -> Any:
    """Plain JSON-like data without local paths; containers are copied, lists become tuples."""
    if isinstance(value, str):
        return without_paths(value)
    if isinstance(value, Mapping):
        return {_clean(str(key)): _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_clean(item) for item in value)
    return value


@dataclass(frozen=True)
class _Facts:
    """Takes local paths out of every text when an object is built."""

    def __post_init__(self) -> None:
        for item in fields(self):
            object.__setattr__(self, item.name, _clean(getattr(self, item.name)))


@dataclass(frozen=True)
class ModelFacts(_Facts):
    """One model. `hub_id` is None when it is a local model; a path given there becomes None."""

    hub_id: str | None = None
    class_name: str | None = None
    parameters: int | None = None
    trainable_parameters: int | None = None
    layers: int | None = None
    width: int | None = None
    labels: int | None = None
    """`config.num_labels`."""
    dtype: str | None = None
    main_input: str = "input_ids"
    adapter: str | None = None
    """The PEFT method ("LORA"), when what is saved is an adapter."""
    described: str | None = None
    """What it is, in words, when it is no model of its own (an average of the student)."""
    problem_type: str | None = None
    """`config.problem_type`, of a head that predicts labels; transformers sets it at the first labelled step."""

    def __post_init__(self) -> None:
        if not looks_like_hub_id(self.hub_id):
            object.__setattr__(self, "hub_id", None)
        super().__post_init__()


@dataclass(frozen=True)
class DatasetFacts(_Facts):
    """One dataset: the name to show; its Hub id only when it is known to be there."""

    name: str | None = None
    hub_id: str | None = None
    config: str | None = None
    split: str | None = None

    def __post_init__(self) -> None:
        hub_id = self.hub_id if looks_like_hub_id(self.hub_id) else None
        object.__setattr__(self, "hub_id", hub_id)
        name = self.name or hub_id
        local = name is not None and (is_path(name) or (hub_id is None and os.path.exists(name)))
        object.__setattr__(self, "name", "a local dataset" if local else name)
        super().__post_init__()


@dataclass(frozen=True)
class ScheduleFacts(_Facts):
    """A number that may move during training: from `start` to `end` along `schedule`."""

    start: float
    end: float | None = None
    schedule: str = "constant"


@dataclass(frozen=True)
class EvaluationFacts(_Facts):
    """Metrics measured on one dataset. `step`: whose weights were measured; None if not known."""

    metrics: dict[str, float] = field(default_factory=dict)
    dataset: DatasetFacts | None = None
    step: int | None = None
    subject: str = "student"
    """Who was measured: "student", "teacher", "student alone" (the baseline), ..."""
    not_measured: dict[str, str] = field(default_factory=dict)
    """Metric name -> why it has no number."""


@dataclass(frozen=True)
class TrainingFacts(_Facts):
    """How the student was trained. `steps` are optimizer steps; `batch_size` is per process."""

    epochs: float | None = None
    steps: int | None = None
    learning_rate: float | None = None
    learning_rate_schedule: str | None = None
    warmup: float | None = None
    """Steps, or a share of the run when below 1."""
    optimizer: str | None = None
    weight_decay: float | None = None
    max_grad_norm: float | None = None
    batch_size: int | None = None
    accumulation: int | None = None
    processes: int | None = None
    precision: str | None = None
    """ "bf16 mixed", "fp16 mixed"; None: the student's own dtype."""
    seed: int | None = None
    label_smoothing: float | None = None
    """None when the labels are not smoothed."""
    train_loss: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    """More settings to show: name -> a JSON value."""


@dataclass(frozen=True)
class RunFacts(_Facts):
    """All that the model card says. See each field; give only what is known.

    >>> facts = RunFacts(name="small", task="classification", student=ModelFacts(parameters=9))
    >>> RunFacts.from_json(facts.to_json()) == facts
    True
    """

    name: str
    """The title: the repository's last part, or the output folder's own name."""
    task: str
    """A kind in `hf_distill.tasks.TASKS`."""
    student: ModelFacts
    repo_id: str | None = None
    """The Hub repository the student is pushed to, `user/name`, once it is known."""
    teachers: tuple[ModelFacts, ...] = ()
    """Empty when no teacher ran (alpha = 0)."""
    joined: str | None = None
    """How several teachers speak as one."""
    base_model: str | None = None
    """The Hub id of what the student was fine-tuned from; a path becomes None."""
    processor: str | None = None
    """Class name of the processing class that is saved beside the student."""
    pooling: str | None = None
    """How the last hidden states became an embedding: "mean", "first" or "last"; None for other tasks."""
    divergence: str | None = None
    divergence_kwargs: dict[str, Any] = field(default_factory=dict)
    temperature: ScheduleFacts | None = None
    """None where it has no effect: `not PROPERTIES[name].softens`."""
    temperature_power: int = 2
    """The power of the temperature before the divergence: `PROPERTIES[name].temperature_power`."""
    alpha: ScheduleFacts | None = None
    objectives: dict[str, float | None] = field(default_factory=dict)
    """Name -> weight; None for `labels` and `logits`, whose weights alpha gives."""
    objective_settings: dict[str, str] = field(default_factory=dict)
    """Name -> how it was made, in words."""
    datasets: tuple[DatasetFacts, ...] = ()
    """What it was trained on."""
    evaluations: tuple[EvaluationFacts, ...] = ()
    weights_step: int | None = None
    """The optimizer step whose weights are saved (the best one's, if that was loaded)."""
    history: tuple[dict[str, float], ...] = ()
    """One row an evaluation during training; see `history_from_log`."""
    training: TrainingFacts = field(default_factory=TrainingFacts)
    versions: dict[str, str] = field(default_factory=dict)
    languages: tuple[str, ...] = ()
    license: str | None = None
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not looks_like_hub_id(self.base_model):
            object.__setattr__(self, "base_model", None)
        if not has_hub_spelling(self.repo_id):
            object.__setattr__(self, "repo_id", None)
        name = re.split(r"[/\\]", self.name.rstrip("/\\"))[-1] or "student"
        object.__setattr__(self, "name", name)
        super().__post_init__()

    def to_json(self) -> str:
        """The facts as JSON text."""
        return json.dumps(asdict(self), indent=2, allow_nan=False, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> RunFacts:
        """The facts that `to_json` wrote; `SettingError` when the text is not that."""
        try:
            raw = json.loads(text)
            raw["student"] = ModelFacts(**raw["student"])
            raw["teachers"] = tuple(ModelFacts(**item) for item in raw.get("teachers", ()))
            raw["datasets"] = tuple(DatasetFacts(**item) for item in raw.get("datasets", ()))
            raw["training"] = TrainingFacts(**raw.get("training", {}))
            for name in ("temperature", "alpha"):
                raw[name] = ScheduleFacts(**raw[name]) if raw.get(name) else None
            raw["evaluations"] = tuple(map(_evaluation, raw.get("evaluations", ())))
            return cls(**raw)
        except (ValueError, TypeError, KeyError) as error:
            raise SettingError(
                f"run facts: not what RunFacts.to_json writes ({error}). Write them again with it."
            ) from error


def _evaluation(raw: dict[str, Any]) -> EvaluationFacts:
    dataset = raw.get("dataset")
    return EvaluationFacts(**{**raw, "dataset": DatasetFacts(**dataset) if dataset else None})
