"""The report of a comparison, and its JSON text.

Every number has its unit in its name; a share is between 0 and 1. A number that was not measured is None, and
`not_measured` has the reason.
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
    """The results of a model, or of the same model trained with several seeds.

    Size and latency are those of one of the runs; accuracy and agreement are over all runs. Spreads are sample standard
    deviations. `speed_up_times` is the teacher's `latency_ms_p50` divided by the model's, and `agreement_share_mean`
    the share of test examples with the teacher's prediction.
    """

    name: str
    accuracy_share_mean: float | None
    accuracy_share_spread: float | None
    accuracy_share_runs: tuple[float, ...]
    parameters: int | None
    size_mb: float | None
    latency_ms_p50: float | None
    latency_ms_p95: float | None
    speed_up_times: float | None
    agreement_share_mean: float | None
    agreement_share_spread: float | None
    not_measured: dict[str, str] = field(default_factory=dict)  # the reason for each field that is None

    def __post_init__(self) -> None:
        object.__setattr__(self, "accuracy_share_runs", tuple(self.accuracy_share_runs))
        missing = {name for name, value in vars(self).items() if value is None}
        if missing != set(self.not_measured):
            raise SettingError(
                f"{self.name}: {sorted(missing)} are None, and not_measured gives reasons for "
                f"{sorted(self.not_measured)}. These must be the same."
            )


@dataclass(frozen=True)
class Report:
    """A comparison of models, students before their teacher."""

    title: str
    results: tuple[ModelResult, ...]
    machine: Machine
    settings: dict[str, Any] = field(default_factory=dict)  # JSON values with their units in the names
    cost: dict[str, float] = field(default_factory=dict)  # `seconds_total`, `peak_memory_mb`, if known
    notes: tuple[str, ...] = ()  # sentences for the reader
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        object.__setattr__(self, "results", tuple(self.results))
        object.__setattr__(self, "notes", tuple(self.notes))

    def result(self, name: str) -> ModelResult:
        """Return the result with this name.

        Raises:
            SettingError: if there is none.
        """
        for result in self.results:
            if result.name == name:
                return result
        raise SettingError(f"no result {name!r}; there are {[result.name for result in self.results]}.")

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Return the report that `to_json` wrote.

        Raises:
            DataError: if the text is not a report, or has another schema version.
        """
        try:
            raw = json.loads(text)
            version = raw["schema_version"]
            if version != SCHEMA_VERSION:
                raise DataError(
                    f"report schema version {version}; this release reads {SCHEMA_VERSION}. Use the other release."
                )
            raw["machine"] = Machine(**raw["machine"])
            raw["results"] = tuple(ModelResult(**result) for result in raw["results"])
            return cls(**raw)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(f"not a report that hf-distill wrote: {error!r}.") from error
