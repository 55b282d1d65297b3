"""Reading recordings as data sets hold them: a cell → mono samples at one rate, and cells → a model's features.

Files are decoded by soundfile (WAV, FLAC, OGG, MP3) and resampled by soxr; both come with the extra `audio` and are
imported where a recording needs them. Nothing is downloaded.
"""

from __future__ import annotations

import inspect
import io
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_distill.errors import DataError, require

logger = logging.getLogger(__name__)
_MOST_CHANNELS = 32  # an array with more rows and more columns than this is a spectrogram or a stack of recordings
_AST_FRAME, _AST_STEP = 0.025, 0.010  # seconds, fixed in its feature extractor
_MIXED, _RESAMPLED, _CUT = range(3)  # what is reported once


class Recording(NamedTuple):
    """A decoded recording.

    Attributes:
        samples: `[n]` float32; several channels are mixed to one by their mean.
        sampling_rate: in Hz; None for a bare array, whose rate is unknown.
        channels: how many the recording had.
    """

    samples: np.ndarray
    sampling_rate: float | None
    channels: int


def read_audio(cell: Any, sampling_rate: int, *, name: str = "the recording") -> np.ndarray:
    """Returns one recording as mono samples `[n]`, float32, at `sampling_rate`.

    Args:
        cell: whatever `datasets` gives for audio, or a path, or the samples; see `read_recording`.
        sampling_rate: the rate of the result in Hz. A bare array has an unknown rate and is taken to have this one.
        name: what an error calls the recording.

    Raises:
        DataError: the recording is empty, cannot be decoded, or holds NaN or infinity.
        MissingExtraError: soundfile or soxr is needed and not installed.

    >>> read_audio({"array": [[0.0, 0.5], [1.0, 0.5]], "sampling_rate": 16000}, 16000)
    array([0.5, 0.5], dtype=float32)
    """
    return _resampled(read_recording(cell, name=name), sampling_rate, name)


def read_recording(cell: Any, *, name: str = "the recording") -> Recording:
    """Decodes one recording, at its own rate.

    Args:
        cell: one of
            - `{"bytes": ..., "path": ...}`, as `datasets.Audio(decode=False)` gives it;
            - `{"array": ..., "sampling_rate": ...}`;
            - a decoder of torchcodec, as `datasets.Audio()` gives it;
            - a path, or the bytes of a file;
            - an array, a tensor or a list of samples: `[n]`, `[channels n]` or `[n channels]`. Integers of 8, 16 or 32
              bits are scaled to [-1, 1).
        name: what an error calls the recording.

    Raises:
        DataError: the recording is empty, cannot be decoded, or holds NaN or infinity.
        MissingExtraError: soundfile is needed and not installed.
    """
    samples: Any = None
    rate: Any = None
    if isinstance(cell, (str, os.PathLike, bytes)):
        samples, rate = _decoded(cell, name)
    elif isinstance(cell, (np.ndarray, Tensor, list, tuple)):
        samples = cell
    elif hasattr(cell, "get_all_samples"):  # torchcodec
        decoded = cell.get_all_samples()
        samples, rate = decoded.data, decoded.sample_rate
    elif isinstance(cell, Mapping) and cell.get("array") is None and (cell.get("bytes") or cell.get("path")):
        samples, rate = _decoded(cell.get("bytes") or cell["path"], name)
    else:
        try:
            samples, rate = cell["array"], cell["sampling_rate"]
        except (TypeError, KeyError, IndexError) as error:
            held = f" with {sorted(map(str, cell))}" if isinstance(cell, Mapping) else ""
            raise DataError(
                f"{name} is a {type(cell).__name__}{held}, which is no recording. Give what datasets gives (a dict "
                "with array and sampling_rate, or with bytes or path), a path, or an array of samples."
            ) from error
        if rate is None or samples is None:
            raise DataError(f"{name} has array and sampling_rate, one of which is None. Give both.")
    channels = _by_channel(samples, name)
    if channels.shape[1] == 0:
        raise DataError(f"{name} holds no samples. Leave empty recordings out of the dataset.")
    mono = channels[0] if len(channels) == 1 else channels.mean(0, dtype=np.float32)
    wrong = int((~np.isfinite(mono)).sum())
    if wrong:
        raise DataError(
            f"{name} holds NaN or infinity in {wrong} of {len(mono)} samples. Repair the recording or leave it out."
        )
    return Recording(mono, None if rate is None else float(rate), len(channels))


