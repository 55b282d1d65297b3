"""Stores: what a cache keeps of each row of predictions.

Axes: b examples, p positions of all examples one after the other, v columns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from hf_distill.errors import SettingError
from hf_distill.functional.rows import BLOCKED, in_full_precision
from hf_distill.functional.sparse import BLOCK, draw_columns, merge_repeats
from hf_distill.signals import SparseRows
from hf_distill.teachers.cache.files import DTYPES, Dtype, check_dtype, from_disk, to_disk
from hf_distill.teachers.shards import Json

_BITS = 53  # of a float64
_SEEDS = 1 << 64
_DRAWN_AT_ONCE = 1 << 24  # numbers held in memory while rows are drawn from: 128 MB of float64
_SPARSE_DTYPES = ("float16", "float32")


@dataclass(frozen=True)
class Field:
    """A column of the shards: its NumPy dtype, and how many numbers a position has."""

    dtype: Any
    width: int

    @property
    def bytes(self) -> int:
        """Bytes for each position."""
        return int(np.dtype(self.dtype).itemsize * self.width)


class Store(ABC):
    """What a cache keeps of each row of predictions.

    Attributes:
        name: in the manifest, beside the settings.
        is_sparse: whether it keeps some columns of a vocabulary by their ids, rather than all columns.
        paper: the citation key of its paper in `hub/papers.bib`, or None.
    """

    name: ClassVar[str]
    is_sparse: ClassVar[bool] = True
    paper: ClassVar[str | None] = None

    def describe(self) -> Json:
        """Return name and settings, for the manifest."""
        return {"name": self.name, **vars(self)}

    @abstractmethod
    def fields(self, columns: int) -> dict[str, Field]:
        """Return what is written for each position, for a head with so many columns."""

    @abstractmethod
    def encode(self, rows: Tensor, keys: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
        """Return the fields, `[p width]` each.

        Args:
            rows: `[p v]` logits.
            keys: `[b 2]`, of the examples; random draws follow from them.
            counts: `[b]`, the positions of each example.
        """

    def decode(self, field: str, values: np.ndarray) -> Tensor:
        """Return a field as a tensor."""
        return torch.from_numpy(values.astype(np.int32) if values.dtype == np.uint16 else values)

    def sparse_rows(self, fields: Mapping[str, Tensor], temperature: float) -> SparseRows | None:
        """Return the rows at a temperature from fields `[... width]`, or None if the store keeps all columns."""
        return None

    def check_temperature(self, temperature: float, columns: int) -> None:  # noqa: B027  # any, by default
        """Raise SettingError if what is kept of a head does not determine the probabilities at a temperature."""


class OneTemperature(Store):
    """A store whose columns stand for the probabilities at one temperature."""

    temperature: float

    def check_temperature(self, temperature: float, columns: int) -> None:
        if temperature != self.temperature:
            raise SettingError(
                f"temperature={temperature:g}: the cache keeps some columns at temperature {self.temperature:g}. Train "
                f"at that, without a schedule, or build a cache for temperature {temperature:g}, or with Dense()."
            )


class Drawn(OneTemperature):
    """A store of columns that are drawn by their probabilities; the draws follow from the seed and the example."""

    samples: int
    seed: int

    def encode(self, rows: Tensor, keys: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
        at = uniforms(keys, counts, self.samples, seed=self.seed)
        many = max(1, _DRAWN_AT_ONCE // max(rows.shape[1], BLOCK * at.shape[1]))
        parts = [self.draw(some, u) for some, u in zip(rows.split(many), at.split(many), strict=True)]
        return {
            name: torch.cat([part[name] for part in parts]).cpu().numpy().astype(field.dtype)
            for name, field in self.fields(rows.shape[1]).items()
        }

    @abstractmethod
    def draw(self, rows: Tensor, at: Tensor) -> dict[str, Tensor]:
        """Return the fields of `[p v]` logits, drawn with `[p samples]` uniform numbers."""

    def _check_draws(self) -> None:
        """Make the temperature a float, and raise SettingError if temperature, samples or seed are out of bounds."""
        object.__setattr__(self, "temperature", float(self.temperature))
        if self.samples < 1 or self.temperature <= 0 or not 0 <= self.seed < _SEEDS:
            raise SettingError(
                f"{self!r}: samples is at least 1, temperature is above 0, and seed is from 0 to 2^64 - 1."
            )


@dataclass(frozen=True)
class Dense(Store):
    """Keeps all columns, for training at any temperature.

    Args:
        dtype: "float16" (3 digits, up to 65,504), "bfloat16" (2 digits, any size) or "float32".
        keeps_largest: whether to keep each row's largest logit in float32 and round the differences from it, so that a
            row of logits around 2,000 loses no more than a row around 0. By default `TeacherCache.build` decides.

    Raises:
        SettingError: if the dtype is not one of these.

    >>> Dense().fields(3)["logits"].bytes
    6
    """

    dtype: Dtype = "float16"
    keeps_largest: bool | None = None
    name = "dense"
    is_sparse = False

    def __post_init__(self) -> None:
        check_dtype("Dense: dtype", self.dtype)

    def fields(self, columns: int) -> dict[str, Field]:
        largest = {"largest": Field(np.float32, 1)} if self.keeps_largest else {}
        return {"logits": Field(DTYPES[self.dtype], columns), **largest}

    def encode(self, rows: Tensor, keys: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
        rows, fields = rows.detach(), {}
        if self.keeps_largest:
            rows = in_full_precision(rows)
            largest = rows.amax(-1, keepdim=True).float()
            largest = largest.where(largest.isfinite(), 0.0)  # a row without any possible column
            rows, fields = rows - largest.to(rows.dtype), {"largest": largest.cpu().numpy()}
        reach = "differ by" if self.keeps_largest else "reach"
        overflow = f'the teacher\'s logits {reach} {{}}. Pass store=Dense("bfloat16") or Dense("float32").'
        return {"logits": to_disk(rows, self.dtype, overflow=overflow), **fields}

    def decode(self, field: str, values: np.ndarray) -> Tensor:
        return from_disk(values, self.dtype if field == "logits" else "float32")

    def logits(self, fields: Mapping[str, Tensor]) -> Tensor:
        """Return `[... columns]` in float32, from fields `[... width]`."""
        logits = fields["logits"].float()
        return logits + fields["largest"] if self.keeps_largest else logits


@dataclass(frozen=True)
class NoPredictions(Store):
    """Keeps no predictions: the store of `BuildOptions(predictions=False)`."""

    name = "nothing"
    is_sparse = False

    def fields(self, columns: int) -> dict[str, Field]:
        return {}

    def encode(self, rows: Tensor, keys: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
        return {}

    def check_temperature(self, temperature: float, columns: int) -> None:
        raise SettingError(
            "the cache holds no predictions: it was built with predictions=False. Train on objectives alone "
            "(alpha=None), or build it with predictions."
        )


@dataclass(frozen=True)
class TopKFromServer(OneTemperature):
    """Keeps the columns that a sparse teacher gives, and the probability of all others, for one temperature.

    The tail of a row that the teacher was not queried for (no label counted there) is NaN.

    Args:
        k: columns of each row at most; less likely ones are added to the tail.
        temperature: of the probabilities.
        dtype: of the log-probabilities, "float16" or "float32".

    >>> sum(field.bytes for field in TopKFromServer(20).fields(32_000).values())
    124
    """

    k: int
    temperature: float = 1.0
    dtype: Dtype = "float16"
    name = "top_k_from_server"

    def fields(self, columns: int) -> dict[str, Field]:
        return {
            "ids": Field(np.int32, self.k),
            "log_probabilities": Field(DTYPES[self.dtype], self.k),
            "tails": Field(np.float32, 1),
        }

    def encode(self, rows: Tensor, keys: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
        raise SettingError("TopKFromServer keeps what a sparse teacher gives. For logits use TopK.")

    def encode_sparse(self, rows: SparseRows) -> dict[str, np.ndarray]:
        """Return the fields, `[p width]` each, of rows with leading axis p."""
        log_p, order = rows.log_probabilities.float().sort(dim=-1, descending=True, stable=True)
        ids, tail = rows.ids.gather(-1, order), rows.log_tail.float()
        rest, ids, log_p = log_p[:, self.k :], ids[:, : self.k], log_p[:, : self.k]
        if rest.shape[1]:
            tail = torch.cat((rest, tail[:, None]), -1).logsumexp(-1)
        missing = self.k - ids.shape[1]
        ids = torch.nn.functional.pad(ids, (0, missing), value=-1)
        log_p = torch.nn.functional.pad(log_p, (0, missing), value=-torch.inf)
        return {
            "ids": ids.cpu().numpy().astype(np.int32),
            "log_probabilities": to_disk(log_p, self.dtype),
            "tails": tail[:, None].cpu().numpy(),
        }

    def sparse_rows(self, fields: Mapping[str, Tensor], temperature: float) -> SparseRows:
        both = torch.cat((fields["log_probabilities"].float(), fields["tails"]), -1).log_softmax(-1)
        return SparseRows(fields["ids"].long(), both[..., :-1], both[..., -1], temperature)


@dataclass(frozen=True)
class TopK(Store):
    """Keeps the k largest columns of each row, and the probability of all others.

    The probability of all others at one temperature does not follow from that at another, so it is kept for each of
    `temperatures`; no other can be trained with. A temperature schedule needs `Dense`.

    Args:
        k: columns kept of each row.
        temperatures: the temperatures at which it can be trained with.
        dtype: of the log-probabilities, "float16" or "float32".

    Raises:
        SettingError: if a setting is not allowed.

    >>> sum(field.bytes for field in TopK(64, temperatures=(1.0,)).fields(32_000).values())
    260
    """

    k: int = 64
    temperatures: tuple[float, ...] = (1.0, 2.0)
    dtype: Dtype = "float16"
    name = "top_k"

    def __post_init__(self) -> None:
        object.__setattr__(self, "temperatures", tuple(float(t) for t in self.temperatures))
        if self.k < 1 or not self.temperatures or min(self.temperatures) <= 0:
            raise SettingError(f"{self!r}: k is at least 1, and there is at least one temperature, above 0.")
        check_dtype("TopK: dtype", self.dtype, _SPARSE_DTYPES)

    def fields(self, columns: int) -> dict[str, Field]:
        kept = min(self.k, columns)
        return {
            "ids": Field(_id_type(columns), kept),
            "log_probabilities": Field(DTYPES[self.dtype], kept),
            "tails": Field(np.float32, len(self.temperatures)),
        }

    def encode(self, rows: Tensor, keys: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
        """Return ids, log-probabilities at temperature 1, and log Σ p^(1/T) over all others for each temperature T."""
        log_p = in_full_precision(rows.detach()).log_softmax(-1)
        kept, ids = log_p.topk(min(self.k, log_p.shape[-1]), dim=-1)
        others = log_p.scatter(-1, ids, -torch.inf)
        tails = torch.stack([(others / t).logsumexp(-1) for t in self.temperatures], -1)
        return {
            "ids": ids.cpu().numpy().astype(_id_type(rows.shape[1])),
            "log_probabilities": to_disk(kept, self.dtype),
            "tails": tails.float().cpu().numpy(),
        }

    def sparse_rows(self, fields: Mapping[str, Tensor], temperature: float) -> SparseRows:
        tails = fields["tails"]
        if temperature in self.temperatures:
            tail = tails[..., self.temperatures.index(temperature), None]
        else:  # there are no other columns, as was checked
            tail = torch.full_like(tails[..., :1], -torch.inf)
        both = torch.cat([fields["log_probabilities"].float() / temperature, tail], -1).log_softmax(-1)
        return SparseRows(fields["ids"].long(), both[..., :-1], both[..., -1], temperature)

    def check_temperature(self, temperature: float, columns: int) -> None:
        if self.k >= columns or temperature in self.temperatures:
            return
        known = ", ".join(f"{t:g}" for t in self.temperatures)
        raise SettingError(
            f"temperature={temperature:g}: the cache keeps the {self.k} likeliest columns and the sum of the others, "
            f"for temperature {known}. Train at one of these, without a schedule, or build one with "
            "TopK(temperatures=) or Dense()."
        )


@dataclass(frozen=True)
class Sampled(Drawn):
    """Keeps columns drawn with replacement, with weights that make their mean the teacher's distribution.

    Anshumann et al. 2025, Sparse Logit Sampling (random sampling knowledge distillation): proposals r ∝
    p^proposal_power, weights p / (k r). The gradient of the forward KL is then the teacher's on average, which no top-k
    gives. Different here: draws are stratified (`functional/sparse.py`), so that no estimate varies more, and the mean
    of log p over the draws, one number for each row, makes the reported value a divergence. Weights are not divided
    by their sum: it is 1 on average, and dividing would bring a bias. Repeated draws are merged when read.

    It trains with forward_kl only, and at this temperature only.

    Args:
        samples: draws for each row.
        temperature: the temperature at which it can be trained with.
        proposal_power: above 0, at most 1; at 1 all weights are equal and are not kept.
        seed: of the draws.

    Raises:
        SettingError: if a setting is not allowed.

    >>> sum(field.bytes for field in Sampled(32).fields(32_000).values())
    68
    """

    paper: ClassVar[str | None] = "anshumann2025sparse"
    samples: int = 32
    temperature: float = 1.0
    proposal_power: float = 1.0
    seed: int = 0
    name = "sampled"

    def __post_init__(self) -> None:
        self._check_draws()
        object.__setattr__(self, "proposal_power", float(self.proposal_power))
        if not 0 < self.proposal_power <= 1:
            raise SettingError(
                f"{self!r}: proposal_power is above 0 and at most 1; above 1 an unlikely column's weight has no bound."
            )

    def fields(self, columns: int) -> dict[str, Field]:
        weights = {} if self.proposal_power == 1 else {"weights": Field(np.float32, self.samples)}
        return {
            "ids": Field(_id_type(columns), self.samples),
            **weights,
            "mean_log_probability": Field(np.float32, 1),
        }

    def draw(self, rows: Tensor, at: Tensor) -> dict[str, Tensor]:
        log_p = (in_full_precision(rows.detach()) / self.temperature).log_softmax(-1)
        proposals = (log_p if self.proposal_power == 1 else self.proposal_power * log_p).exp()
        ids = draw_columns(proposals, at.to(rows.device))
        known = log_p.gather(-1, ids)
        weights = torch.full_like(known, 1 / self.samples)
        if self.proposal_power != 1:
            total = proposals.sum(-1, keepdim=True, dtype=torch.float64).float()
            weights = weights * total * ((1 - self.proposal_power) * known).exp()
        mean = (weights * known).sum(-1, keepdim=True) / weights.sum(-1, keepdim=True)
        return {"ids": ids, "weights": weights, "mean_log_probability": mean}

    def sparse_rows(self, fields: Mapping[str, Tensor], temperature: float) -> SparseRows:
        ids, mean = fields["ids"].long(), fields["mean_log_probability"]
        equal = torch.full_like(mean, 1 / self.samples).expand(ids.shape)
        ids, weights = merge_repeats(ids, fields.get("weights", equal))
        no_tail = torch.full_like(mean[..., 0], -torch.inf)
        return SparseRows(ids, mean.expand(ids.shape), no_tail, temperature, weights)


@dataclass(frozen=True)
class Hybrid(Drawn):
    """Keeps the k largest columns of each row with their probabilities, and samples of the others.

    Exact for the k columns, and on average the teacher's distribution for the others: Σ over the k of p δ, plus the
    probability of the others / samples for each draw. With k = v it is the live teacher. Draws, temperatures and
    divergences are as with `Sampled`.

    Args:
        k: columns kept of each row.
        samples: draws from the others.
        temperature: the temperature at which it can be trained with.
        dtype: of the log-probabilities of the k, "float16" (off by 2^-12 of log p) or "float32".
        seed: of the draws.

    Raises:
        SettingError: if a setting is not allowed.

    >>> sum(field.bytes for field in Hybrid(16, 16).fields(32_000).values())
    104
    """

    k: int = 16
    samples: int = 16
    temperature: float = 1.0
    dtype: Dtype = "float16"
    seed: int = 0
    name = "hybrid"

    def __post_init__(self) -> None:
        self._check_draws()
        if self.k < 1:
            raise SettingError(f"{self!r}: k is at least 1. For samples alone use Sampled.")
        check_dtype("Hybrid: dtype", self.dtype, _SPARSE_DTYPES)

    def fields(self, columns: int) -> dict[str, Field]:
        kept = min(self.k, columns)
        return {
            "ids": Field(_id_type(columns), kept),
            "log_probabilities": Field(DTYPES[self.dtype], kept),
            "tail": Field(np.float32, 1),
            "drawn": Field(_id_type(columns), self.samples),
            "mean_log_probability": Field(np.float32, 1),
        }

    def draw(self, rows: Tensor, at: Tensor) -> dict[str, Tensor]:
        log_p = (in_full_precision(rows.detach()) / self.temperature).log_softmax(-1)
        kept, ids = log_p.topk(min(self.k, log_p.shape[-1]), dim=-1)
        others = log_p.scatter(-1, ids, -torch.inf)
        tail = others.logsumexp(-1, keepdim=True)
        chosen = draw_columns((others - tail.clamp(min=BLOCKED)).exp(), at.to(rows.device))
        mean = log_p.gather(-1, chosen).mean(-1, keepdim=True)
        mean = torch.where(tail > -torch.inf, mean, 0.0)  # there was nothing to draw from
        return {"ids": ids, "log_probabilities": kept, "tail": tail, "drawn": chosen, "mean_log_probability": mean}

    def sparse_rows(self, fields: Mapping[str, Tensor], temperature: float) -> SparseRows:
        tail = fields["tail"]
        # Rounded log-probabilities do not sum to 1 exactly.
        both = torch.cat([fields["log_probabilities"].float(), tail], -1).log_softmax(-1)
        kept, share = both[..., :-1], both[..., -1:].exp() / self.samples
        impossible = kept == -torch.inf  # among the k if fewer columns are possible
        chosen, shares = merge_repeats(fields["drawn"].long(), share.expand(fields["drawn"].shape))
        chosen = chosen.masked_fill(tail == -torch.inf, -1)  # there was nothing to draw from
        mean = fields["mean_log_probability"].expand(chosen.shape)
        return SparseRows(
            ids=torch.cat([fields["ids"].long().masked_fill(impossible, -1), chosen], -1),
            log_probabilities=torch.cat([kept.masked_fill(impossible, 0.0), mean], -1),
            log_tail=torch.full_like(tail[..., 0], -torch.inf),
            temperature=temperature,
            weights=torch.cat([kept.exp(), shares], -1),
        )


STORES: dict[str, Callable[..., Store]] = {
    store.name: store for store in (Dense, NoPredictions, TopKFromServer, TopK, Sampled, Hybrid)
}


def store_from(description: Json) -> Store:
    """Return the store that a manifest names.

    Raises:
        SettingError: if a later version wrote it.
    """
    settings = dict(description)
    name = settings.pop("name", None)
    if name not in STORES:
        raise SettingError(f"the cache has the store {name!r}; known are {', '.join(STORES)}. Update hf-distill.")
    return STORES[name](**settings)


def uniforms(keys: np.ndarray, counts: np.ndarray, width: int, *, seed: int) -> Tensor:
    """Return random numbers in [0, 1) that follow from an example's content, `[p width]` in float64.

    Each example has a generator of its own, whose key is the example's and whose counter is the seed's. The raw words
    of Philox (Salmon et al. 2011) are fixed by its definition, so no version of NumPy changes them.

    Args:
        keys: as for `Store.encode`.
        counts: as for `Store.encode`.
        width: numbers for each position.
        seed: from 0 to 2^64 - 1.

    >>> both = uniforms(np.array([[7, 1], [9, 2]], dtype=np.uint64), np.array([1, 2]), 2, seed=0)
    >>> alone = uniforms(np.array([[9, 2]], dtype=np.uint64), np.array([2]), 2, seed=0)
    >>> bool((both[1:] == alone).all())
    True
    """
    words = [np.empty(0, dtype=np.uint64)]
    for key, count in zip(keys, counts.tolist(), strict=True):
        start = np.array([0, 0, 0, seed], dtype=np.uint64)
        words.append(np.random.Philox(counter=start, key=key.astype(np.uint64)).random_raw(count * width))
    whole = np.concatenate(words) >> np.uint64(64 - _BITS)
    return torch.from_numpy(whole.astype(np.float64) * 2.0**-_BITS).view(-1, width)


def _id_type(columns: int) -> Any:
    """Return the dtype of a column's id: 2 bytes up to 65,536 columns, else 4."""
    return np.uint16 if columns <= 1 << 16 else np.int32
