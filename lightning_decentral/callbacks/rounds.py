"""What a round of federated learning was like, and how good the common model is for each client."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.federated.data import ClientData
from lightning_decentral.federated.partition import Partition
from lightning_decentral.strategies.base import AbstractDecentralizedStrategy
from lightning_decentral.strategies.clients import Rounds
from lightning_decentral.strategies.simulated import SimulatedStrategy

Correct = Callable[[LightningModule, Any], Tensor]
"""Tells of each sample of a batch how right the model is: ``[batch]``, 0 to 1."""

_BATCH = 256  # samples that are evaluated together, whoever has them


def is_right(module: LightningModule, batch: Any) -> Tensor:
    """Tell whether the largest output of each sample is that of its class: of batches ``(inputs, classes)``."""
    inputs, classes = batch[0], batch[1]
    right: Tensor = module(inputs).argmax(-1) == classes
    return right.double()


class RoundReport(Callback):
    """Logs, after each round of a run with clients, what it was like; and now and then the accuracy for each client.

    * ``round/clients``, ``round/dropped``, ``round/late``: whose work counted, and whose did not;
    * ``round/drift``: how far the clients were from their mean, as a root of the weighted mean square;
    * ``round/megabytes``: that clients have received and sent so far, in 10^6 bytes; ``round/seconds``: so far, by the
      clients' speeds;
    * ``clients/accuracy`` and ``clients/worst_tenth``: of the common model, for each client on its own samples; the
      mean over all clients, each alike, and over the tenth for which it is worst.

    Args:
        every: rounds between two looks at the clients' accuracies, which go through all samples; 0: never.
        data: samples of clients, in the place of those that are trained on: held-out ones.
        correct: tells how right the model is; by default whether the largest output is the class.

    Example:
        >>> callback = RoundReport(every=10)
    """

    def __init__(self, every: int = 0, data: ClientData | None = None, correct: Correct = is_right) -> None:
        if every < 0:
            raise ConfigurationError(f"RoundReport(every={every}): needs 0 or more rounds. Use 0 for never.")
        self.every, self.data, self.correct = every, data, correct

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rounds = _rounds_of(trainer)
        if rounds is None or rounds.last is None:
            return
        last = rounds.last
        values = {
            "round/clients": float(len(last.turns)),
            "round/dropped": float(len(last.dropped)),
            "round/late": float(len(last.late)),
            "round/drift": rounds.drift,
            "round/megabytes": rounds.bytes / 1e6,
            "round/seconds": rounds.seconds,
        }
        if self.every and rounds.number % self.every == 0:
            accuracies = self._accuracies(trainer, pl_module, rounds).sort().values
            values["clients/accuracy"] = float(accuracies.mean())
            values["clients/worst_tenth"] = float(accuracies[: max(1, len(accuracies) // 10)].mean())
        self.log_dict(values)

    def _accuracies(self, trainer: Trainer, module: LightningModule, rounds: Rounds) -> Tensor:
        """Measure the accuracy of the model as it is, for each client: ``[clients]``."""
        loader: Any = trainer.train_dataloader
        data = loader.dataset if self.data is None else self.data
        partition = cast("Partition", rounds.partition) if self.data is None else self.data.partition
        owners = partition.owners()
        places = torch.split(torch.arange(len(owners)), _BATCH)[trainer.global_rank :: trainer.world_size]
        batches = [partition.indices[each].tolist() for each in places]
        sums = torch.zeros(2, len(partition), dtype=torch.float64)
        was_training = module.training
        module.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):  # samples may be augmented: training goes on as if not
            for own, batch in zip(
                places, DataLoader(data, batch_sampler=batches, collate_fn=loader.collate_fn), strict=True
            ):
                right = self.correct(module, trainer.strategy.batch_to_device(batch, module.device)).double().cpu()
                sums.index_add_(1, owners[own], torch.stack([right, torch.ones_like(right)]))
        module.train(was_training)
        sums = trainer.strategy.reduce(sums.to(module.device), reduce_op="sum")
        return (sums[0] / sums[1]).cpu()


def _rounds_of(trainer: Trainer) -> Rounds | None:
    strategy = trainer.strategy
    return strategy.rounds if isinstance(strategy, SimulatedStrategy | AbstractDecentralizedStrategy) else None
