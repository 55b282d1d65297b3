"""A cache as an ordinary dataset: from disk, and from a Hub that runs on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants as hub_constants
import numpy as np
import pytest
import yaml

from hf_distill import Distiller
from hf_distill.teachers import CachedTeacher
from hf_distill.teachers.cache import is_cache
from tests.hub.fake_hub import TOKEN, FakeHub
from tests.teachers.cache.built import made

NAME = "bert_tokens"


class DatasetHub(FakeHub):
    """A fake Hub for datasets: its addresses contain another word than those of models."""

    def __init__(self) -> None:
        super().__init__()
        handler: Any = self._server.RequestHandlerClass

        class OfDatasets(handler):
            def _answer(self) -> None:
                self.path = self.path.replace("/api/datasets/", "/api/models/").replace("/datasets/", "/", 1)
                super()._answer()

            do_GET = do_HEAD = do_POST = do_PUT = _answer

        self._server.RequestHandlerClass = OfDatasets


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[DatasetHub]:
    with DatasetHub() as hub:
        monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub_constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "downloads"))
        monkeypatch.setattr(
            hub_constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(hub_constants, "HF_HUB_DISABLE_XET", True)
        yield hub


def test_a_cache_loads_as_an_ordinary_dataset(tmp_path: Path) -> None:
    _, _, examples, cached = made(tmp_path, NAME)
    data = cached.cache.dataset()
    assert data.column_names == ["high", "low", "positions", "logits"] and len(data) == 20
    assert data["positions"][:] == [len(one["input_ids"]) for one in examples]
    assert len(data[4]["logits"]) == 3 * data[4]["positions"]
    loaded: Any = datasets.load_from_disk(str(tmp_path))
    assert loaded[19] == data[19] and is_cache(tmp_path)


def test_a_pushed_cache_is_loaded_by_its_id(tmp_path: Path, hub: DatasetHub) -> None:
    head, _, examples, cached = made(tmp_path / "cache", NAME)
    (tmp_path / "cache" / "diary.txt").write_text("private")
    cached.cache.push_to_hub("tiny-user/what-it-said", token=TOKEN)
    held = hub.repos["tiny-user/what-it-said"].files()
    assert set(held) == set(os.listdir(tmp_path / "cache")) - {"diary.txt"}
    card = held["README.md"].decode()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["configs"] == [{"config_name": "default", "data_files": "shard-*.arrow"}]
    assert "BertForTokenClassification" in card and cached.cache.manifest["teacher"]["weights"] in card
    far = CachedTeacher.from_hub("tiny-user/what-it-said")
    batch = head.collate(examples[5:9])
    losses = [Distiller(head.make(1), one, alpha=1.0)(head.make(1), batch).loss.item() for one in (cached, far)]
    assert losses[0] == losses[1] > 1e-3


def test_the_card_lets_load_dataset_find_the_shards(tmp_path: Path) -> None:
    """By the `data_files` of the card, as for a Hub repository. The shards are plain Arrow."""
    _, _, _, cached = made(tmp_path / "cache", NAME)
    (tmp_path / "cache" / "state.json").rename(
        tmp_path / "state.json"
    )  # with it, datasets would suggest load_from_disk
    loaded = datasets.load_dataset(str(tmp_path / "cache"), cache_dir=str(tmp_path / "there"), split="train")
    (tmp_path / "state.json").rename(tmp_path / "cache" / "state.json")
    kept = cached.cache.dataset()
    assert len(loaded) == 20 and np.array_equal(loaded[7]["logits"], kept[7]["logits"])
