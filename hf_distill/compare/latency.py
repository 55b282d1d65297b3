"""Milliseconds a forward call takes, with the models' calls interleaved. No energy."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_distill.errors import SettingError

MIN_CALLS = 50
"""Fewer calls than this make a 95th percentile of two or three of them."""


@dataclass(frozen=True)
class Latency:
    """Percentiles over single calls, and what they were measured with."""

    latency_ms_p50: float
    latency_ms_p95: float
    calls: int
    batch_size: int
    threads: int


def measure_latency(
    models: Mapping[str, nn.Module],
    batches: Sequence[Mapping[str, Any]],
    *,
    calls: int = 200,
    warmup_calls: int = 20,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> dict[str, Latency]:
    """Time `calls` forward calls of each model, in evaluation mode and without gradient.

    Every model sees the same batches, in turn: whatever else the machine does in the meantime falls
    on all of them. The first model of a turn changes, so none always runs with a cold cache. Models
    keep the mode (training, evaluation) that they came with.

    Args:
        models: name to model; each batch must already be on their device.
        batches: inputs without labels, used in turn; all of one batch size.
        calls: timed calls a model, at least 50.
        warmup_calls: untimed calls a model before those.
        clock: nanoseconds, monotonic.

    Raises:
        SettingError: fewer than 50 calls, no batch, or batches of different sizes.
    """
    batch_size = _common_batch_size(batches)
    if calls < MIN_CALLS:
        raise SettingError(f"calls={calls}: at least {MIN_CALLS} are needed for a 95th percentile.")
    names = list(models)
    nanoseconds: dict[str, list[int]] = {name: [] for name in names}
    modes = {name: model.training for name, model in models.items()}
    try:
        for model in models.values():
            model.eval()
        with torch.inference_mode():
            for turn in range(-warmup_calls, calls):
                batch = batches[turn % len(batches)]
                first = turn % len(names)
                for name in names[first:] + names[:first]:
                    elapsed = _time_call(models[name], batch, clock)
                    if turn >= 0:
                        nanoseconds[name].append(elapsed)
    finally:
        for name, model in models.items():
            model.train(modes[name])
    return {name: _summarise(taken, batch_size) for name, taken in nanoseconds.items()}


def _time_call(model: nn.Module, batch: Mapping[str, Any], clock: Callable[[], int]) -> int:
    _finish_queued_work(batch)
    start = clock()
    model(**batch)
    _finish_queued_work(batch)
    return clock() - start


def _finish_queued_work(batch: Mapping[str, Any]) -> None:
    """An accelerator works behind the clock's back: wait for it."""
    if any(isinstance(value, Tensor) and value.device.type != "cpu" for value in batch.values()):
        torch.accelerator.synchronize()


def _summarise(nanoseconds: list[int], batch_size: int) -> Latency:
    p50, p95 = np.percentile(np.asarray(nanoseconds) / 1e6, [50, 95])
    return Latency(
        latency_ms_p50=float(p50),
        latency_ms_p95=float(p95),
        calls=len(nanoseconds),
        batch_size=batch_size,
        threads=torch.get_num_threads(),
    )


def _common_batch_size(batches: Sequence[Mapping[str, Any]]) -> int:
    sizes = {next(value.shape[0] for value in batch.values() if isinstance(value, Tensor)) for batch in batches}
    if len(sizes) != 1:
        raise SettingError(f"batches of sizes {sorted(sizes)}: latency needs one or more batches of one size.")
    return int(sizes.pop())
