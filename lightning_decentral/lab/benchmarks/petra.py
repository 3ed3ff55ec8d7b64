"""Whether DSP here and in PETRA's public code make the same updates: both train a small network, stage by stage.

    git clone https://github.com/stephane-rivaud/PETRA && export PETRA=$PWD/PETRA
    python -m lightning_decentral.lab.benchmarks.petra [--batches 40]

PETRA (Rivaud et al., ICLR 2025, arXiv:2406.02052) has a mode that its authors call DSP: a layer keeps its inputs, and
makes its forward pass again at the weights of now. Another one keeps the weights of the forward pass, too, as
``dsp(recompute=False)`` does. A perceptron of four stages begins with the same parameters in both, in double precision,
and gets the same batches. PETRA counts ticks of a common clock: in its tick ``t`` stage ``k`` is where it is in tick
``t - k`` here. After each of its own ticks a stage is compared; what is printed is the largest difference of any
parameter, beside how far training has brought them.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.lab.results import environment
from lightning_decentral.pipeline.local import LocalPipeline
from lightning_decentral.pipeline.schedules import Schedule, dsp

STAGES, WIDTH, ROWS, RATE = 4, 6, 16, 0.05
_VARIABLE = "PETRA"

History = list[list[Tensor]]
"""By stage and tick: all parameters of the stage, flat."""


def _network() -> nn.Sequential:
    torch.manual_seed(3)
    hidden = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(STAGES - 1)]
    return nn.Sequential(*hidden, nn.Linear(WIDTH, WIDTH)).double()


def _batches(count: int) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(4)
    return [
        (
            torch.randn(ROWS, WIDTH, generator=draw, dtype=torch.float64),
            torch.randint(WIDTH, (ROWS,), generator=draw),
        )
        for _ in range(count)
    ]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1).clone() for tensor in tensors])


def ours(schedule: Schedule, batches: Sequence[tuple[Tensor, Tensor]], momentum: float) -> History:
    """Train here, and note the parameters of each stage after each of its ticks."""
    net = _network()
    pipeline = LocalPipeline(
        schedule,
        net,
        lambda batch: F.cross_entropy(net(batch[0]), batch[1]),
        lambda parameters: torch.optim.SGD(parameters, lr=RATE, momentum=momentum),
        (2, 4, 6),  # a stage is a layer and its tanh
    )
    found: History = [[] for _ in range(STAGES)]
    for batch in batches:
        pipeline.train(batch)
        for stage in range(STAGES):
            found[stage].append(_flat(list(net[stage].parameters())))
    return found


def theirs(keeps_weights: bool, batches: Sequence[tuple[Tensor, Tensor]], momentum: float) -> History:
    """Train with PETRA's code, and note the same."""
    layers = importlib.import_module("async_torch.layers.layers")
    optimizers = importlib.import_module("async_torch.optim.optimizer")
    sequential = importlib.import_module("async_torch.sequential_layers.sequential")
    net = _network()

    def computed(self: Any, x: Tensor, weight: Tensor, bias: Tensor, training: bool) -> Tensor:
        return torch.tanh(F.linear(x, weight, bias)) if self.is_hidden else F.linear(x, weight, bias)

    def loss(self: Any, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(x, y)

    hidden = type("Hidden", (layers.AsynchronousGenericLayer,), {"local_f": computed, "is_hidden": True})
    final = type("Final", (layers.AsynchronousFinal,), {"local_f": computed, "loss": loss, "is_hidden": False})
    modules = []
    for index in range(STAGES):
        kind = hidden if index < STAGES - 1 else final
        module = kind(first_layer=index == 0, store_vjp=False, store_input=True, store_param=keeps_weights)
        for name, value in zip(("weight", "bias"), net[index].parameters(), strict=True):
            module._register_parameters(name, value.detach())
        optimizers.add_optimizer(module, "sgd", {"lr": RATE, "momentum": momentum})
        modules.append(module)
    model = sequential.AsynchronousSequential(modules)
    found: History = [[] for _ in range(STAGES)]
    for number, (x, y) in enumerate(batches):
        model.forward_and_update(x, y, number)
        model.synchronize_layers()  # as its main.py does
        for stage, module in enumerate(modules):
            found[stage].append(_flat([module.get_parameter(name, mode="backward") for name in ("weight", "bias")]))
    return found


def compare(mine: History, other: History) -> list[tuple[int, float, float]]:
    """Tell of each stage in how many ticks it was compared, the largest difference, and how far it was trained."""
    found = []
    start = _network()
    for stage in range(STAGES):
        pairs = list(zip(mine[stage], other[stage][stage:], strict=False))
        largest = max(float((one - two).abs().max()) for one, two in pairs)
        moved = float((pairs[-1][0] - _flat(list(start[stage].parameters()))).abs().max())
        found.append((len(pairs), largest, moved))
    return found


def main() -> None:
    """Compare both, in both modes, without momentum and with it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=40)
    count = parser.parse_args().batches
    folder = Path(os.environ.get(_VARIABLE, ""))
    if _VARIABLE not in os.environ or not (folder / "async_torch").is_dir():
        raise ConfigurationError(
            f"The comparison got {_VARIABLE}={os.environ.get(_VARIABLE)!r}, and needs the folder of a clone of "
            "https://github.com/stephane-rivaud/PETRA there. Clone it, and set the variable."
        )
    sys.path.insert(0, str(folder))
    told = subprocess.run(
        ["git", "-C", str(folder), "rev-parse", "--short=7", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    torch.set_num_threads(1)
    print(f"# DSP here and in PETRA's public code\n\n{environment()} PETRA's commit: {told or 'not a clone'}.\n")
    print("| here | in PETRA | momentum | stage | ticks compared | largest difference | training moved it by |")
    print("|---|---|---|---|---|---|---|")
    batches = _batches(count)
    modes = (
        ("`dsp(4)`", "DSP", dsp, False),
        ("`dsp(4, recompute=False)`", "weights kept", partial(dsp, recompute=False), True),
    )
    for here, there, make, keeps_weights in modes:
        for momentum in (0.0, 0.9):
            found = compare(ours(make(STAGES), batches, momentum), theirs(keeps_weights, batches, momentum))
            for stage, (ticks, largest, moved) in enumerate(found):
                print(f"| {here} | {there} | {momentum:g} | {stage} | {ticks} | {largest:.1e} | {moved:.2f} |")


if __name__ == "__main__":
    main()
