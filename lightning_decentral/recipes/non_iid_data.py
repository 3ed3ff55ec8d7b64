"""Data that differs between workers, or between the clients of federated learning, made of any other data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.federated.data import ClientData
from lightning_decentral.federated.partition import (
    Partition,
    by_group,
    by_quantity,
    dirichlet_by_class,
    dirichlet_by_client,
    dirichlet_epfml,
    iid,
    shards,
)

Skew = Literal["dirichlet_by_client", "dirichlet_by_class", "dirichlet_epfml", "shards", "quantity", "groups", "iid"]


class PartSampler(DistributedSampler[Any]):
    """Gives each worker the samples of the client of its rank, shuffled anew in each epoch.

    Lightning takes it as it is, since it is a `DistributedSampler`.

    Args:
        data: with as many clients as there are workers.
        rank: of this worker.
        seed: of the order.
    """

    def __init__(self, data: ClientData, rank: int, seed: int = 0) -> None:
        super().__init__(data, len(data.partition), rank, shuffle=True, seed=seed)
        self._own = data.partition.of(rank)

    def __len__(self) -> int:
        return len(self._own)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(self._own[torch.randperm(len(self._own), generator=generator)].tolist())


class NonIIDDataModule(LightningDataModule):
    """Another data module, whose training samples are divided among clients that differ.

    With a federated method and ``Clients`` these are the clients. With any other method, or where each worker is a
    client, there have to be as many as workers, and each worker trains on its own part. Validation, test and prediction
    are those of the other module.

    How the data is divided is a hyper-parameter, with its seed: loggers and checkpoints record it. It is printed when
    the data is set up, and drawn on request.

    Args:
        data: with a ``train_dataloader`` of a map-style data set.
        clients: how many; with ``"groups"`` as many as there are groups, or fewer, who have several whole groups each.
        skew: how samples are divided: the functions of `lightning_decentral.federated` with these names;
            ``"quantity"`` is ``by_quantity``. ``"groups"``: the data set says in ``groups`` to which group each sample
            belongs, as the plays of `Shakespeare` do.
        alpha: of Dirichlet and quantity.
        per_client: shards of a client.
        least: samples of each client at least, of ``"dirichlet_by_class"`` and ``"quantity"``.
        seed: of the draws.
        picture: where a picture of clients against classes is written (SVG); none by default.

    Raises:
        ConfigurationError: in ``setup``, if data cannot be divided so.

    Example:
        >>> from lightning_decentral.recipes import EmbeddedImages
        >>> data = NonIIDDataModule(EmbeddedImages(), clients=100, alpha=0.1)
        >>> data.hparams["skew"], data.hparams["seed"]
        ('dirichlet_by_client', 0)
    """

    def __init__(
        self,
        data: LightningDataModule,
        clients: int,
        skew: Skew = "dirichlet_by_client",
        alpha: float = 0.1,
        per_client: int = 2,
        least: int = 10,
        seed: int = 0,
        picture: str | None = None,
    ) -> None:
        super().__init__()
        if skew not in get_args(Skew):
            raise ConfigurationError(f"NonIIDDataModule(skew={skew!r}): needs one of {', '.join(get_args(Skew))}.")
        self.save_hyperparameters(ignore=["data"])
        self.data = data
        self.clients, self.skew, self.alpha, self.per_client = clients, skew, alpha, per_client
        self.least, self.seed, self.picture = least, seed, picture
        self.partition: Partition | None = None

    def prepare_data(self) -> None:
        """Prepares the other module's."""
        self.data.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Sets up the other module, and divides its training samples; the same on every worker."""
        self.data.trainer = self.trainer
        stage = stage or "fit"
        self.data.setup(stage)
        if stage != "fit" or self.partition is not None:
            return
        dataset = self._inner().dataset
        classes = None if self.skew in ("groups", "quantity", "iid") else classes_of(dataset)
        self.partition = self._divide(dataset, classes)
        rank_zero_info(self.partition.described(classes))
        if self.picture is not None and (self.trainer is None or self.trainer.is_global_zero):
            Path(self.picture).write_text(self.partition.picture(classes_of(dataset)), encoding="utf-8")

    def _inner(self) -> DataLoader[Any]:
        loader = self.data.train_dataloader()
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            raise ConfigurationError(
                f"NonIIDDataModule got a {type(loader).__name__} of {type(self.data).__name__}, needs one DataLoader "
                "of a map-style data set. Return one from its train_dataloader."
            )
        return loader

    def _divide(self, dataset: Dataset[Any], classes: Tensor | None) -> Partition:
        samples = len(dataset)  # type: ignore[arg-type]
        if self.skew == "groups":
            return by_group(_groups_of(dataset), clients=self.clients)
        if self.skew == "quantity":
            return by_quantity(samples, self.clients, self.alpha, self.seed, self.least)
        if classes is None:
            return iid(samples, self.clients, self.seed)
        if self.skew == "shards":
            return shards(classes, self.clients, self.per_client, self.seed)
        if self.skew == "dirichlet_by_class":
            return dirichlet_by_class(classes, self.clients, self.alpha, self.seed, self.least)
        way = dirichlet_epfml if self.skew == "dirichlet_epfml" else dirichlet_by_client
        return way(classes, self.clients, self.alpha, self.seed)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training samples with their clients; of this worker alone, if there are as many clients as
        workers."""
        assert self.partition is not None
        loader = self._inner()
        data = ClientData(loader.dataset, self.partition)
        workers, rank = (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)
        own = workers == self.clients and workers > 1
        return DataLoader(
            data,
            batch_size=loader.batch_size,
            shuffle=not own,
            sampler=PartSampler(data, rank, self.seed) if own else None,
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            drop_last=loader.drop_last,
            persistent_workers=loader.persistent_workers,
        )

    def val_dataloader(self) -> Any:
        """Return those of the other module."""
        return self.data.val_dataloader()

    def test_dataloader(self) -> Any:
        """Return those of the other module."""
        return self.data.test_dataloader()

    def predict_dataloader(self) -> Any:
        """Return those of the other module."""
        return self.data.predict_dataloader()


def classes_of(dataset: Any) -> Tensor:
    """Return the class of each sample: ``[samples]``, int64.

    Taken from ``labels`` or ``targets`` of the data set, as those of the recipes and of torchvision have them, or from
    the last tensor of a `TensorDataset`; otherwise each sample is read once, and is a pair with its class.

    Raises:
        ConfigurationError: if there are no classes.
    """
    for name in ("labels", "targets"):
        found = getattr(dataset, name, None)
        if found is not None:
            return torch.as_tensor(found).long()
    tensors = getattr(dataset, "tensors", None)
    if tensors is not None and not tensors[-1].is_floating_point():
        return torch.as_tensor(tensors[-1]).long()
    try:
        return torch.tensor([int(dataset[index][1]) for index in range(len(dataset))])
    except (IndexError, TypeError, ValueError, RuntimeError) as error:
        raise ConfigurationError(
            f"A skew of classes got {type(dataset).__name__}, whose samples are not pairs of something and a class, "
            "and which has neither `labels` nor `targets`; it needs one. Use skew='groups', 'quantity' or 'iid'."
        ) from error


def _groups_of(dataset: Any) -> Sequence[object]:
    groups: Sequence[object] | None = getattr(dataset, "groups", None)
    if groups is None:
        raise ConfigurationError(
            f"NonIIDDataModule(skew='groups') got {type(dataset).__name__} without `groups`, needs the group of each "
            "sample there. Give it a list of them, or use another skew."
        )
    return groups
