"""Names that may be shown in public: a Hub id, and a text without local paths. Asks no Hub."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from numbers import Real
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_distill.errors import SettingError

HIDDEN_PATH = "(local path)"
# Absolute, home and dot paths; not URLs ("https://a/b"), not names ("loss/labels", "org/model").
_PATH = re.compile(
    r"file://[^\s'\"`)|,;]+"
    r"|(?<![\w./])(?:(?:~[A-Za-z_]?\w*|\.\.?)/|/(?=[A-Za-z_.]))[^\s'\"`)|,;]*"
    r"|\b[A-Za-z]:\\[^\s'\"`)|,;]+"
)
_WHOLE_PATH = re.compile(r"/(?=[A-Za-z_.])|~[A-Za-z_/]|\.\.?[/\\]|[A-Za-z]:[/\\]|\\\\|file://")


def is_path(text: str) -> bool:
    """True for a text that is spelled as a path: absolute, from home, from a dot, or a drive."""
    return text in ("~", ".", "..") or _WHOLE_PATH.match(text) is not None


def has_hub_spelling(name: object) -> bool:
    """True for `name` or `org/name` with the letters that the Hub allows."""
    if not isinstance(name, str) or not name or name.startswith((".", "~")):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def looks_like_hub_id(name: object) -> bool:
    """True for a name in the Hub's spelling, when no file or folder here is so called.

    >>> looks_like_hub_id("google-bert/bert-base-uncased"), looks_like_hub_id("~/student")
    (True, False)
    """
    return has_hub_spelling(name) and not os.path.exists(str(name))


def without_paths(text: str) -> str:
    """The text with each local path in it replaced.

    >>> without_paths("loss/labels from /home/me/run"), without_paths("see https://hf.co/a/b")
    ('loss/labels from (local path)', 'see https://hf.co/a/b')
    """
    if is_path(text):
        return HIDDEN_PATH
    return _PATH.sub(HIDDEN_PATH, text)


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
class CardData(_Facts):
    """All that the model card says. See each field; give only what is known.

    >>> facts = CardData(name="small", task="classification", student=ModelFacts(parameters=9))
    >>> CardData.from_json(facts.to_json()) == facts
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
    def from_json(cls, text: str) -> CardData:
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
                f"card data: not what CardData.to_json writes ({error}). Write them again with it."
            ) from error


def _evaluation(raw: dict[str, Any]) -> EvaluationFacts:
    dataset = raw.get("dataset")
    return EvaluationFacts(**{**raw, "dataset": DatasetFacts(**dataset) if dataset else None})


_VERSIONED = ("hf-distill", "transformers", "torch", "accelerate", "datasets", "tokenizers", "peft")
_NOT_METRICS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


def model_facts(model: Any, *, hub_id: str | None = None) -> ModelFacts:
    """Facts of a `PreTrainedModel` or `PeftModel`. `hub_id` is shown only if it is one."""
    adapter = getattr(model, "peft_config", None) if hasattr(model, "get_base_model") else None
    inner = model.get_base_model() if adapter else model
    config = getattr(inner, "config", None)
    # ZeRO-3 keeps the whole size in ds_numel.
    sizes = [(getattr(p, "ds_numel", 0) or p.numel(), p.requires_grad) for p in model.parameters()]
    dtype = getattr(inner, "dtype", None)
    method = next(iter(adapter.values())).peft_type if adapter else None
    return ModelFacts(
        hub_id=hub_id,
        class_name=type(inner).__name__,
        parameters=sum(size for size, _ in sizes),
        trainable_parameters=sum(size for size, trained in sizes if trained),
        layers=_whole(getattr(config, "num_hidden_layers", None)),
        width=_whole(getattr(config, "hidden_size", None)),
        labels=_whole(getattr(config, "num_labels", None)),
        problem_type=getattr(config, "problem_type", None),
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        main_input=getattr(inner, "main_input_name", "input_ids"),
        adapter=None if method is None else str(getattr(method, "value", method)),
    )


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def dataset_facts(dataset: Any, *, name: str | None = None) -> DatasetFacts | None:
    """Facts of a `datasets.Dataset`; None for other datasets unless `name` is given."""
    info = getattr(dataset, "info", None)
    hub_id = None
    for source in getattr(info, "download_checksums", None) or ():
        found = re.match(r"hf://datasets/([^@]+)@", str(source))
        hub_id = hub_id or (found.group(1) if found else None)
    shown = name or hub_id
    if shown is None:
        return None
    config = getattr(info, "config_name", None) if hub_id else None
    split = getattr(dataset, "split", None)
    return DatasetFacts(shown, hub_id, config, None if split is None else str(split))