class AudioFeatures:
    """Turns cells of an audio column into the inputs of a model, by its feature extractor.

    The features of a recording do not depend on the other recordings of its batch: where those of the extractor do
    (`Wav2Vec2FeatureExtractor` without an attention mask normalises the padding too), each recording is extracted by
    itself and then padded. It logs once that recordings are mixed to one channel, resampled, or cut at the end of the
    extractor's window, with the counts of that batch; the worker processes of a data loader share this memory.

    Args:
        extractor: a feature extractor of transformers, or a processor that holds one.
        column: the name of the column, for messages.

    Raises:
        DataError: `extractor` reads no audio.

    >>> from transformers import Wav2Vec2FeatureExtractor
    >>> features = AudioFeatures(Wav2Vec2FeatureExtractor())
    >>> features([[0.5, 0.25, -0.5], {"array": [1.0, 0.0], "sampling_rate": 16000}])["input_values"].shape
    torch.Size([2, 3])
    """

    def __init__(self, extractor: Any, column: str = "audio") -> None:
        self.extractor = getattr(extractor, "feature_extractor", extractor)
        self.column = column
        if getattr(self.extractor, "sampling_rate", None) is None:
            raise DataError(
                f"{column}: a {type(extractor).__name__} has no sampling_rate, so it reads no audio. Give a feature "
                "extractor (AutoFeatureExtractor.from_pretrained), or a processor that holds one."
            )
        # In shared memory: what one worker process has reported is not reported by the next.
        self._reported = torch.zeros(3, dtype=torch.bool).share_memory_()
        self._mixes_examples: bool | None = None  # None: not tried yet

    def __call__(self, cells: Sequence[Any]) -> dict[str, Tensor]:
        """Returns the features of these recordings, with a leading batch axis.

        Raises:
            DataError: a recording is empty, cannot be decoded, or holds NaN or infinity; the example is named.
            MissingExtraError: soundfile or soxr is needed and not installed.
        """
        waves = self.waves(cells)
        self._report_cut(waves)
        if len({len(wave) for wave in waves}) == 1 or not self._neighbours_matter():
            return self._features(waves)
        return _padded([self._features([wave]) for wave in waves], self.extractor)

    def waves(self, cells: Sequence[Any]) -> list[np.ndarray]:
        """Returns the mono samples of each cell at the extractor's rate. Raises as `__call__`."""
        names = [f"{self.column}: {_named(cell, number)}" for number, cell in enumerate(cells)]
        found = [read_recording(cell, name=name) for cell, name in zip(cells, names, strict=True)]
        rate = self.extractor.sampling_rate
        mixed = [one.channels for one in found if one.channels > 1]
        if mixed:
            self._report(
                _MIXED,
                f"{len(mixed)} of {len(found)} recordings of this batch have several channels (up to {max(mixed)}); "
                "they are mixed to one by their mean.",
            )
        others = sorted({one.sampling_rate for one in found if one.sampling_rate not in (None, rate)}, key=float)
        if others:
            rates = ", ".join(f"{other:g}" for other in others)
            self._report(_RESAMPLED, f"recordings at {rates} Hz are resampled to the model's {rate} Hz.")
        return [_resampled(one, rate, name) for one, name in zip(found, names, strict=True)]

    def _features(self, waves: list[np.ndarray]) -> dict[str, Tensor]:
        extractor = self.extractor
        knob = inspect.signature(extractor.__call__).parameters.get("padding")
        # Its own padding where it has one (Whisper's 30 seconds).
        padding = {} if knob is None else {"padding": knob.default or True}
        made = extractor(waves, sampling_rate=extractor.sampling_rate, return_tensors="pt", **padding)
        return {name: torch.as_tensor(value) for name, value in made.items() if value is not None}

    def _neighbours_matter(self) -> bool:
        """Whether the features of a recording change beside a longer one. Tried once, with noise."""
        if self._mixes_examples is None:
            noise = np.random.default_rng(0).normal(scale=0.1, size=self.extractor.sampling_rate).astype(np.float32)
            short = noise[: len(noise) // 4]
            alone, beside = self._features([short]), self._features([short, noise])
            self._mixes_examples = any(
                not torch.allclose(
                    beside[name][0][tuple(map(slice, value.shape[1:]))].double(), value[0].double(), atol=1e-4
                )
                for name, value in alone.items()
            )
        return self._mixes_examples

    def _report(self, what: int, text: str, level: int = logging.INFO) -> None:
        if not self._reported[what]:
            self._reported[what] = True
            logger.log(level, f"{self.column}: {text} (This is logged once.)")

    def _report_cut(self, waves: list[np.ndarray]) -> None:
        window, rate = _window(self.extractor), self.extractor.sampling_rate
        if window is None or self._reported[_CUT]:
            return
        longer = [wave for wave in waves if len(wave) > window]
        if longer and self._is_cut(longer[0], window):
            longest = max(map(len, longer)) / rate
            self._report(
                _CUT,
                f"{len(longer)} of {len(waves)} recordings of this batch are longer than the {window / rate:g} s that "
                f"the {type(self.extractor).__name__} reads (the longest has {longest:.1f} s); what lies beyond is cut "
                "off. Split long recordings, or leave them out, if it matters.",
                logging.WARNING,
            )

    def _is_cut(self, wave: np.ndarray, window: int) -> bool:
        """Whether the end of this recording changes nothing."""
        whole, part = self._features([wave]), self._features([wave[:window]])
        return all(torch.equal(value, part[name]) for name, value in whole.items())


def _named(cell: Any, number: int) -> str:
    path = cell.get("path") if isinstance(cell, Mapping) else cell
    where = f" ({os.fspath(path)})" if isinstance(path, (str, os.PathLike)) else ""
    return f"example {number} of the batch{where}"


def _decoded(source: str | os.PathLike[str] | bytes, name: str) -> tuple[np.ndarray, float]:
    """The channels `[c n]` of an audio file, and its rate."""
    soundfile = require("soundfile", extra="audio")
    if not isinstance(source, bytes) and not os.path.isfile(source):
        raise DataError(f"{name}: there is no file {os.fspath(source)!r}. Give a path that this process can open.")
    try:
        samples, rate = soundfile.read(
            io.BytesIO(source) if isinstance(source, bytes) else source, dtype="float32", always_2d=True
        )
    except (soundfile.SoundFileError, TypeError) as error:  # TypeError: a name that ends in .raw
        why = getattr(error, "error_string", error)
        raise DataError(
            f"{name} cannot be decoded: {why} soundfile reads WAV, FLAC, OGG and MP3. Convert the file, or leave the "
            "example out."
        ) from error
    return samples.T, rate


def _by_channel(samples: Any, name: str) -> np.ndarray:
    """`[c n]` float32, from samples in either order of axes, in floats or in integers of a known width."""
    try:
        found = np.asarray(samples.cpu() if isinstance(samples, Tensor) else samples)
    except ValueError as error:
        raise DataError(f"{name}: its channels have different lengths.") from error
    if found.ndim not in (1, 2) or found.dtype.kind not in "fiu" or (found.ndim == 2 and min(found.shape) == 0):
        if found.size == 0:
            return np.zeros((1, 0), dtype=np.float32)
        raise DataError(
            f"{name} is an array of shape {list(found.shape)} of {found.dtype}. Give numbers [n], [channels n] or "
            "[n channels]."
        )
    if found.ndim == 2:
        found = found if found.shape[0] <= found.shape[1] else found.T
        if len(found) > _MOST_CHANNELS:
            raise DataError(
                f"{name} is an array of shape {list(np.shape(samples))}, and no recording has {len(found)} channels. "
                "Give samples [n] or [channels n]; features that are extracted already go into a column of the "
                "model's own input, such as teacher_input_features."
            )
    return np.atleast_2d(_scaled(found, name))


def _scaled(samples: np.ndarray, name: str) -> np.ndarray:
    """Integers as fractions of the largest one of their type."""
    if samples.dtype.kind == "f":
        return samples.astype(np.float32, copy=False)
    if samples.dtype == np.uint8:
        return (samples.astype(np.float32) - 128) / 128
    if samples.dtype in (np.int8, np.int16, np.int32):
        return (samples / -float(np.iinfo(samples.dtype).min)).astype(np.float32)
    if samples.size and np.abs(samples).max() > 1:
        raise DataError(
            f"{name} holds whole numbers up to {np.abs(samples).max()} as {samples.dtype}, so the loudest possible "
            "sample is not known. Give floats between -1 and 1, or an array of int16 or int32."
        )
    return samples.astype(np.float32)


def _resampled(recording: Recording, rate: int, name: str) -> np.ndarray:
    if recording.sampling_rate in (None, rate):
        return recording.samples
    made = require("soxr", extra="audio").resample(recording.samples, recording.sampling_rate, rate)
    if len(made) == 0:
        raise DataError(
            f"{name}: {len(recording.samples)} samples at {recording.sampling_rate:g} Hz are less than one at {rate} "
            "Hz. Leave the recording out."
        )
    return np.asarray(made, dtype=np.float32)


def _window(extractor: Any) -> int | None:
    """How many samples an extractor reads before it cuts, by the names that transformers' extractors give it."""
    samples, frames = getattr(extractor, "n_samples", None), getattr(extractor, "max_length", None)
    if isinstance(samples, int):  # Whisper's
        return samples
    if isinstance(frames, int) and hasattr(extractor, "num_mel_bins"):  # Audio Spectrogram Transformer's
        return round((_AST_FRAME + _AST_STEP * (frames - 1)) * extractor.sampling_rate)
    return None


def _padded(features: list[dict[str, Tensor]], extractor: Any) -> dict[str, Tensor]:
    """One batch of features `[1 ...]` that were extracted one by one; masks are padded with 0."""
    value, side = getattr(extractor, "padding_value", 0.0), getattr(extractor, "padding_side", "right")
    batch = {}
    for name in features[0]:
        each = [one[name] for one in features]
        longest = [max(sizes) for sizes in zip(*(one.shape for one in each), strict=True)]
        fill = value if each[0].is_floating_point() and not name.endswith("mask") else 0
        batch[name] = torch.cat([_lengthened(one, longest, fill, side) for one in each])
    return batch


def _lengthened(x: Tensor, sizes: Sequence[int], fill: float, side: str) -> Tensor:
    missing = [wanted - size for wanted, size in zip(sizes, x.shape, strict=True)]
    if not any(missing):
        return x
    pads = [pair for count in reversed(missing) for pair in ((count, 0) if side == "left" else (0, count))]
    return F.pad(x, pads, value=fill)
