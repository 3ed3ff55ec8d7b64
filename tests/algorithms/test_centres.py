"""Proved here: FedBuff, delayed Nesterov and asynchronous EASGD with a server that only serves are their event-ordered
references of the other workers, in the simulator message by message and in the `Trainer` in whatever order messages
come; what is shown at a rest is the centre with what all have made since; and it is refused where nobody trains."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed.test_servers import AtTheEnd, LoggedDelayedNesterov
from reference import servers
from reference.quadratic import Quadratic
from reference.runs import buffer_of, equal_start, gradient_of, simulate
from reference.served import SECONDS, centres, served
from strategies.fits import Indices, QuadraticModule, fit_kept, saved
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_decentral import AsyncStrategy
from lightning_decentral.algorithms import AsyncEASGD, DelayedNesterov, FedBuff
from lightning_decentral.errors import ConfigurationError

METHODS: list[tuple[Any, Callable[..., Any]]] = [
    (FedBuff(3, 4, server="dedicated"), partial(servers.fedbuff, every=3, number=4)),
    (
        DelayedNesterov(6, 4, spread=0.1, server="dedicated"),
        partial(servers.delayed_nesterov, every=6, number=4, spread=0.1),
    ),
    (AsyncEASGD(4, server="dedicated"), partial(servers.async_easgd, every=4, beta=0.9)),
]
RATE, WORKERS, BATCHES = 0.02, 3, 12


def of_others(problem: Quadratic) -> Callable[[Tensor], Tensor]:
    """The gradients of all workers but 0, by row."""
    return lambda x: problem.gradient(torch.cat([x[:1], x]))[1:]


@pytest.mark.parametrize(("method", "reference"), METHODS, ids=lambda value: type(value).__name__)
def test_a_dedicated_server_is_the_reference_of_the_others(method: Any, reference: Callable[..., Any]) -> None:
    problem = equal_start(1 + len(SECONDS))
    expected = list(islice(reference(problem.start[0], of_others(problem), RATE, SECONDS), 60))
    simulator = served(method, problem, [1.0, *SECONDS])
    state = simulator.workers[0].state
    for mine in islice(centres(simulator, problem, RATE), 40):
        heard = sum(state["accepted"].values())  # several at once, where all begin with an exchange
        torch.testing.assert_close(mine, expected[heard - 1], rtol=0.0, atol=1e-12)  # values around 1
    assert heard >= 40
    assert 0 not in state["accepted"]
    assert "aside" not in state  # a model that nobody trains


def test_at_a_rest_it_shows_the_centre_with_what_the_others_have_made() -> None:
    problem = equal_start(4)
    simulator = simulate(FedBuff(every=5, buffer=2, server="dedicated"), problem)
    simulator.run(gradient_of(problem), RATE, 7)
    simulator.rest()
    server, *others = simulator.workers
    made = torch.stack([buffer_of(each.x) - buffer_of(each.state["anchor"]) for each in others]).mean(0)
    expected = buffer_of(server.state["centre"]) + buffer_of(server.state["buffered"]) + made
    torch.testing.assert_close(buffer_of(server.x), expected, rtol=0.0, atol=1e-14)
    assert float(made.abs().max()) > 0.01


class Plain(QuadraticModule):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=RATE)

    def train_dataloader(self) -> DataLoader[int]:
        return DataLoader(Indices((WORKERS - 1) * BATCHES), batch_size=1)


def no_rate(step: int) -> float:
    return 1.0


def test_in_the_trainer_it_follows_its_rule_in_whatever_order_messages_come(tmp_path: Path) -> None:
    problem = equal_start(WORKERS)
    strategy = AsyncStrategy(LoggedDelayedNesterov(3, 2, server="dedicated"), exchange_timeout_seconds=60.0)
    module = Plain(problem, no_rate)
    fit_kept(tmp_path, strategy, WORKERS, module, max_epochs=2, callbacks=[AtTheEnd(tmp_path)])
    results = saved(tmp_path, WORKERS)
    state = results[0]["server"]
    order = servers.InOrder(WORKERS - 1, [source - 1 for source, steps in state["log"] for _ in range(steps)])
    reference = servers.delayed_nesterov(problem.start[0], of_others(problem), RATE, order, 3, 2, 0.0)
    centre = list(islice(reference, len(state["log"])))[-1]
    torch.testing.assert_close(state["centre"].buffers[0], centre, rtol=0.0, atol=1e-12)
    assert {source for source, _ in state["log"]} == {1, 2}
    assert results[0]["report"]["version"] == state["version"] == len(state["log"])
    torch.testing.assert_close(module.x.detach(), results[0]["x"], rtol=0.0, atol=1e-15)


def test_it_is_refused_where_nobody_trains() -> None:
    with pytest.raises(ConfigurationError, match="got 1 worker, which would serve and have nobody to serve"):
        FedBuff(server="dedicated").resolved(1)
    with pytest.raises(ConfigurationError, match="needs 'beside' or 'dedicated'"):
        AsyncEASGD(server="elsewhere")  # type: ignore[arg-type]
