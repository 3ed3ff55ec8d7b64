"""Proved here: any data module's samples are divided among clients, with what it was divided by on record; with as many
clients as workers each worker trains on its own part; plays are natural groups; what cannot be divided is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.federated import ClientData
from lightning_decentral.recipes import NonIIDDataModule
from lightning_decentral.recipes.non_iid_data import classes_of
from lightning_decentral.recipes.text_data import TextWindows

CLASSES = torch.arange(600) % 5


class Inner(LightningDataModule):
    def __init__(self, dataset: Any) -> None:
        super().__init__()
        self.dataset, self.stages = dataset, []

    def setup(self, stage: str) -> None:
        self.stages.append(stage)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.dataset, batch_size=7, drop_last=True)

    def val_dataloader(self) -> str:
        return "validation"


def labelled() -> TensorDataset:
    return TensorDataset(torch.randn(600, 2), CLASSES)


@pytest.mark.parametrize(
    "skew", ["dirichlet_by_client", "dirichlet_by_class", "dirichlet_epfml", "shards", "quantity", "iid"]
)
def test_any_data_is_divided_and_recorded(skew: Any, tmp_path: Path) -> None:
    picture = tmp_path / "clients.svg"
    data = NonIIDDataModule(Inner(labelled()), clients=12, skew=skew, alpha=0.5, seed=3, picture=str(picture))
    data.setup("fit")
    loader = data.train_dataloader()
    assert isinstance(loader.dataset, ClientData)
    assert len(loader.dataset.partition) == 12
    assert "seed 3" in loader.dataset.partition.name
    assert (loader.batch_size, loader.drop_last, data.val_dataloader()) == (7, True, "validation")
    assert {"clients": 12, "skew": skew, "seed": 3}.items() <= data.hparams.items()
    assert picture.read_text().startswith("<svg")


def test_with_as_many_clients_as_workers_each_has_its_part() -> None:
    seen = []
    for rank in range(4):
        data = NonIIDDataModule(Inner(labelled()), clients=4, skew="shards", per_client=1)
        data.trainer = SimpleNamespace(world_size=4, global_rank=rank, is_global_zero=rank == 0)  # type: ignore[assignment]
        data.setup("fit")
        assert data.partition is not None
        own = list(data.train_dataloader().sampler)
        assert sorted(own) == sorted(data.partition.of(rank).tolist())
        seen += own
    assert sorted(seen) == list(range(600))


def test_plays_are_natural_groups() -> None:
    windows = TextWindows(torch.arange(100), 11, 9, random_start=False, parts={"Hamlet": 0, "Lear": 35, "Macbeth": 60})
    begins = [int(windows[index][0]) for index in range(9)]
    assert windows.groups == ["Hamlet" if b < 35 else "Lear" if b < 60 else "Macbeth" for b in begins]
    data = NonIIDDataModule(Inner(windows), clients=3, skew="groups")
    data.setup("fit")
    assert data.partition is not None
    assert sum(data.partition.sizes) == 9


def test_classes_are_found_where_data_sets_have_them() -> None:
    pairs = list(zip(range(600), CLASSES.tolist(), strict=True))
    for dataset in (labelled(), SimpleNamespace(labels=CLASSES), SimpleNamespace(targets=CLASSES.tolist()), pairs):
        assert torch.equal(classes_of(dataset), CLASSES)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(())


@pytest.mark.parametrize(
    ("dataset", "options", "words"),
    [
        (labelled(), {"skew": "dirichlet"}, "needs one of dirichlet_by_client"),
        (Stream(), {}, "map-style"),
        (torch.arange(50), {}, "Use skew='groups'"),
        (labelled(), {"skew": "groups"}, "needs the group of each"),
        (SimpleNamespace(groups=["a", "b"], __len__=2), {"skew": "groups"}, "Use clients=2"),
        (labelled(), {"clients": 601}, "Use fewer clients"),
    ],
)
def test_what_cannot_be_divided_is_refused(dataset: Any, options: dict[str, Any], words: str) -> None:
    if isinstance(dataset, SimpleNamespace):
        dataset = TextWindows(torch.arange(100), 11, 9, random_start=False, parts={"a": 0, "b": 50})

    def divide() -> None:
        NonIIDDataModule(Inner(dataset), **({"clients": 12} | options)).setup("fit")

    with pytest.raises(ConfigurationError, match=words):
        divide()
