"""Proved here: `AutoStrategy` measures what the workers' data and links are like, goes on with what suits them from the
very models of synchronous SGD, and says so; what it makes of its measurements is arithmetic."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lightning import Trainer
from reference.quadratic import Quadratic
from torch import Tensor

from lightning_decentral import AutoStrategy
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.strategies.auto import TRIAL_STEPS, cluster_of, kind_of, near_hosts
from lightning_decentral.transport.probing import Links, _rounds
from strategies.fits import QuadraticModule, fit_kept

WORKERS = 3


def rate(step: int) -> float:
    return 0.05


class Told(QuadraticModule):
    """Writes what was chosen; the workers' problems are alike if they are told so, but for noise."""

    def __init__(self, folder: Path, alike: bool) -> None:
        super().__init__(Quadratic(WORKERS, 40), rate)
        self.folder, self.alike = folder, alike

    def training_step(self, batch: Tensor) -> Tensor:
        if not self.alike:
            return super().training_step(batch)
        noise = torch.randn(40, dtype=torch.float64, generator=torch.Generator().manual_seed(int(batch)))
        return ((self.x - noise) ** 2).sum() / 2

    def on_train_end(self) -> None:
        strategy = self.trainer.strategy
        assert isinstance(strategy, AutoStrategy)
        told = [repr(strategy.algorithm), strategy.choice, strategy.steps, self.x.tolist()]
        (self.folder / f"{self.global_rank}.json").write_text(json.dumps(told))


@pytest.mark.parametrize("alike", [True, False])
def test_it_goes_on_with_what_suits_the_data(tmp_path: Path, alike: bool) -> None:
    """Three workers that count as three hosts, so that links are measured; the numbers of samples seed the noise."""
    fit_kept(tmp_path, AutoStrategy(), WORKERS, Told(tmp_path, alike), hosts=WORKERS, max_steps=TRIAL_STEPS + 4)
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(WORKERS)]
    assert len({(algorithm, choice) for algorithm, choice, *_ in told}) == 1
    algorithm, choice, steps, _ = told[0]
    assert steps == TRIAL_STEPS + 4
    share = int(choice.split("% of the variance")[0].split()[-1])
    assert "Mbit/s" in choice
    if alike:
        assert share < 25  # chance: 8 % of 3 workers' noise in 40 directions would be much
    else:
        assert share == 100  # full gradients, whose differences change with the model alone
        assert not algorithm.startswith("DPSGD")


def test_a_trial_alone_is_synchronous_sgd(tmp_path: Path) -> None:
    fit_kept(tmp_path, AutoStrategy(data="differ"), WORKERS, Told(tmp_path, False), max_steps=TRIAL_STEPS)
    problem = Quadratic(WORKERS, 40)
    x = problem.start[0].clone()
    for _ in range(TRIAL_STEPS):
        x -= 0.05 * torch.stack([problem.gradient(x, rank) for rank in range(WORKERS)]).mean(0)
    for rank in range(WORKERS):
        algorithm, choice, _, reached = json.loads((tmp_path / f"{rank}.json").read_text())
        assert (algorithm, choice) == ("Trial()", None)
        torch.testing.assert_close(torch.tensor(reached, dtype=torch.float64), x, rtol=0.0, atol=1e-12)


def test_links_become_a_cluster() -> None:
    three = Links(((0,), (1,), (2,), (3,)), ((0.01,) * 4,) * 4, (30e6, 10e6, 10e6, 30e6))  # 1 to 2 and 2 to 3 are slow
    cluster = cluster_of(three, [0.1, 0.1, 0.1, 0.3])
    assert cluster.bandwidth_bytes_per_second == 30e6
    assert cluster.slow_links == {2: 3.0}
    assert cluster.slowdown == {3: pytest.approx(3.0)}
    assert cluster.latency_seconds == 0.01
    pairs = Links(((0, 1), (2, 3)), ((0.0, 0.02), (0.02, 0.0)), (5e6, 5e6))
    cluster = cluster_of(pairs, [0.1] * 4)
    assert (cluster.sites, cluster.site_bandwidth_bytes_per_second) == (((0, 1), (2, 3)), 5e6)
    assert cluster.site_latency_seconds == 0.02
    assert cluster_of(Links(((0, 1),), ((0.0,),), ()), [0.1, 0.1]).transfer_seconds(1 << 30, 0, 1) == 0.0


def between(sites: list[int], near: float, far: float) -> tuple[tuple[float, ...], ...]:
    """Latencies of hosts, of which each is at one of the sites."""
    return tuple(
        tuple(0.0 if i == j else near if a == b else far for j, b in enumerate(sites)) for i, a in enumerate(sites)
    )


def test_near_hosts_become_a_site() -> None:
    """Five hosts at two sites, one with two workers: to the next host, those that leave a site send slowly."""
    hosts = ((0,), (1, 2), (3,), (4,), (5,))
    links = Links(hosts, between([0, 1, 0, 1, 1], 0.001, 0.02), (3e6, 2e6, 4e6, 30e6, 1e6))
    assert near_hosts(links) == [[0, 2], [1, 3, 4]]
    cluster = cluster_of(links, [0.1] * 6)
    assert cluster.sites == ((0, 3), (1, 2, 4, 5))
    assert (cluster.latency_seconds, cluster.site_latency_seconds) == (0.001, pytest.approx(0.019))
    assert cluster.bandwidth_bytes_per_second == 30e6
    assert cluster.site_bandwidth_bytes_per_second == 5e6  # of sites that send 7 and 3 MB/s
    for latencies in (between([0, 1, 0, 1, 1], 0.006, 0.02), between([0, 1, 0, 1, 1], 1e-5, 0.004)):
        assert near_hosts(Links(hosts, latencies, links.bytes_per_second)) == [[0, 1, 2, 3, 4]]  # a third; all near
    apart = Links(hosts[:3], between([0, 1, 2], 0.0, 0.02), (1e6,) * 3)
    assert near_hosts(apart) == [[0, 1, 2]]  # each would be a site of its own


@pytest.mark.parametrize("count", [2, 5, 8])
def test_each_pair_of_hosts_is_measured_once(count: int) -> None:
    assert sorted(_rounds(count)) == [(a, b) for a in range(count) for b in range(a + 1, count)]


def test_kinds_of_optimizers_and_what_is_refused() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    plain, momentum = torch.optim.SGD(parameters, lr=0.1), torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    assert [kind_of([plain]), kind_of([plain, momentum]), kind_of([torch.optim.AdamW(parameters)])] == [
        *("sgd", "momentum", "adaptive"),
    ]
    with pytest.raises(ConfigurationError, match="needs 'alike' or 'differ'"):
        AutoStrategy(data="iid")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="needs none: it chooses one"):
        AutoStrategy(algorithm=None)


@pytest.mark.parametrize("suffix", ["", "_spawn", "_fork", "_notebook"])
def test_it_has_a_name(suffix: str) -> None:
    trainer = Trainer(strategy=f"decentral_auto{suffix}", accelerator="cpu", devices=2, logger=False)
    assert type(trainer.strategy) is AutoStrategy
