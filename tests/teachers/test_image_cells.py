"""`teacher_image` cells in the forms of `datasets`: PIL images, or files that are not opened yet."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Image
from PIL import Image as Pillow

from hf_distill.errors import DataError
from hf_distill.trainer.collators import TeacherInputsCollator


class Pixels:
    """A stand-in for an image processor that returns its input as numbers."""

    def __call__(self, images: list[Any], return_tensors: str) -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.stack([torch.tensor(np.asarray(image)) for image in images])}


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Pillow.fromarray(np.full((4, 4, 3), value, dtype="uint8")).save(buffer, format="PNG")
    return buffer.getvalue()


def test_files_are_opened_and_images_are_unchanged(tmp_path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(png(3))
    column = Dataset.from_dict({"image": [{"bytes": png(1), "path": None}, {"bytes": None, "path": str(path)}]})
    cells = [*column.cast_column("image", Image(decode=False))["image"], Pillow.open(io.BytesIO(png(5)))]
    found = TeacherInputsCollator(lambda rows: {}, Pixels()).teacher_batch([{"teacher_image": cell} for cell in cells])
    assert [int(image.unique()) for image in found["pixel_values"]] == [1, 3, 5]


@pytest.mark.parametrize("cell", [{"bytes": b"no picture", "path": None}, {"bytes": None, "path": "gone.png"}])
def test_unreadable_images_raise(cell: dict[str, Any]) -> None:
    rows = [{"teacher_image": {"bytes": png(1), "path": None}}, {"teacher_image": cell}]
    with pytest.raises(DataError, match="teacher_image: example 1 of the batch cannot be opened"):
        TeacherInputsCollator(lambda rows: {}, Pixels()).teacher_batch(rows)
