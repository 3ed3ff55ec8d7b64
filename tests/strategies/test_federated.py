"""Proved here: a federated round in Lightning's loop is the plain loop over its clients, with optimizers that begin
anew and the mean of the clients' buffers, for a user's module with momentum, batch normalization and unequal clients;
two real workers make the same rounds; resuming is exact, between rounds and in the middle of one, and between rounds
with other workers; what a worker keeps does not depend on the number of clients; what a round was like is reported; and
what cannot work is refused before training."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler, TensorDataset

from lightning_decentral import SimulatedStrategy
from lightning_decentral.algorithms import DPSGD, SCAFFOLD, FedAvg, FedMom
from lightning_decentral.callbacks import RoundReport
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.federated import ClientData, Clients, dirichlet_by_class, given
from lightning_decentral.federated.data import RoundBatches
from lightning_decentral.flat import Vector
from strategies.fits import gossip, make_trainer

pytestmark = pytest.mark.usefixtures("kept_forks")

CLIENTS = Clients(6, 3)


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.net(x)
        return output

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def data() -> ClientData:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(160, 4, generator=generator, dtype=torch.float64)
    classes = x[:, :3].argmax(1)
    return ClientData(TensorDataset(x, classes), dirichlet_by_class(classes, 6, 0.5, seed=1, least=8))


def module() -> Classifier:
    torch.manual_seed(3)
    return Classifier()


def fit(
    folder: Path, strategy: Any, rounds: int, resume: str | None = None, callbacks: list[Callback] | None = None
) -> Classifier:
    trained = module()
    trainer = Trainer(
        accelerator="cpu",
        strategy=strategy,
        max_epochs=rounds,
        logger=False,
        callbacks=callbacks,
        enable_checkpointing=bool(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(trained, DataLoader(data(), batch_size=8, drop_last=True), ckpt_path=resume)
    return trained


def plain_loop(rounds: int, momentum: float) -> Classifier:
    """FedMom, as anybody would write it."""
    server, dataset = module(), data()
    clients = CLIENTS.of_data(dataset.partition.sizes, 8, drop_last=True)
    before = [p.detach().clone() for p in server.parameters()]  # v
    for number in range(rounds):
        turns = clients.round(number).turns
        models = []
        for turn in turns:
            model = copy.deepcopy(server)
            optimizer = model.configure_optimizers()
            for batch in RoundBatches(dataset.partition, clients, lambda t=turn, n=number: ([t], n, 0)):  # type: ignore[misc]
                optimizer.zero_grad()
                x, classes = dataset.dataset.tensors
                model.training_step((x[batch], classes[batch]), 0).backward()
                optimizer.step()
            models.append(model)
        with torch.no_grad():
            for i, w in enumerate(server.parameters()):
                v = sum(turn.weight * list(model.parameters())[i] for turn, model in zip(turns, models, strict=True))
                w.copy_(v + momentum * (v - before[i]))
                before[i] = v  # type: ignore[assignment]
            for name, buffer in server.named_buffers():
                own = [turn.weight * dict(m.named_buffers())[name] for turn, m in zip(turns, models, strict=True)]
                mean = torch.stack([each.double() for each in own]).sum(0)
                buffer.copy_(mean if buffer.is_floating_point() else mean.round())
    return server


def assert_equal(one: LightningModule, other: LightningModule, exactly: bool = False) -> None:
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        if exactly:
            assert torch.equal(a, b), name
        else:  # float64, and some hundred operations on numbers near 1
            torch.testing.assert_close(a, b, rtol=0.0, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}")  # type: ignore[misc]


def test_a_run_is_the_plain_loop_over_the_clients(tmp_path: Path) -> None:
    trained = fit(tmp_path, SimulatedStrategy(FedMom(momentum=0.8), clients=CLIENTS), rounds=3)
    assert_equal(trained, plain_loop(3, 0.8))


class InTheMiddle(Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 1 and batch_idx == 2:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("algorithm", [FedMom(), SCAFFOLD()], ids=["FedMom", "SCAFFOLD"])
def test_resuming_is_exact_between_rounds_and_in_the_middle_of_one(algorithm: Any, tmp_path: Path) -> None:
    def strategy() -> SimulatedStrategy:
        return SimulatedStrategy(algorithm, clients=Clients(6, 3, stateful=True))

    between, middle = tmp_path / "between.ckpt", tmp_path / "middle.ckpt"
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    straight = fit(tmp_path, strategy(), 4, callbacks=[keep, InTheMiddle(middle)])
    between = tmp_path / "epoch=1.ckpt"
    for saved in (between, middle):
        assert_equal(fit(tmp_path, strategy(), 4, resume=str(saved)), straight, exactly=True)
    with pytest.raises(ConfigurationError, match="Resume with the same algorithm and clients"):
        fit(tmp_path, SimulatedStrategy(algorithm, clients=Clients(6, 2, stateful=True)), 4, resume=str(between))


class Keeps(Callback):
    elements = 0

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        strategy = trainer.strategy
        assert isinstance(strategy, SimulatedStrategy)
        assert strategy._simulator is not None
        values = strategy._simulator.workers[0].state.values()
        self.elements = max(self.elements, sum(v.numel for v in values if isinstance(v, Vector)))


def test_what_a_worker_keeps_does_not_depend_on_the_number_of_clients(tmp_path: Path) -> None:
    kept = []
    for number in (5, 40):
        callback = Keeps()
        trainer = Trainer(
            accelerator="cpu",
            strategy=SimulatedStrategy(FedMom(), clients=number, per_round=3),
            max_epochs=2,
            callbacks=[callback],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module(), DataLoader(data().dataset, batch_size=4))  # divided evenly
        kept.append(callback.elements)
    model = sum(parameter.numel() for parameter in module().parameters())
    assert kept == [2 * model] * 2  # the common model, and the sum of what was moved


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(data().dataset)


REFUSED: list[tuple[Any, dict[str, Any], Any, str]] = [
    (lambda: SimulatedStrategy(FedAvg(), clients=5, per_round=6), {}, None, "nobody is drawn twice"),
    (lambda: SimulatedStrategy(FedAvg(), clients=5), {}, None, "Write per_round="),
    (lambda: SimulatedStrategy(FedAvg(), clients=CLIENTS, per_round=2), {}, None, "Leave per_round out"),
    (lambda: SimulatedStrategy(DPSGD(), clients=5, per_round=2), {}, None, "needs a method whose workers are clients"),
    (lambda: SimulatedStrategy(FedAvg(), clients=5, per_round=2, workers=4), {}, None, "needs neither"),
    (lambda: SimulatedStrategy(SCAFFOLD(), clients=1000, per_round=20), {}, None, "stateful=True"),
    (lambda: given([[0, 1], []]), {}, None, "client 1; it needs at least 1 sample"),
    (lambda: SimulatedStrategy(clients=7, per_round=2), {}, data, "Use Clients\\(6"),
    (lambda: SimulatedStrategy(clients=500, per_round=2), {}, lambda: data().dataset, "Use fewer clients"),
    (lambda: SimulatedStrategy(clients=6, per_round=2), {}, Stream, "map-style"),
    (
        lambda: SimulatedStrategy(clients=6, per_round=2),
        {"sampler": SubsetRandomSampler(range(8))},
        data,
        "a SubsetRandomSampler, and needs one without",
    ),
    (
        lambda: SimulatedStrategy(clients=6, per_round=2),
        {"accumulate_grad_batches": 2},
        data,
        "a batch is of one client",
    ),
    (lambda: SimulatedStrategy(clients=6, per_round=2), {"limit_train_batches": 3}, data, "an epoch is a round"),
    (lambda: SimulatedStrategy(clients=6, per_round=2), {"max_steps": 3}, data, "an epoch is a round"),
    (
        lambda: SimulatedStrategy(clients=6, per_round=2),
        {"callbacks": [ModelCheckpoint(every_n_train_steps=2)]},
        data,
        "needs the end of one",
    ),
]


@pytest.mark.parametrize(("make", "options", "samples", "words"), REFUSED, ids=[words for *_, words in REFUSED])
def test_what_cannot_work_is_refused(make: Any, options: dict[str, Any], samples: Any, words: str) -> None:
    given = dict(options)
    sampler = given.pop("sampler", None)

    def run() -> None:
        trainer = Trainer(
            accelerator="cpu",
            strategy=make(),
            **({"max_epochs": 1, "logger": False, "enable_progress_bar": False} | given),
        )
        trainer.fit(module(), DataLoader(samples(), batch_size=4, sampler=sampler))

    with pytest.raises(ConfigurationError, match=words):
        run()


def test_a_round_that_a_hook_has_cut_is_refused(tmp_path: Path) -> None:
    cut = module()
    cut.on_train_batch_start = lambda batch, index: -int(index == 3)  # type: ignore[method-assign]
    trainer = make_trainer(tmp_path, SimulatedStrategy(clients=6, per_round=2), 1, max_epochs=2)
    with pytest.raises(ConfigurationError, match=r"an epoch that ended with batch \d of the \d+ of its round"):
        trainer.fit(cut, DataLoader(data(), batch_size=4))


class Keep(Callback):
    """Worker 0 writes the module that it ends with."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_rank == 0:
            folder = Path(trainer.default_root_dir)
            torch.save(pl_module.state_dict(), folder / "final.pt")
            torch.save({k: float(v) for k, v in trainer.callback_metrics.items()}, folder / "logged.pt")