def evaluations_from_log(
    log_history: Iterable[Mapping[str, Any]],
    datasets: Mapping[str, DatasetFacts | None] | DatasetFacts | None = None,
    *,
    best_step: int | None = None,
    prefix: str = "eval_",
) -> tuple[EvaluationFacts, ...]:
    """The evaluation of each dataset that describes the saved weights best, from a Trainer's log.

    That is the last one after training; else the one at `best_step`; else the last.
    `datasets`: of the one eval dataset, or name -> facts where `eval_dataset` is a dict.
    `best_step`: `state.best_global_step`, once `load_best_model_at_end` put those weights back.
    """
    log = list(log_history)
    ended = max((i for i, row in enumerate(log) if "train_runtime" in row), default=len(log))
    named = datasets if isinstance(datasets, Mapping) else {"": datasets}
    starts = {f"{prefix}{name}_" if name else prefix: name for name in named}
    found = []
    for start, name in starts.items():
        rows = [(i, row) for i, row in enumerate(log) if _owner(row, starts) == start]
        if not rows:
            continue
        at_best = [pair for pair in rows if best_step is not None and pair[1].get("step") == best_step]
        after = [pair for pair in rows if pair[0] > ended]
        index, row = (after or at_best or rows)[-1]
        step = best_step if index > ended and best_step is not None else row.get("step")
        metrics, missing = _numbers(row, start)
        found.append(EvaluationFacts(metrics, named[name], step, not_measured=missing))
    return tuple(found)


def _owner(row: Mapping[str, Any], starts: Iterable[str]) -> str | None:
    """The longest of the starts that a key of the row has: `eval_a_b_` before `eval_a_`."""
    fitting = [start for start in starts if any(key.startswith(start) for key in row)]
    return max(fitting, key=len, default=None)


def _numbers(row: Mapping[str, Any], start: str) -> tuple[dict[str, float], dict[str, str]]:
    metrics: dict[str, float] = {}
    missing: dict[str, str] = {}
    for key, value in row.items():
        name = key.removeprefix(start)
        if not key.startswith(start) or name in _NOT_METRICS:
            continue
        if isinstance(value, bool) or not isinstance(value, Real):
            missing[name] = "not a single number"
        elif not math.isfinite(value):
            missing[name] = f"it was {float(value)}"
        else:
            metrics[name] = float(value)
    return metrics, missing


def history_from_log(log_history: Iterable[Mapping[str, Any]]) -> tuple[dict[str, float], ...]:
    """One row an evaluation during training: epoch, step, the last logged losses, the metrics."""
    rows: list[dict[str, float]] = []
    losses: dict[str, float] = {}
    for entry in log_history:
        if "train_runtime" in entry:
            break
        if not any(key.startswith("eval_") for key in entry):
            logged, _ = _numbers(entry, "")
            losses = {k: v for k, v in logged.items() if k == "loss" or k.startswith("loss/")}
            continue
        metrics, _ = _numbers(entry, "eval_")
        place = {key: entry[key] for key in ("epoch", "step") if key in entry}
        measured = {f"eval_{key}": value for key, value in metrics.items()}
        if rows and rows[-1].get("step") == place.get("step"):
            rows[-1].update(measured)
        else:
            rows.append({**place, **losses, **measured})
    return tuple(rows)


def training_facts(args: Any, state: Any, *, optimizer: str | None = None) -> TrainingFacts:
    """Facts from `TrainingArguments` and `TrainerState`: what ran, not what was asked for.

    `optimizer`: its name where the user passed one; else `args.optim`.
    """
    finished = [row["train_loss"] for row in state.log_history if "train_loss" in row]
    precision = "bf16 mixed" if args.bf16 else "fp16 mixed" if args.fp16 else None
    return TrainingFacts(
        epochs=state.epoch,
        steps=state.global_step,
        learning_rate=args.learning_rate,
        learning_rate_schedule=_text(args.lr_scheduler_type),
        warmup=args.warmup_steps or None,
        optimizer=optimizer or _text(args.optim),
        weight_decay=args.weight_decay,
        max_grad_norm=args.max_grad_norm,
        batch_size=args.train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        processes=args.world_size,
        precision=precision,
        seed=args.seed,
        label_smoothing=args.label_smoothing_factor or None,
        train_loss=finished[-1] if finished and math.isfinite(finished[-1]) else None,
    )


def _text(value: Any) -> str | None:
    return None if value is None else str(getattr(value, "value", value))


def library_versions() -> dict[str, str]:
    """Versions of the libraries that are installed and matter to the run."""
    found = {}
    for name in _VERSIONED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


__all__ = [
    "CardData",
    "DatasetFacts",
    "EvaluationFacts",
    "ModelFacts",
    "ScheduleFacts",
    "TrainingFacts",
    "dataset_facts",
    "evaluations_from_log",
    "history_from_log",
    "library_versions",
    "looks_like_hub_id",
    "model_facts",
    "training_facts",
    "without_paths",
]
