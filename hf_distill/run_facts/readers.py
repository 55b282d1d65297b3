"""From a Trainer's parts to facts, by attribute names only: imports no torch, no Trainer."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from numbers import Real
from typing import Any

from hf_distill.run_facts.facts import DatasetFacts, EvaluationFacts, ModelFacts, TrainingFacts

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
