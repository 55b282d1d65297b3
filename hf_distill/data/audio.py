"""Recordings as datasets hold them: mono samples at one rate, and the input features of a model.

Files are decoded by soundfile (WAV, FLAC, OGG, MP3) and resampled by soxr; both come with the extra `audio` and are
imported when a recording needs them. Nothing is downloaded.
"""

from __future__ import annotations

import inspect
import io
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import SequenceFeatureExtractor

from hf_distill._types import ProcessingClass
from hf_distill.errors import DataError, require

logger = logging.getLogger(__name__)
_MAX_CHANNELS = 32  # an array with more rows and more columns than this is a spectrogram or a stack of recordings
_AST_FRAME, _AST_STEP = 0.025, 0.010  # seconds, fixed in its feature extractor
_MIXED, _RESAMPLED, _CUT = range(3)  # reported once each


@runtime_checkable
class AudioDecoder(Protocol):
    """A decoder of torchcodec, as `datasets.Audio()` gives it."""

    def get_all_samples(self) -> Any: ...


AudioCell: TypeAlias = (
    str | os.PathLike[str] | bytes | np.ndarray | Tensor | Sequence[Any] | Mapping[str, Any] | AudioDecoder | None
)
"""One recording; see `read_recording`. Missing and unreadable recordings raise."""


class Recording(NamedTuple):
    """A decoded recording.

    Attributes:
        samples: `[n]` float32, the mean of the channels.
        sampling_rate: in Hz; None for a bare array, whose rate is unknown.
        channels: number of channels before mixing.
    """

    samples: np.ndarray
    sampling_rate: float | None
    channels: int


def read_audio(cell: AudioCell, sampling_rate: int, *, name: str = "the recording") -> np.ndarray:
    """Return one recording as mono samples `[n]`, float32, at `sampling_rate`.

    Args:
        cell: any recording that `read_recording` decodes.
        sampling_rate: rate of the result in Hz, and the assumed rate of a bare array.
        name: name of the recording in error messages.

    Raises:
        DataError: if the recording is empty, cannot be decoded, or holds NaN or infinity.
        MissingExtraError: if soundfile or soxr is needed and not installed.

    >>> read_audio({"array": [[0.0, 0.5], [1.0, 0.5]], "sampling_rate": 16000}, 16000)
    array([0.5, 0.5], dtype=float32)
    """
    return _resample(read_recording(cell, name=name), sampling_rate, name)


def read_recording(cell: AudioCell, *, name: str = "the recording") -> Recording:
    """Return one recording, decoded at its own rate.

    Args:
        cell: one of
            - `{"bytes": ..., "path": ...}`, as `datasets.Audio(decode=False)` gives it;
            - `{"array": ..., "sampling_rate": ...}`;
            - a decoder of torchcodec, as `datasets.Audio()` gives it;
            - a path, or the bytes of a file;
            - an array, a tensor or a list of samples: `[n]`, `[channels n]` or `[n channels]`. Integers of 8, 16 or 32
              bits are scaled to [-1, 1).
        name: name of the recording in error messages.

    Raises:
        DataError: if the recording is empty, cannot be decoded, or holds NaN or infinity.
        MissingExtraError: if soundfile is needed and not installed.
    """
    samples, rate = _samples_and_rate(cell, name)
    channels = _by_channel(samples, name)
    if channels.shape[1] == 0:
        raise DataError(f"{name} holds no samples. Leave empty recordings out of the dataset.")
    mono = channels[0] if len(channels) == 1 else channels.mean(0, dtype=np.float32)
    wrong = int((~np.isfinite(mono)).sum())
    if wrong:
        raise DataError(f"{name} holds NaN or infinity in {wrong} of {len(mono)} samples. Repair it or leave it out.")
    return Recording(mono, None if rate is None else float(rate), len(channels))


