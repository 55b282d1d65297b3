"""How a student of each kind of teacher is trained; what is compared, and how, stands in `teacher_kinds.py`."""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, set_seed

from benchmarks.init_ablation import say
from benchmarks.protocol import settings_of
from benchmarks.sets.sst2_kinds import Data
from hf_distill import (
    CachedTeacher,
    Chain,
    DistillationArguments,
    DistillationTrainer,
    Ensemble,
    LayerMap,
    Link,
    MovingAverage,
    TeacherCache,
    students,
)

TEMPERATURE, DECAY, LAYERS, ASSISTANT_LAYERS = 2.0, 0.99, 2, 4
LABELS, ONE, THREE, CHAIN = "labels alone", "one teacher", "three teachers", "chain 6 → 4 → 2"
ASSISTANT, SECOND, THIRD = "assistant of the chain (4 layers)", "second generation", "third generation"
AVERAGE, LONGER = "own average", "one teacher, twice the steps"
GENERATIONS = "generations"
# A run of a kind gives the students of these rows; its settings are chosen by the last of them.
KINDS = {
    LABELS: (LABELS,),
    ONE: (ONE,),
    THREE: (THREE,),
    CHAIN: (ASSISTANT, CHAIN),
    GENERATIONS: (SECOND, THIRD),
    AVERAGE: (AVERAGE,),
    LONGER: (LONGER,),
}


def start(teacher: Any, layers: int) -> Any:
    """Layers of a teacher, the first and the last among them, with its embeddings, pooler and head."""
    depth = teacher.config.num_hidden_layers
    return students.inherit(teacher, layers=LayerMap.first_last(2, depth) if layers == LAYERS else layers)


class Laboratory:
    """What trains the students. Teachers are asked once about each phrase, and their answers kept in the folder."""

    def __init__(self, data: Data, folder: Path, options: argparse.Namespace) -> None:
        self.data, self.folder, self.options = data, folder, options
        self.caches: list[Path] = []

    def ask_teachers(self) -> None:
        """Every answer that any run will look up."""
        rows = sorted(self.data.train, key=lambda row: len(row["input_ids"]))  # little padding
        for seed, teacher in zip(self.options.seeds, self.data.teachers, strict=True):
            cache = self.folder / f"answers_seed-{seed}"
            began = time.process_time()
            TeacherCache.build(teacher, rows, cache, data_collator=self.data.collator, progress=False)
            say(f"teacher of seed {seed} asked in {time.process_time() - began:.0f} s of processor time")
            self.caches.append(cache)

    def trained(self, kind: str, seed: int, alpha: float, rate: float, born_of: Path | None) -> list[Any]:
        """The students of one run, in the order of `KINDS`. Args: born_of: weights of the first generation."""
        number = list(self.options.seeds).index(seed)
        source, cache = self.data.teachers[number], self.caches[number]
        student = start(source, LAYERS)
        if kind == CHAIN:
            links = [Link("assistant", partial(start, source, ASSISTANT_LAYERS)), Link("student", lambda: student)]
            return self._chain(links, CachedTeacher(cache, teacher=source), seed, alpha, rate)
        if kind == GENERATIONS:
            assert born_of is not None  # the student of one teacher comes before
            first = read_student(source, born_of)
            generations = Chain.generations(partial(start, source, LAYERS), 2)
            return self._chain(generations.links, first, seed, alpha, rate)
        teacher = {
            LABELS: lambda: None,
            THREE: lambda: Ensemble([CachedTeacher(one) for one in self.caches]),
            AVERAGE: lambda: MovingAverage(decay=DECAY),
        }.get(kind, lambda: CachedTeacher(cache, teacher=source))()
        steps = self.options.steps * (2 if kind == LONGER else 1)
        set_seed(seed)
        trainer = DistillationTrainer(
            model=student,
            teacher_model=teacher,
            args=self._arguments(self.folder / "trainer", seed, alpha, rate, steps),
            train_dataset=self.data.train,
            data_collator=self.data.collator,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return [student]

    def _chain(self, links: Sequence[Link], teacher: Any, seed: int, alpha: float, rate: float) -> list[Any]:
        folder = self.folder / "chain"
        if folder.exists():
            shutil.rmtree(folder)  # of a run that was cut off
        result = Chain(links, keep="last").run(
            teacher_model=teacher,
            args=self._arguments(folder, seed, alpha, rate, self.options.steps),
            train_dataset=self.data.train,
            data_collator=self.data.collator,
        )
        kind = type(self.data.teachers[0])
        found = [kind.from_pretrained(link.folder) for link in result.links]
        shutil.rmtree(folder)
        return found

    def _arguments(self, folder: Path, seed: int, alpha: float, rate: float, steps: int) -> DistillationArguments:
        common = settings_of(steps=steps, batch_size=self.options.batch, learning_rate=rate, seed=seed, folder=folder)
        return DistillationArguments(**common, alpha=alpha, temperature=TEMPERATURE)


def read_student(teacher: Any, path: Path) -> Any:
    """A student whose weights were kept."""
    weights = torch.load(path, weights_only=True)
    student = start(teacher, 1 + max(int(name.split(".")[3]) for name in weights if ".layer." in name))
    student.load_state_dict(weights)
    return student
