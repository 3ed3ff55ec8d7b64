"""The rule of what is tested with which methods.

All methods: the equality with a stacked reference, step by step, in the simulator; the equality of real workers with
the simulator; the contracts of `tests/contract`; names, pages and entries. That is what a method of its own can get
wrong. `KINDS`: what user code, checkpoints and models do to a method. There a method matters by what it asks of the
engine (an exchange during the gradient or after it, an update elsewhere, rounds, parts under way over steps, calls, a
server), and one that asks for each of these stands for all that do.
"""

from __future__ import annotations

from lightning_decentral.methods import METHODS

# Each makes the step of another method here, with another averager, outer update or weight.
RELATIVES = {
    "dcd_psgd", "ecd_psgd", "deepsqueeze", "moniqua_sgd",  # CHOCO-SGD: a compressing averager
    "qg_dsgdm", "decentlam", "gossip_pga", "hierarchical_gossip",  # D-PSGD
    "extra", "momentum_tracking",  # D2, gradient tracking
    "c_psgd", "ef21",  # synchronous SGD, SAEF: gradients
    "bmuf", "sparseloco", "slowmo", "noloco", "sparta",  # DiLoCo
    "cocod_sgd", "overlap_local_sgd", "easgd", "eager_diloco",  # local SGD whose mean is under way; streaming DiLoCo
    "fedmom", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "fedprox", "scaffold", "fednova",  # FedAvg
    "staleness_aware", "delay_adaptive", "ringmaster", "ringleader",  # A-PSGD
    "rennala", "malenia", "stale_synchronous",  # backup workers
    "delayed_nesterov", "async_easgd",  # FedBuff
    "cocoa", "cocoa_plus",  # local SGD in rounds of one step
}  # fmt: skip
KINDS = [name for name in METHODS if name not in RELATIVES]
