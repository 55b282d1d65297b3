"""Numbers to draw with that follow from an example's content: the same in any batch, order, process or second attempt.

Axes: b examples, p positions of all of them one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from hf_distill.errors import SettingError, did_you_mean
from hf_distill.functional.rows import BLOCKED, in_full_precision
from hf_distill.functional.sparse import BLOCK, draw_columns, merge_repeats
from hf_distill.signals import SparseRows
from hf_distill.teachers.load import DTYPE_ALIASES

_BITS = 53  # of a float64
SEEDS = 1 << 64


def uniforms(keys: np.ndarray, counts: np.ndarray, width: int, *, seed: int) -> Tensor:
    """`[p width]` in [0, 1), float64: a generator an example, whose key is the example's and whose place is the seed's.

    The raw words of Philox (Salmon et al. 2011) are fixed by its definition, so no version of numpy changes them.

    Args:
        keys: `[b 2]` of the examples.
        counts: `[b]` positions of each.
        seed: from 0 to 2^64 - 1.

    >>> one = uniforms(np.array([[7, 1], [9, 2]], dtype=np.uint64), np.array([1, 2]), 2, seed=0)
    >>> alone = uniforms(np.array([[9, 2]], dtype=np.uint64), np.array([2]), 2, seed=0)
    >>> bool((one[1:] == alone).all())
    True
    """
    words = [np.empty(0, dtype=np.uint64)]
    for key, count in zip(keys, counts.tolist(), strict=True):
        start = np.array([0, 0, 0, seed], dtype=np.uint64)
        words.append(np.random.Philox(counter=start, key=key.astype(np.uint64)).random_raw(count * width))
    whole = np.concatenate(words) >> np.uint64(64 - _BITS)
    return torch.from_numpy(whole.astype(np.float64) * 2.0**-_BITS).view(-1, width)


def check_seed(seed: int, of: str) -> None:
    """Raises:
    SettingError: below 0, or of more than 64 bits.
    """
    if not 0 <= seed < SEEDS:
        raise SettingError(f"{of}(seed={seed}): a seed is from 0 to 2^64 - 1.")


_ARROW_TYPE = {"float16": np.float16, "bfloat16": np.uint16, "float32": np.float32}  # Arrow knows no bfloat16


@dataclass(frozen=True)
class Field:
    """So many numbers a position, as they lie on the disk."""

    dtype: Any
    width: int

    @property
    def bytes(self) -> int:
        return int(np.dtype(self.dtype).itemsize * self.width)


class Store(Protocol):
    """What a kind of cache keeps of each row. `name` and the settings stand in the manifest."""

    @property
    def name(self) -> str: ...

    @property
    def is_sparse(self) -> bool:
        """Whether it names columns of a vocabulary by their number, and does not keep all of them."""
        ...

    def settings(self) -> dict[str, Any]: ...

    def fields(self, columns: int) -> dict[str, Field]:
        """What is written, for a head of so many columns."""
        ...

    def encode(self, rows: Tensor, keys: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
        """`[p v]` → for each field `[p width]`.

        Args:
            keys: `[b 2]` of the examples.
            counts: `[b]` how many of the positions each has. For what is drawn.
        """
        ...

    def tensor(self, name: str, stored: np.ndarray) -> Tensor:
        """One field as it was read, as a tensor."""
        ...

    def sparse_rows(self, laid: Mapping[str, Tensor], temperature: float) -> SparseRows | None:
        """What is told of the rows, from fields `[... width]`; None: `logits` are all there is to it."""
        ...

    def check_temperature(self, temperature: float, columns: int) -> None:
        """Raises SettingError: a head of so many columns cannot be trained at this temperature with what is kept."""
        ...


@dataclass(frozen=True)
class Dense:
    """All columns, as they are.

    Args:
        dtype: "float16" (3 digits; up to 65,504), "bfloat16" (2 digits, any size) or "float32".
        keeps_largest: round how far each row's columns are below its largest, which is kept in float32 beside them: a
            row of logits around 2,000 then loses no more than one around 0. None: `TeacherCache.build` decides.

    Raises:
        SettingError: another dtype.

    >>> Dense().fields(3)["logits"].bytes
    6
    """

    dtype: str = "float16"
    keeps_largest: bool | None = None
    name = "dense"
    is_sparse = False

    def __post_init__(self) -> None:
        if self.dtype not in _ARROW_TYPE:
            hint = did_you_mean(self.dtype, _ARROW_TYPE, DTYPE_ALIASES)
            raise SettingError(f"Dense(dtype={self.dtype!r}): allowed are {', '.join(_ARROW_TYPE)}.{hint}")

    def settings(self) -> dict[str, Any]:
        return asdict(self)

    def fields(self, columns: int) -> dict[str, Field]:
        largest = {"largest": Field(np.float32, 1)} if self.keeps_largest else {}
        return {"logits": Field(_ARROW_TYPE[self.dtype], columns), **largest}

    def encode(self, rows: Tensor, keys: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
        rows, beside = rows.detach(), {}
        if self.keeps_largest:
            rows = in_full_precision(rows)
            largest = rows.amax(-1, keepdim=True).float()
            largest = largest.where(largest.isfinite(), 0.0)  # no column is possible
            rows, beside = rows - largest.to(rows.dtype), {"largest": largest.cpu().numpy()}
        kept = rows.to(getattr(torch, self.dtype)).cpu()
        self._check_no_overflow(rows, kept)
        return {"logits": kept.view(torch.uint16).numpy() if self.dtype == "bfloat16" else kept.numpy(), **beside}

    def logits(self, laid: Mapping[str, Tensor]) -> Tensor:
        """`[... columns]` in float32, from fields `[... width]`."""
        logits = laid["logits"].float()
        return logits + laid["largest"] if self.keeps_largest else logits

    def tensor(self, name: str, stored: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(stored)
        return tensor.view(torch.bfloat16) if self.dtype == "bfloat16" and name == "logits" else tensor

    def sparse_rows(self, laid: Mapping[str, Tensor], temperature: float) -> None:
        return None

    def check_temperature(self, temperature: float, columns: int) -> None:
        """Any will do."""

    def _check_no_overflow(self, rows: Tensor, kept: Tensor) -> None:
        if self.dtype == "float16" and bool((kept.isinf() & ~rows.cpu().isinf()).any()):
            largest = rows[rows.isfinite()].abs().max().item()
            raise SettingError(
                f"the teacher's logits {'differ by' if self.keeps_largest else 'reach'} {largest:.3g}, float16 ends at "
                '65504. Pass store=Dense("bfloat16") or Dense("float32").'
            )


def rounding_error(rows: Tensor, dtype: str) -> float:
    """How much rounding `[p v]` to a dtype changes, relative to how much the rows differ from each other.

    Both are root mean squares; what all rows have in common teaches nothing, so it is taken off first.

    >>> offset = torch.tensor([[2000.3], [2000.9]])
    >>> rounding_error(offset, "float32") < 1e-3 < rounding_error(offset, "float16")
    True
    """
    rows = rows.detach().double()
    error = (rows.to(getattr(torch, dtype)).double() - rows).square().mean()
    spread = (rows - rows.mean(0)).square().mean()
    return float((error / spread).sqrt()) if spread > 0 else 0.0


def id_type(columns: int) -> Any:
    """Of a column's number: 2 bytes up to 65,536 columns, else 4."""
    return np.uint16 if columns <= 1 << 16 else np.int32