@pytest.mark.parametrize("algorithm", [FedMom(clients=CLIENTS), SCAFFOLD(clients=Clients(6, 3, stateful=True))])
def test_two_real_workers_that_are_all_clients_make_the_same_rounds(algorithm: Any, tmp_path: Path) -> None:
    """One of them has more batches than the other in most rounds; resuming in the middle of a round included."""
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    middle = tmp_path / "middle.ckpt"
    trainer = make_trainer(
        tmp_path,
        gossip(algorithm),
        2,
        max_epochs=3,
        enable_checkpointing=True,
        callbacks=[Keep(), keep, InTheMiddle(middle)],
    )
    trainer.fit(module(), DataLoader(data(), batch_size=8, drop_last=True))
    found = module()
    found.load_state_dict(torch.load(tmp_path / "final.pt"))
    simulated = fit(tmp_path, SimulatedStrategy(algorithm), 3)
    assert_equal(found, simulated)
    for saved in (tmp_path / "epoch=0.ckpt", middle):
        trainer = make_trainer(tmp_path, gossip(algorithm), 2, max_epochs=3, callbacks=[Keep()])
        trainer.fit(module(), DataLoader(data(), batch_size=8, drop_last=True), ckpt_path=saved)
        found.load_state_dict(torch.load(tmp_path / "final.pt"))
        assert_equal(found, simulated)
    trainer = make_trainer(tmp_path, gossip(algorithm), 3, max_epochs=3, callbacks=[Keep()])
    trainer.fit(module(), DataLoader(data(), batch_size=8, drop_last=True), ckpt_path=tmp_path / "epoch=0.ckpt")
    found.load_state_dict(torch.load(tmp_path / "final.pt"))
    assert_equal(found, simulated)
    trainer = make_trainer(tmp_path, gossip(algorithm), 3, max_epochs=3)
    with pytest.raises(Exception, match=r"(?s)2 workers in the middle of a round, and 3 go on.*Resume with 2 workers"):
        trainer.fit(module(), DataLoader(data(), batch_size=8, drop_last=True), ckpt_path=middle)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_round_is_reported_and_the_accuracy_for_each_client(workers: int, tmp_path: Path) -> None:
    """The report changes nothing in the training, and says of the final model what a plain loop finds."""
    clients = Clients(6, 4, dropout=0.4, seed=2)
    strategy: Any = gossip(FedAvg(clients=clients)) if workers > 1 else SimulatedStrategy(clients=clients)
    trainer = make_trainer(tmp_path, strategy, workers, max_epochs=4, callbacks=[RoundReport(every=2), Keep()])
    trainer.fit(module(), DataLoader(data(), batch_size=8, drop_last=True))
    found = module()
    found.load_state_dict(torch.load(tmp_path / "final.pt"))
    assert_equal(found, fit(tmp_path, SimulatedStrategy(clients=clients), 4))
    last = clients.of_data(data().partition.sizes, 8, drop_last=True).round(3)
    logged = torch.load(tmp_path / "logged.pt")
    assert (logged["round/clients"], logged["round/dropped"]) == (len(last.turns), len(last.dropped))
    assert logged["round/drift"] > 0.0
    sent = sum(
        drawn.asked + len(drawn.turns)
        for drawn in (clients.of_data(data().partition.sizes, 8).round(number) for number in range(4))
    )
    num_bytes = sum(parameter.numel() * 8 for parameter in found.parameters())
    assert logged["round/megabytes"] == pytest.approx(sent * num_bytes / 1e6, rel=1e-6)
    found.eval()
    x, classes = data().dataset.tensors
    right = (found.net(x).argmax(1) == classes).double()
    accuracies = torch.stack([right[data().partition.of(client)].mean() for client in range(6)]).sort().values
    assert logged["clients/accuracy"] == pytest.approx(float(accuracies.mean()), rel=1e-6)
    assert logged["clients/worst_tenth"] == pytest.approx(float(accuracies[0]), rel=1e-6)
