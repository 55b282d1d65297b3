"""The latency of forward calls, with the calls of all models interleaved."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from hf_distill._types import Batch
from hf_distill.errors import SettingError

MIN_CALLS = 50
"""With fewer calls the 95th percentile would depend on two or three of them."""


@dataclass(frozen=True)
class Latency:
    """Percentiles of single forward calls, and how they were measured."""

    latency_ms_p50: float
    latency_ms_p95: float
    calls: int
    batch_size: int
    threads: int


def measure_latency(
    models: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    *,
    calls: int = 200,
    warmup_calls: int = 20,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> dict[str, Latency]:
    """Return the latency of each model in evaluation mode, without gradients.

    All models get each batch in turn, so that other work of the machine affects all of them, and the first model of a
    turn changes, so that none always runs with a cold cache. Models keep their mode (training or evaluation).

    Args:
        models: the models by name.
        batches: inputs without labels, on the models' device and of the same size; they are used in turn.
        calls: timed calls for each model, at least 50.
        warmup_calls: untimed calls for each model before.
        clock: a monotonic clock in nanoseconds.

    Raises:
        SettingError: if there are fewer than 50 calls, no batches, or batches of different sizes.
    """
    sizes = {next(value.shape[0] for value in batch.values() if isinstance(value, Tensor)) for batch in batches}
    if len(sizes) != 1:
        raise SettingError(f"batches of sizes {sorted(sizes)}: latency needs one or more batches of the same size.")
    (batch_size,) = sizes
    if calls < MIN_CALLS:
        raise SettingError(f"calls={calls}: a 95th percentile needs at least {MIN_CALLS}.")
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
    return {name: _summary(times, batch_size) for name, times in nanoseconds.items()}


def _time_call(model: nn.Module, batch: Batch, clock: Callable[[], int]) -> int:
    _finish_queued_work(batch)
    start = clock()
    model(**batch)
    _finish_queued_work(batch)
    return clock() - start


def _finish_queued_work(batch: Batch) -> None:
    """Wait for an accelerator, which works asynchronously."""
    if any(isinstance(value, Tensor) and value.device.type != "cpu" for value in batch.values()):
        torch.accelerator.synchronize()


def _summary(nanoseconds: list[int], batch_size: int) -> Latency:
    p50, p95 = np.percentile(np.asarray(nanoseconds) / 1e6, [50, 95]).tolist()
    return Latency(p50, p95, len(nanoseconds), batch_size, torch.get_num_threads())