class AudioFeatures:
    """Computes a model's inputs from the cells of an audio column with its feature extractor.

    The features of a recording do not depend on the other recordings in its batch: if the extractor's do
    (`Wav2Vec2FeatureExtractor` without an attention mask normalises the padding too), each recording is extracted
    alone and then padded. Mixing to one channel, resampling, and cutting at the end of the extractor's window are
    logged once each, with the counts of that batch; the workers of a data loader share this memory.

    Args:
        extractor: a feature extractor of transformers, or a processor with one.
        column: name of the column in messages.

    Raises:
        DataError: if `extractor` does not read audio.

    >>> from transformers import Wav2Vec2FeatureExtractor
    >>> features = AudioFeatures(Wav2Vec2FeatureExtractor())
    >>> features([[0.5, 0.25, -0.5], {"array": [1.0, 0.0], "sampling_rate": 16000}])["input_values"].shape
    torch.Size([2, 3])
    """

    def __init__(self, extractor: ProcessingClass | None, column: str = "audio") -> None:
        self.extractor: Any = getattr(extractor, "feature_extractor", extractor)
        if getattr(self.extractor, "sampling_rate", None) is None:
            raise DataError(
                f"{column}: a {type(extractor).__name__} has no sampling_rate, so it reads no audio. Give a feature "
                "extractor (AutoFeatureExtractor.from_pretrained), or a processor with one."
            )
        self.column = column
        # In shared memory, so that each message is logged by one worker process only.
        self._reported = torch.zeros(3, dtype=torch.bool).share_memory_()
        self._mixes_examples: bool | None = None  # None: not tried yet

    def __call__(self, cells: Sequence[AudioCell]) -> dict[str, Tensor]:
        """Return the features of these recordings, with a leading batch axis.

        Raises:
            DataError: if a recording is empty, cannot be decoded, or holds NaN or infinity; the example is named.
            MissingExtraError: if soundfile or soxr is needed and not installed.
        """
        waves = self.waves(cells)
        self._report_cut(waves)
        if len({len(wave) for wave in waves}) == 1 or not self._depends_on_neighbours():
            return self._features(waves)
        return _padded([self._features([wave]) for wave in waves], self.extractor)

    def waves(self, cells: Sequence[AudioCell]) -> list[np.ndarray]:
        """Return the mono samples of each cell at the extractor's rate. Raises as `__call__`."""
        names = [f"{self.column}: {_example_name(cell, number)}" for number, cell in enumerate(cells)]
        recordings = [read_recording(cell, name=name) for cell, name in zip(cells, names, strict=True)]
        mixed = [recording.channels for recording in recordings if recording.channels > 1]
        if mixed:
            self._report(
                _MIXED,
                f"{len(mixed)} of {len(recordings)} recordings of this batch have several channels (up to "
                f"{max(mixed)}); their mean is used.",
            )
        rate = self.extractor.sampling_rate
        others = {recording.sampling_rate or rate for recording in recordings} - {rate}
        if others:
            rates = ", ".join(f"{other:g}" for other in sorted(others))
            self._report(_RESAMPLED, f"recordings at {rates} Hz are resampled to the model's {rate} Hz.")
        return [_resample(recording, rate, name) for recording, name in zip(recordings, names, strict=True)]

    def _features(self, waves: list[np.ndarray]) -> dict[str, Tensor]:
        parameter = inspect.signature(self.extractor.__call__).parameters.get("padding")
        # The extractor's own default if it pads (Whisper's 30 seconds).
        padding = {} if parameter is None else {"padding": parameter.default or True}
        features = self.extractor(waves, sampling_rate=self.extractor.sampling_rate, return_tensors="pt", **padding)
        return {name: torch.as_tensor(value) for name, value in features.items() if value is not None}

    def _depends_on_neighbours(self) -> bool:
        """Return whether a longer recording in the batch changes the features. Tried once, with noise."""
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

    def _report(self, event: int, text: str, level: int = logging.INFO) -> None:
        if not self._reported[event]:
            self._reported[event] = True
            logger.log(level, f"{self.column}: {text} (This is logged once.)")

    def _report_cut(self, waves: list[np.ndarray]) -> None:
        window, rate = _window(self.extractor), self.extractor.sampling_rate
        if window is None or self._reported[_CUT]:
            return
        longer = [wave for wave in waves if len(wave) > window]
        if longer and self._is_cut(longer[0], window):
            self._report(
                _CUT,
                f"{len(longer)} of {len(waves)} recordings of this batch are longer than the {window / rate:g} s that "
                f"the {type(self.extractor).__name__} reads (the longest has {max(map(len, longer)) / rate:.1f} s); "
                "the rest is cut off. Split long recordings, or leave them out.",
                logging.WARNING,
            )

    def _is_cut(self, wave: np.ndarray, window: int) -> bool:
        """Return whether the end of this recording changes no feature."""
        whole, part = self._features([wave]), self._features([wave[:window]])
        return all(torch.equal(value, part[name]) for name, value in whole.items())


def _example_name(cell: AudioCell, number: int) -> str:
    match cell:
        case str() | os.PathLike() as path:
            return f"example {number} of the batch ({os.fspath(path)})"
        case {"path": str() | os.PathLike() as path}:
            return f"example {number} of the batch ({os.fspath(path)})"
    return f"example {number} of the batch"


def _samples_and_rate(cell: AudioCell, name: str) -> tuple[Any, Any]:
    match cell:
        case str() | os.PathLike() | bytes():
            return _decode(cell, name)
        case np.ndarray() | Tensor() | list() | tuple():
            return cell, None
        case Mapping() if cell.get("array") is None and (cell.get("bytes") or cell.get("path")):
            return _decode(cell.get("bytes") or cell["path"], name)
        case AudioDecoder():
            decoded = cell.get_all_samples()
            return decoded.data, decoded.sample_rate
    try:
        samples, rate = cell["array"], cell["sampling_rate"]  # type: ignore[index, call-overload]  # raises TypeError
    except (TypeError, KeyError, IndexError) as error:
        keys = f" with {sorted(map(str, cell))}" if isinstance(cell, Mapping) else ""
        raise DataError(
            f"{name} is a {type(cell).__name__}{keys}, which is no recording. Give a dict with array and "
            "sampling_rate, or with bytes or path (as datasets does), a path, or an array of samples."
        ) from error
    if rate is None or samples is None:
        raise DataError(f"{name} has array and sampling_rate, one of which is None. Give both.")
    return samples, rate