STORES: dict[str, Any] = {"dense": Dense}


def store_from(description: Mapping[str, Any]) -> Store:
    """The store that a manifest names.

    Raises:
        SettingError: written by a version that knows more of them.
    """
    settings = {name: value for name, value in description.items() if name != "name"}
    if description.get("name") not in STORES:
        raise SettingError(
            f"the cache keeps {description.get('name')!r}, which this version does not know; it knows "
            f"{', '.join(STORES)}. Update hf-distill."
        )
    return STORES[description["name"]](**settings)


def described(store: Store) -> dict[str, Any]:
    return {"name": store.name, **store.settings()}


@dataclass(frozen=True)
class NoPredictions:
    """No prediction: what `TeacherCache.build(predictions=False)` keeps of them."""

    name = "nothing"
    is_sparse = False

    def settings(self) -> dict[str, Any]:
        return {}

    def fields(self, columns: int) -> dict[str, Field]:
        return {}

    def encode(self, rows: Tensor, keys: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
        return {}

    def tensor(self, name: str, stored: np.ndarray) -> Tensor:
        return torch.from_numpy(stored)

    def sparse_rows(self, laid: Mapping[str, Tensor], temperature: float) -> SparseRows | None:
        return None

    def check_temperature(self, temperature: float, columns: int) -> None:
        """Raises SettingError: there are no predictions to be softened."""
        raise SettingError(
            "the cache holds no predictions: it was built with predictions=False. Train on objectives alone "
            "(alpha=None), or build it with predictions."
        )


STORES[NoPredictions.name] = NoPredictions


_ARROW = {"float16": np.float16, "float32": np.float32}


@dataclass(frozen=True)
class TopKFromServer:
    """The columns that the teacher told, and its tail, for the temperature that they are of.

    Where a row was not asked for (no label counted there), its tail is NaN.

    Args:
        k: columns a row, at most; what a row lists beyond is put into the tail, the likeliest first.
        temperature: of the probabilities.
        dtype: of the log-probabilities, "float16" or "float32".

    >>> sum(field.bytes for field in TopKFromServer(20).fields(32_000).values())
    124
    """

    k: int
    temperature: float = 1.0
    dtype: str = "float16"
    name = "listed"
    is_sparse = True

    def settings(self) -> dict[str, Any]:
        return asdict(self)

    def fields(self, columns: int) -> dict[str, Field]:
        return {
            "ids": Field(np.int32, self.k),
            "log_probabilities": Field(_ARROW[self.dtype], self.k),
            "tails": Field(np.float32, 1),
        }

    def encode(self, rows: Tensor, keys: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
        """Raises SettingError: it keeps what is listed, not logits."""
        raise SettingError("Listed keeps what a teacher lists by itself. For logits use TopK.")

    def encode_listed(self, rows: SparseRows) -> dict[str, np.ndarray]:
        """`[p k']` and `[p]` → for each field `[p width]`."""
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
            "log_probabilities": log_p.to(getattr(torch, self.dtype)).cpu().numpy(),
            "tails": tail[:, None].cpu().numpy(),
        }

    def tensor(self, name: str, stored: np.ndarray) -> Tensor:
        return torch.from_numpy(stored)

    def sparse_rows(self, laid: Mapping[str, Tensor], temperature: float) -> SparseRows:
        both = torch.cat((laid["log_probabilities"].float(), laid["tails"]), -1).log_softmax(-1)
        return SparseRows(laid["ids"].long(), both[..., :-1], both[..., -1], temperature)

    def check_temperature(self, temperature: float, columns: int) -> None:
        """Raises SettingError: the teacher was asked at another one."""
        if temperature != self.temperature:
            raise SettingError(
                f"temperature={temperature:g}: the cache keeps what its teacher listed at temperature "
                f"{self.temperature:g}, and softening that would need all columns. Train at {self.temperature:g}, "
                "without a schedule."
            )


STORES[TopKFromServer.name] = TopKFromServer


_ARROW = {"float16": np.float16, "float32": np.float32}


@dataclass(frozen=True)
class TopK:
    """The k largest columns of each row, and the probability of all others.

    A softened tail does not follow from the tail at another temperature, so it is kept for each of `temperatures`;
    training at any other is refused. A temperature that moves needs `Dense`.

    Args:
        k: columns kept of each row.
        temperatures: at which it can be trained with.
        dtype: of the log-probabilities, "float16" or "float32".

    Raises:
        SettingError: k below 1, no temperature or one that is not above 0, or another dtype.

    >>> sum(field.bytes for field in TopK(64, temperatures=(1.0,)).fields(32_000).values())
    260
    """

    k: int = 64
    temperatures: tuple[float, ...] = (1.0, 2.0)
    dtype: str = "float16"
    name = "top_k"
    is_sparse = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "temperatures", tuple(float(t) for t in self.temperatures))
        if self.k < 1 or not self.temperatures or min(self.temperatures) <= 0:
            raise SettingError(
                f"TopK(k={self.k}, temperatures={self.temperatures}): k is at least 1, and there is at least one "
                "temperature, above 0."
            )
        if self.dtype not in _ARROW:
            hint = did_you_mean(self.dtype, _ARROW, DTYPE_ALIASES)
            raise SettingError(f"TopK(dtype={self.dtype!r}): allowed are {', '.join(_ARROW)}.{hint}")

    def settings(self) -> dict[str, Any]:
        return {**asdict(self), "temperatures": list(self.temperatures)}

    def fields(self, columns: int) -> dict[str, Field]:
        kept = min(self.k, columns)
        return {
            "ids": Field(id_type(columns), kept),
            "log_probabilities": Field(_ARROW[self.dtype], kept),
            "tails": Field(np.float32, len(self.temperatures)),
        }

    def encode(self, rows: Tensor, keys: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
        """ids, their log-probabilities at temperature 1, and log Σ p^(1/T) over all others for each temperature."""
        log_p = in_full_precision(rows.detach()).log_softmax(-1)
        kept, ids = log_p.topk(min(self.k, log_p.shape[-1]), dim=-1)
        others = log_p.scatter(-1, ids, -torch.inf)
        tails = torch.stack([(others / t).logsumexp(-1) for t in self.temperatures], -1)
        fields = self.fields(rows.shape[1])
        return {
            "ids": ids.cpu().numpy().astype(fields["ids"].dtype),
            "log_probabilities": kept.to(getattr(torch, self.dtype)).cpu().numpy(),
            "tails": tails.float().cpu().numpy(),
        }

    def tensor(self, name: str, stored: np.ndarray) -> Tensor:
        return torch.from_numpy(stored.astype(np.int32) if name == "ids" else stored)

    def sparse_rows(self, laid: Mapping[str, Tensor], temperature: float) -> SparseRows:
        kept, tail = self.at_temperature(laid["log_probabilities"], laid["tails"], temperature)
        return SparseRows(laid["ids"].long(), kept, tail, temperature)

    def at_temperature(self, log_probabilities: Tensor, tails: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probabilities `[... k]` softened, and the tail's `[...]`: together they sum to 1.

        At a temperature that the tail is not kept for there must be none: see `check_temperature`.
        """
        if temperature in self.temperatures:
            tail = tails[..., self.temperatures.index(temperature), None]
        else:
            tail = torch.full_like(tails[..., :1], -torch.inf)
        both = torch.cat([log_probabilities.float() / temperature, tail], -1).log_softmax(-1)
        return both[..., :-1], both[..., -1]

    def check_temperature(self, temperature: float, columns: int) -> None:
        if self.k >= columns or temperature in self.temperatures:
            return
        known = ", ".join(f"{t:g}" for t in self.temperatures)
        raise SettingError(
            f"temperature={temperature:g}: the cache keeps the {self.k} likeliest columns of each row and the rest as "
            f"one outcome, for temperature {known}; what the rest is at another one does not follow from that. Train "
            f"at one of these, without a schedule, or build the cache with TopK(temperatures=({temperature:g},)) or "
            "Dense()."
        )


STORES[TopK.name] = TopK


CELLS = 1 << 24  # numbers that are held at once to draw from rows: 128 MB of float64


@dataclass(frozen=True)
class Sampled:
    """Columns drawn with replacement, each with the weight that makes their mean the teacher's distribution.

    Anshumann et al. 2025, Sparse Logit Sampling (random sampling knowledge distillation): proposals r ∝
    p^proposal_power, weights p / (k r). The gradient of the forward KL is then the teacher's on average, which that of
    no top-k is. Where we differ: draws are stratified (`functional/sparse.py`), by which no estimate varies more, and
    one number a row (the mean of log p over the draws) makes the reported value a divergence. Weights are not divided
    by their sum: it is 1 on average, and to divide would bring a bias. Repeated draws are put together when read.

    The draws follow from the seed and the content of the example: the bytes depend neither on processes nor on how
    often a build was interrupted. Training at another temperature is refused, and so are divergences but forward_kl.

    Args:
        samples: draws a row.
        temperature: at which it can be trained with.
        proposal_power: above 0, at most 1; at 1 all weights are equal and are not kept.
        seed: of the draws.

    Raises:
        SettingError: a setting outside these bounds.

    >>> sum(field.bytes for field in Sampled(32).fields(32_000).values())
    68
    """

    samples: int = 32
    temperature: float = 1.0
    proposal_power: float = 1.0
    seed: int = 0
    name = "sampled"
    is_sparse = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "temperature", float(self.temperature))
        object.__setattr__(self, "proposal_power", float(self.proposal_power))
        if self.samples < 1 or self.temperature <= 0 or not 0 < self.proposal_power <= 1:
            raise SettingError(
                f"Sampled(samples={self.samples}, temperature={self.temperature:g}, proposal_power="
                f"{self.proposal_power:g}): at least one sample, a temperature above 0, and a power above 0 and at "
                "most 1 (above 1 an unlikely column has a weight without bound)."
            )
        check_seed(self.seed, "Sampled")

    def settings(self) -> dict[str, Any]:
        return asdict(self)

    def fields(self, columns: int) -> dict[str, Field]:
        weights = {} if self.proposal_power == 1 else {"weights": Field(np.float32, self.samples)}
        return {
            "ids": Field(id_type(columns), self.samples),
            **weights,
            "mean_log_probability": Field(np.float32, 1),
        }

    def encode(self, rows: Tensor, keys: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
        """ids, ascending; their weights where they are not 1 / k; and the mean of log p, each by its weight."""
        at = uniforms(keys, counts, self.samples, seed=self.seed)
        many = max(1, CELLS // max(rows.shape[1], BLOCK * self.samples))
        parts = [self._drawn(some, u) for some, u in zip(rows.split(many), at.split(many), strict=True)]
        types = self.fields(rows.shape[1])
        return {name: np.concatenate([part[name] for part in parts]).astype(types[name].dtype) for name in types}

    def _drawn(self, rows: Tensor, at: Tensor) -> dict[str, np.ndarray]:
        log_p = (in_full_precision(rows.detach()) / self.temperature).log_softmax(-1)
        proposals = (log_p if self.proposal_power == 1 else self.proposal_power * log_p).exp()
        ids = draw_columns(proposals, at.to(rows.device))
        known = log_p.gather(-1, ids)
        weights = torch.full_like(known, 1 / self.samples)
        if self.proposal_power != 1:
            total = proposals.sum(-1, keepdim=True, dtype=torch.float64).float()
            weights = weights * total * ((1 - self.proposal_power) * known).exp()
        mean = (weights * known).sum(-1, keepdim=True) / weights.sum(-1, keepdim=True)
        found = {"ids": ids, "weights": weights, "mean_log_probability": mean}
        return {name: value.cpu().numpy() for name, value in found.items()}

    def tensor(self, name: str, stored: np.ndarray) -> Tensor:
        return torch.from_numpy(stored.astype(np.int32) if name == "ids" else stored)

    def sparse_rows(self, laid: Mapping[str, Tensor], temperature: float) -> SparseRows:
        ids, mean = laid["ids"].long(), laid["mean_log_probability"]
        weights = laid["weights"] if "weights" in laid else torch.full_like(mean, 1 / self.samples).expand(ids.shape)
        ids, weights = merge_repeats(ids, weights)
        none = torch.full_like(mean[..., 0], -torch.inf)
        return SparseRows(ids, mean.expand(ids.shape), none, temperature, weights)

    def check_temperature(self, temperature: float, columns: int) -> None:
        check_same_temperature(self, temperature)


def check_same_temperature(store: Any, temperature: float) -> None:
    """Raises:
    SettingError: another than it was drawn at.
    """
    if temperature != store.temperature:
        kind = type(store).__name__
        raise SettingError(
            f"temperature={temperature:g}: the cache keeps columns that were drawn from the teacher's probabilities at "
            f"temperature {store.temperature:g}; at another one they would be drawn otherwise. Train at "
            f"{store.temperature:g}, without a schedule, or build the cache with {kind}(temperature={temperature:g}) "
            "or Dense()."
        )


STORES[Sampled.name] = Sampled


_DTYPES = {"float16": np.float16, "float32": np.float32}


@dataclass(frozen=True)
class Hybrid:
    """The k largest columns of each row with their probabilities, and samples of the rest by what it weighs in all.

    Exact on what is listed, and on average the teacher's distribution on the rest: Σ over the k of p δ, plus the tail's
    probability / samples for each draw. With k = v it is the live teacher. Draws, temperatures and divergences are as
    with `Sampled`.

    Args:
        k: columns kept of each row.
        samples: draws from the others.
        temperature: at which it can be trained with.
        dtype: of the log-probabilities of the k, "float16" (off by 2^-12 of log p) or "float32".
        seed: of the draws.

    Raises:
        SettingError: a setting outside these bounds.

    >>> sum(field.bytes for field in Hybrid(16, 16).fields(32_000).values())
    104
    """

    k: int = 16
    samples: int = 16
    temperature: float = 1.0
    dtype: str = "float16"
    seed: int = 0
    name = "hybrid"
    is_sparse = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "temperature", float(self.temperature))
        if self.k < 1 or self.samples < 1 or self.temperature <= 0:
            raise SettingError(
                f"Hybrid(k={self.k}, samples={self.samples}, temperature={self.temperature:g}): k and samples are at "
                "least 1, and the temperature is above 0. For samples alone take Sampled, for none TopK."
            )
        if self.dtype not in _DTYPES:
            hint = did_you_mean(self.dtype, _DTYPES, DTYPE_ALIASES)
            raise SettingError(f"Hybrid(dtype={self.dtype!r}): allowed are {', '.join(_DTYPES)}.{hint}")
        check_seed(self.seed, "Hybrid")

    def settings(self) -> dict[str, Any]:
        return asdict(self)

    def fields(self, columns: int) -> dict[str, Field]:
        kept = min(self.k, columns)
        return {
            "ids": Field(id_type(columns), kept),
            "log_probabilities": Field(_DTYPES[self.dtype], kept),
            "tail": Field(np.float32, 1),
            "drawn": Field(id_type(columns), self.samples),
            "mean_log_probability": Field(np.float32, 1),
        }

    def encode(self, rows: Tensor, keys: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
        """The k and their log p, log of what all others weigh, draws of these, and the mean of log p over the draws."""
        at = uniforms(keys, counts, self.samples, seed=self.seed)
        many = max(1, CELLS // max(rows.shape[1], BLOCK * self.samples))
        parts = [self._kept_and_drawn(some, u) for some, u in zip(rows.split(many), at.split(many), strict=True)]
        types = self.fields(rows.shape[1])
        return {name: np.concatenate([part[name] for part in parts]).astype(types[name].dtype) for name in types}

    def _kept_and_drawn(self, rows: Tensor, at: Tensor) -> dict[str, np.ndarray]:
        log_p = (in_full_precision(rows.detach()) / self.temperature).log_softmax(-1)
        kept, ids = log_p.topk(min(self.k, log_p.shape[-1]), dim=-1)
        others = log_p.scatter(-1, ids, -torch.inf)
        tail = others.logsumexp(-1, keepdim=True)
        chosen = draw_columns((others - tail.clamp(min=BLOCKED)).exp(), at.to(rows.device))
        mean = log_p.gather(-1, chosen).mean(-1, keepdim=True)
        mean = torch.where(tail > -torch.inf, mean, 0.0)  # none was drawn
        found = {"ids": ids, "log_probabilities": kept, "tail": tail, "drawn": chosen, "mean_log_probability": mean}
        return {name: value.cpu().numpy() for name, value in found.items()}

    def tensor(self, name: str, stored: np.ndarray) -> Tensor:
        return torch.from_numpy(stored.astype(np.int32) if name in ("ids", "drawn") else stored)

    def sparse_rows(self, laid: Mapping[str, Tensor], temperature: float) -> SparseRows:
        tail = laid["tail"]
        both = torch.cat([laid["log_probabilities"].float(), tail], -1).log_softmax(-1)  # rounding left it beside 1
        kept, share = both[..., :-1], both[..., -1:].exp() / self.samples
        impossible = kept == -torch.inf  # listed where fewer are possible than are listed
        chosen, shares = merge_repeats(laid["drawn"].long(), share.expand(laid["drawn"].shape))
        chosen = chosen.masked_fill(tail == -torch.inf, -1)  # nothing is left to draw from
        mean = laid["mean_log_probability"].expand(chosen.shape)
        return SparseRows(
            ids=torch.cat([laid["ids"].long().masked_fill(impossible, -1), chosen], -1),
            log_probabilities=torch.cat([kept.masked_fill(impossible, 0.0), mean], -1),
            log_tail=torch.full_like(tail[..., 0], -torch.inf),
            temperature=temperature,
            weights=torch.cat([kept.exp(), shares], -1),
        )

    def check_temperature(self, temperature: float, columns: int) -> None:
        check_same_temperature(self, temperature)


STORES[Hybrid.name] = Hybrid
