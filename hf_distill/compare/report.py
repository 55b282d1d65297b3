"""The report of a comparison: its fields, to JSON text and back. Writes no file, draws no table.

Every number carries its unit in its name; a share is between 0 and 1. A number not measured
is None, and `not_measured` says why.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from hf_distill.compare.machine import Machine
from hf_distill.errors import DataError, SettingError

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class ModelResult:
    """One row of the comparison: a model, or the same model trained with several seeds.

    Size and latency are those of one of the runs; accuracy and agreement are over all of them.
    """

    name: str
    accuracy_share_mean: float | None
    accuracy_share_spread: float | None
    """The sample standard deviation over `accuracy_share_runs`."""
    accuracy_share_runs: tuple[float, ...]
    parameters: int | None
    size_mb: float | None
    latency_ms_p50: float | None
    latency_ms_p95: float | None
    speed_up_times: float | None
    """The teacher's `latency_ms_p50` divided by this model's."""
    agreement_share_mean: float | None
    """The share of test examples on which it predicts what the teacher predicts."""
    agreement_share_spread: float | None
    not_measured: dict[str, str] = field(default_factory=dict)
    """Field name to the reason why it is None."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "accuracy_share_runs", tuple(self.accuracy_share_runs))
        missing = {name for name, value in vars(self).items() if value is None}
        if missing != set(self.not_measured):
            raise SettingError(
                f"{self.name}: {sorted(missing)} are None, but not_measured gives reasons for "
                f"{sorted(self.not_measured)}. Every None needs its reason, and nothing else one."
            )


@dataclass(frozen=True)
class Report:
    """A whole comparison: students before their teacher."""

    title: str
    results: tuple[ModelResult, ...]
    machine: Machine
    settings: dict[str, Any] = field(default_factory=dict)
    """What was compared and how: plain JSON values, units in the names."""
    cost: dict[str, float] = field(default_factory=dict)
    """What making it took: `seconds_total`, `peak_memory_mb`; a name that is absent is unknown."""
    notes: tuple[str, ...] = ()
    """Sentences for the reader: what was held out, what falls short."""
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        object.__setattr__(self, "results", tuple(self.results))
        object.__setattr__(self, "notes", tuple(self.notes))

    def result(self, name: str) -> ModelResult:
        """The row of that name; `SettingError` lists the names when there is none."""
        for result in self.results:
            if result.name == name:
                return result
        raise SettingError(f"no result {name!r}; there are {[r.name for r in self.results]}.")

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report that `to_json` wrote.

        Raises `DataError` for text that is no report, or one of another schema version.
        """
        try:
            raw = json.loads(text)
            version = raw["schema_version"]
            if version != SCHEMA_VERSION:
                raise DataError(
                    f"report schema version {version}; this release reads {SCHEMA_VERSION}. "
                    "Use the release of hf-distill that wrote the report."
                )
            raw["machine"] = Machine(**raw["machine"])
            raw["results"] = tuple(ModelResult(**result) for result in raw["results"])
            return cls(**raw)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(f"not a report that hf-distill wrote: {error!r}.") from error