def _decode(source: str | os.PathLike[str] | bytes, name: str) -> tuple[np.ndarray, float]:
    """Return the channels `[c n]` of an audio file, and its rate."""
    soundfile = require("soundfile", extra="audio")
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    if file is source and not os.path.isfile(file):
        raise DataError(f"{name}: there is no file {os.fspath(file)!r}. Give a path that this process can open.")
    try:
        samples, rate = soundfile.read(file, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, TypeError) as error:  # TypeError: a name that ends in .raw
        why = getattr(error, "error_string", error)
        raise DataError(
            f"{name} cannot be decoded: {why} soundfile reads WAV, FLAC, OGG and MP3. Convert the file, or leave the "
            "example out."
        ) from error
    return samples.T, rate


def _by_channel(samples: Any, name: str) -> np.ndarray:
    """Return `[c n]` float32, from samples with either order of axes, as floats or integers."""
    try:
        array = np.asarray(samples.cpu() if isinstance(samples, Tensor) else samples)
    except ValueError as error:
        raise DataError(f"{name}: its channels have different lengths.") from error
    if array.size == 0:
        return np.zeros((1, 0), dtype=np.float32)
    if array.ndim not in (1, 2) or array.dtype.kind not in "fiu":
        raise DataError(
            f"{name} is an array of shape {list(array.shape)} of {array.dtype}. Give numbers [n], [channels n] or "
            "[n channels]."
        )
    if min(array.shape) > _MAX_CHANNELS and array.ndim == 2:
        raise DataError(
            f"{name} is an array of shape {list(array.shape)}, and no recording has {min(array.shape)} channels. Give "
            "samples [n] or [channels n]; extracted features go into a column of the model's own input, such as "
            "teacher_input_features."
        )
    scaled = np.atleast_2d(_scaled(array, name))
    return scaled if scaled.shape[0] <= scaled.shape[1] else scaled.T


def _scaled(samples: np.ndarray, name: str) -> np.ndarray:
    """Return float32 samples; integers are divided by the largest of their type."""
    if samples.dtype == np.uint8:
        return (samples.astype(np.float32) - 128) / 128
    if samples.dtype in (np.int8, np.int16, np.int32):
        return (samples / -float(np.iinfo(samples.dtype).min)).astype(np.float32)
    if samples.dtype.kind != "f" and np.abs(samples).max() > 1:
        raise DataError(
            f"{name} holds whole numbers up to {np.abs(samples).max()} as {samples.dtype}, so their scale is unknown. "
            "Give floats between -1 and 1, or an array of int16 or int32."
        )
    return samples.astype(np.float32, copy=False)


def _resample(recording: Recording, rate: int, name: str) -> np.ndarray:
    if recording.sampling_rate in (None, rate):
        return recording.samples
    resampled = require("soxr", extra="audio").resample(recording.samples, recording.sampling_rate, rate)
    if len(resampled) == 0:
        raise DataError(
            f"{name}: {len(recording.samples)} samples at {recording.sampling_rate:g} Hz are less than one at {rate} "
            "Hz. Leave the recording out."
        )
    return np.asarray(resampled, dtype=np.float32)


def _window(extractor: SequenceFeatureExtractor) -> int | None:
    """Return how many samples an extractor reads before it cuts, from the attributes of transformers' extractors."""
    settings = vars(extractor)
    match settings:
        case {"n_samples": int() as samples}:  # Whisper
            return samples
        case {"max_length": int() as frames, "num_mel_bins": _}:  # Audio Spectrogram Transformer
            return round((_AST_FRAME + _AST_STEP * (frames - 1)) * extractor.sampling_rate)
    return None


def _padded(features: list[dict[str, Tensor]], extractor: SequenceFeatureExtractor) -> dict[str, Tensor]:
    """Return one batch of features `[1 ...]` that were extracted one by one; masks are padded with 0."""
    batch = {}
    for name in features[0]:
        rows = [feature[name] for feature in features]
        longest = [max(sizes) for sizes in zip(*(row.shape for row in rows), strict=True)]
        fill = extractor.padding_value if rows[0].is_floating_point() and not name.endswith("mask") else 0
        batch[name] = torch.cat([_lengthened(row, longest, fill, extractor.padding_side) for row in rows])
    return batch


def _lengthened(x: Tensor, sizes: Sequence[int], fill: float, side: str) -> Tensor:
    missing = [size - length for size, length in zip(sizes, x.shape, strict=True)]
    pads = [pair for count in reversed(missing) for pair in ((count, 0) if side == "left" else (0, count))]
    return F.pad(x, pads, value=fill) if any(missing) else x
