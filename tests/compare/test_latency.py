"""Latency with a clock of our own: no assertion here depends on how fast the machine is."""

import numpy as np
import pytest
import torch
from torch import nn

from hf_distill.compare import measure_latency
from hf_distill.errors import SettingError


class Clock:
    """Nanoseconds that move only when a model runs."""

    def __init__(self):
        self.now = 0

    def __call__(self):
        return self.now


class Slow(nn.Module):
    """Takes the given milliseconds, in turn, and writes down who ran and how."""

    def __init__(self, name, clock, milliseconds, log):
        super().__init__()
        self.name, self.clock, self.milliseconds, self.log = name, clock, milliseconds, log
        self.ran = 0

    def forward(self, x):
        self.clock.now += int(self.milliseconds[self.ran % len(self.milliseconds)] * 1e6)
        self.ran += 1
        self.log.append((self.name, self.training, torch.is_inference_mode_enabled()))
        return x


def measured(**settings):
    clock, log = Clock(), []
    models = {
        "student": Slow("student", clock, list(range(1, 101)), log),
        "teacher": Slow("teacher", clock, [7], log),
    }
    batches = [{"x": torch.zeros(1, 3)}, {"x": torch.zeros(1, 5)}]
    return measure_latency(models, batches, clock=clock, **settings), models, log


def test_percentiles_are_those_of_the_timed_calls():
    latencies, _, _ = measured(calls=100, warmup_calls=0)
    student, teacher = latencies["student"], latencies["teacher"]
    assert student.latency_ms_p50 == pytest.approx(np.percentile(range(1, 101), 50))
    assert student.latency_ms_p95 == pytest.approx(np.percentile(range(1, 101), 95))
    assert teacher.latency_ms_p50 == teacher.latency_ms_p95 == 7
    assert (student.calls, student.batch_size) == (100, 1)
    assert student.threads == torch.get_num_threads()


def test_calls_are_interleaved_and_the_first_one_changes():
    _, _, log = measured(calls=50, warmup_calls=2)
    names = [name for name, _, _ in log]
    assert len(names) == 2 * 52
    assert all(set(names[i : i + 2]) == {"student", "teacher"} for i in range(0, len(names), 2))
    assert {names[0], names[2]} == {"student", "teacher"}


def test_warm_up_is_not_timed():
    latencies, models, _ = measured(calls=50, warmup_calls=10)
    assert models["student"].ran == 60
    assert latencies["student"].latency_ms_p50 == pytest.approx(np.median(range(11, 61)))


def test_models_run_in_evaluation_mode_without_gradient_and_get_their_mode_back():
    _, models, log = measured(calls=50)
    assert all(not training and inference for _, training, inference in log)
    assert all(model.training for model in models.values())


def test_a_failing_model_gets_its_mode_back():
    class Broken(nn.Module):
        def forward(self, x):
            raise RuntimeError("broken")

    model = Broken()
    with pytest.raises(RuntimeError, match="broken"):
        measure_latency({"student": model}, [{"x": torch.zeros(1)}])
    assert model.training


def test_too_few_calls_are_rejected():
    with pytest.raises(SettingError, match=r"calls=49: a 95th percentile needs at least 50"):
        measured(calls=49)


@pytest.mark.parametrize("sizes", [(), (1, 2)])
def test_batches_of_different_sizes_are_rejected(sizes):
    batches = [{"x": torch.zeros(size, 3)} for size in sizes]
    with pytest.raises(SettingError, match="one or more batches of the same size"):
        measure_latency({"student": nn.Identity()}, batches)
