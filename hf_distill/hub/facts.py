"""The facts of a run as plain data, without local paths, for its model card. Imports no other part but errors."""

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
    """Return whether a text is spelled as a path: absolute, from home, from a dot, or with a drive."""
    return text in ("~", ".", "..") or _WHOLE_PATH.match(text) is not None


def has_hub_spelling(name: object) -> bool:
    """Return whether a name is `name` or `org/name` with the letters that the Hub allows."""
    if not isinstance(name, str) or not name or name.startswith((".", "~")):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def looks_like_hub_id(name: object) -> bool:
    """Return whether a name has the Hub's spelling and no file or folder here has that name.

    >>> looks_like_hub_id("google-bert/bert-base-uncased"), looks_like_hub_id("~/student")
    (True, False)
    """
    return has_hub_spelling(name) and not os.path.exists(str(name))


def without_paths(text: str) -> str:
    """Return the text with each local path in it replaced.

    >>> without_paths("loss/labels from /home/me/run"), without_paths("see https://hf.co/a/b")
    ('loss/labels from (local path)', 'see https://hf.co/a/b')
    """
    return HIDDEN_PATH if is_path(text) else _PATH.sub(HIDDEN_PATH, text)


def _clean(value: Any) -> Any:
    """Return JSON-like data without local paths; containers are copied, and lists become tuples."""
    match value:
        case str():
            return without_paths(value)
        case Mapping():
            return {_clean(str(key)): _clean(item) for key, item in value.items()}
        case list() | tuple():
            return tuple(map(_clean, value))
    return value


@dataclass(frozen=True)
class _Facts:
    """Removes local paths from every text when an object is built."""

    def __post_init__(self) -> None:
        for item in fields(self):
            object.__setattr__(self, item.name, _clean(getattr(self, item.name)))


@dataclass(frozen=True)
class ModelFacts(_Facts):
    """The facts of a model; everything but `main_input` may be unknown."""

    hub_id: str | None = None  # None for a local model; a path becomes None
    class_name: str | None = None
    parameters: int | None = None
    trainable_parameters: int | None = None
    layers: int | None = None
    width: int | None = None
    labels: int | None = None  # `config.num_labels`
    dtype: str | None = None  # "float32"
    main_input: str = "input_ids"
    adapter: str | None = None  # the PEFT method ("LORA") if an adapter is saved
    description: str | None = None  # in words, of a teacher that is not a model (an average of the student)
    problem_type: str | None = None  # of a head with labels; transformers sets it at the first labelled step
    paper: str | None = None  # of a teacher: the citation key of its method's paper, or a BibTeX entry

    def __post_init__(self) -> None:
        if not looks_like_hub_id(self.hub_id):
            object.__setattr__(self, "hub_id", None)
        super().__post_init__()


@dataclass(frozen=True)
class DatasetFacts(_Facts):
    """The facts of a dataset."""

    name: str | None = None  # the name to show
    hub_id: str | None = None  # None if it is not known to be on the Hub
    config: str | None = None
    split: str | None = None

    def __post_init__(self) -> None:
        hub_id = self.hub_id if looks_like_hub_id(self.hub_id) else None
        name = self.name or hub_id
        local = name is not None and (is_path(name) or (hub_id is None and os.path.exists(name)))
        object.__setattr__(self, "hub_id", hub_id)
        object.__setattr__(self, "name", "a local dataset" if local else name)
        super().__post_init__()


@dataclass(frozen=True)
class ScheduleFacts(_Facts):
    """A number that may change during training: from `start` to `end` along `schedule`."""

    start: float
    end: float | None = None
    schedule: str = "constant"


@dataclass(frozen=True)
class ObjectiveFacts(_Facts):
    """The facts of a term of the loss; `labels` and `logits` have a name only, since alpha gives their weights."""

    name: str
    weight: float | None = None  # at the start of training
    paper: str | None = None  # the citation key of its paper, or a BibTeX entry
    description: str | None = None  # the objective's settings in words


@dataclass(frozen=True)
class EvaluationFacts(_Facts):
    """The metrics of a model on a dataset."""

    metrics: dict[str, float] = field(default_factory=dict)
    dataset: DatasetFacts | None = None
    step: int | None = None  # the optimizer step whose weights were evaluated
    subject: str = "student"  # "student", "teacher", "student alone" (the baseline), ...
    not_measured: dict[str, str] = field(default_factory=dict)  # the reason for each metric without a number


@dataclass(frozen=True)
class TrainingFacts(_Facts):
    """The settings of the training, and how long it was."""

    epochs: float | None = None
    steps: int | None = None  # optimizer steps
    learning_rate: float | None = None
    learning_rate_schedule: str | None = None
    warmup: float | None = None  # steps, or a share of the run if below 1
    optimizer: str | None = None
    weight_decay: float | None = None
    max_grad_norm: float | None = None
    batch_size: int | None = None  # examples per process and forward
    accumulation: int | None = None  # micro-batches per optimizer step
    processes: int | None = None
    precision: str | None = None  # "bf16 mixed", "fp16 mixed", or None for the student's own dtype
    seed: int | None = None
    label_smoothing: float | None = None  # None without it
    train_loss: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)  # more settings to show, as JSON values


@dataclass(frozen=True)
class CardData(_Facts):
    """The content of a model card. Give only what is known.

    >>> facts = CardData(name="small", task="classification", student=ModelFacts(parameters=9))
    >>> CardData.from_json(facts.to_json()) == facts
    True
    """

    name: str  # the title: the last part of the repository's name, or the output folder's name
    task: str  # a kind in `hf_distill.tasks.TASKS`
    student: ModelFacts
    repo_id: str | None = None  # where the student is pushed to, `user/name`
    teachers: tuple[ModelFacts, ...] = ()  # empty if no teacher ran (alpha = 0)
    ensemble: str | None = None  # how the predictions of several teachers are combined
    base_model: str | None = None  # the Hub id of the model that the student was made from; a path becomes None
    processing_class: str | None = None  # the name of the class that is saved with the student
    pooling: str | None = None  # "mean", "first" or "last" of an embedding's hidden states
    divergence: str | None = None  # None if no predictions were compared
    divergence_kwargs: dict[str, Any] = field(default_factory=dict)
    temperature: ScheduleFacts | None = None  # None if it has no effect (`not PROPERTIES[name].softens`)
    temperature_power: int = 2  # the power of T in front of the divergence
    alpha: ScheduleFacts | None = None
    objectives: tuple[ObjectiveFacts, ...] = ()
    datasets: tuple[DatasetFacts, ...] = ()  # of the training
    evaluations: tuple[EvaluationFacts, ...] = ()
    weights_step: int | None = None  # the step of the saved weights (the best one, if its weights were loaded)
    history: tuple[dict[str, float], ...] = ()  # a row for each evaluation during training; see `history_from_log`
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
        """Return the facts as JSON text."""
        return json.dumps(asdict(self), indent=2, allow_nan=False, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> CardData:
        """Return the facts that `to_json` wrote.

        Raises:
            SettingError: if the text does not come from `to_json`.
        """
        try:
            raw = json.loads(text)
            raw["student"] = ModelFacts(**raw["student"])
            raw["training"] = TrainingFacts(**raw.get("training", {}))
            for name in ("temperature", "alpha"):
                raw[name] = ScheduleFacts(**raw[name]) if raw.get(name) else None
            for evaluation in raw.get("evaluations", ()):
                evaluation["dataset"] = DatasetFacts(**evaluation["dataset"]) if evaluation.get("dataset") else None
            for name, kind in _LISTS.items():
                raw[name] = tuple(kind(**item) for item in raw.get(name, ()))
            return cls(**raw)
        except (ValueError, TypeError, KeyError) as error:
            raise SettingError(f"card data: the text was not written by CardData.to_json ({error}).") from error


_LISTS: dict[str, type[_Facts]] = {
    "teachers": ModelFacts,
    "objectives": ObjectiveFacts,
    "datasets": DatasetFacts,
    "evaluations": EvaluationFacts,
}
_VERSIONED = ("hf-distill", "transformers", "torch", "accelerate", "datasets", "tokenizers", "peft")
_NOT_METRICS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


def model_facts(model: Any, *, hub_id: str | None = None) -> ModelFacts:
    """Return the facts of a `PreTrainedModel` or `PeftModel`.

    Args:
        model: the model.
        hub_id: where it comes from; shown only if it is a Hub id.
    """
    adapter = getattr(model, "peft_config", None) if hasattr(model, "get_base_model") else None
    inner = model.get_base_model() if adapter else model
    # ZeRO-3 keeps the size of the whole parameter in ds_numel.
    sizes = [(getattr(p, "ds_numel", 0) or p.numel(), p.requires_grad) for p in model.parameters()]
    method = next(iter(adapter.values())).peft_type if adapter else None

    def configured(name: str) -> Any:
        return getattr(getattr(inner, "config", None), name, None)

    def count(name: str) -> int | None:
        value = configured(name)
        return value if isinstance(value, int) else None

    return ModelFacts(
        hub_id=hub_id,
        class_name=type(inner).__name__,
        parameters=sum(size for size, _ in sizes),
        trainable_parameters=sum(size for size, trained in sizes if trained),
        layers=count("num_hidden_layers"),
        width=count("hidden_size"),
        labels=count("num_labels"),
        problem_type=configured("problem_type"),
        dtype=str(inner.dtype).removeprefix("torch.") if hasattr(inner, "dtype") else None,
        main_input=getattr(inner, "main_input_name", "input_ids"),
        adapter=_text(method),
    )


def dataset_facts(dataset: Any, *, name: str | None = None) -> DatasetFacts | None:
    """Return the facts of a `datasets.Dataset`; None for other datasets, unless `name` is given."""
    info = getattr(dataset, "info", None)
    sources = getattr(info, "download_checksums", None) or ()
    on_hub = (re.match(r"hf://datasets/([^@]+)@", str(source)) for source in sources)
    hub_id = next((found[1] for found in on_hub if found), None)
    shown = name or hub_id
    if shown is None:
        return None
    config = info.config_name if info is not None and hub_id else None
    split = getattr(dataset, "split", None)
    return DatasetFacts(shown, hub_id, config, None if split is None else str(split))


def evaluations_from_log(
    log_history: Iterable[Mapping[str, Any]],
    datasets: Mapping[str, DatasetFacts | None] | DatasetFacts | None = None,
    *,
    best_step: int | None = None,
    prefix: str = "eval_",
) -> tuple[EvaluationFacts, ...]:
    """Return for each dataset the evaluation that describes the saved weights best, from a Trainer's log.

    That is the last evaluation after training, else that at `best_step`, else the last evaluation.

    Args:
        log_history: `state.log_history`.
        datasets: the facts of the eval dataset, or facts by name if `eval_dataset` is a dict.
        best_step: `state.best_global_step`, if `load_best_model_at_end` restored these weights.
        prefix: the prefix of the metrics.
    """
    log = list(log_history)
    ended = max((i for i, row in enumerate(log) if "train_runtime" in row), default=len(log))
    named = datasets if isinstance(datasets, Mapping) else {"": datasets}
    starts = {f"{prefix}{name}_" if name else prefix: name for name in named}
    found = []
    for start, name in starts.items():
        rows = [(i, row) for i, row in enumerate(log) if _start_of(row, starts) == start]
        if not rows:
            continue
        at_best = [pair for pair in rows if best_step is not None and pair[1].get("step") == best_step]
        after = [pair for pair in rows if pair[0] > ended]
        index, row = (after or at_best or rows)[-1]
        step = best_step if index > ended and best_step is not None else row.get("step")
        metrics, missing = _numbers(row, start)
        found.append(EvaluationFacts(metrics, named[name], step, not_measured=missing))
    return tuple(found)


def _start_of(row: Mapping[str, Any], starts: Iterable[str]) -> str | None:
    """Return the longest of the starts that a key of the row has: `eval_a_b_` before `eval_a_`."""
    fitting = [start for start in starts if any(key.startswith(start) for key in row)]
    return max(fitting, key=len, default=None)


def _numbers(row: Mapping[str, Any], start: str) -> tuple[dict[str, float], dict[str, str]]:
    """Return the numbers among the metrics with this prefix, and the reason for each metric that has none."""
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
    """Return a row for each evaluation during training: epoch, step, the last logged losses, the metrics."""
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


def training_facts(args: Any, state: Any) -> TrainingFacts:
    """Return the facts of the training that took place.

    Args:
        args: the `TrainingArguments`.
        state: the `TrainerState` at the end of the training.
    """
    finished = [row["train_loss"] for row in state.log_history if "train_loss" in row]
    return TrainingFacts(
        epochs=state.epoch,
        steps=state.global_step,
        learning_rate=args.learning_rate,
        learning_rate_schedule=_text(args.lr_scheduler_type),
        warmup=args.warmup_steps or None,
        optimizer=_text(args.optim),
        weight_decay=args.weight_decay,
        max_grad_norm=args.max_grad_norm,
        batch_size=args.train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        processes=args.world_size,
        precision="bf16 mixed" if args.bf16 else "fp16 mixed" if args.fp16 else None,
        seed=args.seed,
        label_smoothing=args.label_smoothing_factor or None,
        train_loss=finished[-1] if finished and math.isfinite(finished[-1]) else None,
    )


def _text(value: object) -> str | None:
    return None if value is None else str(getattr(value, "value", value))


def library_versions() -> dict[str, str]:
    """Return the versions of the installed libraries that matter to the run."""
    found = {}
    for name in _VERSIONED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
