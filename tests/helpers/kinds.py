"""The methods that differ in what they ask of an engine; their relatives differ in arithmetic only."""

from __future__ import annotations

from lightning_decentral.methods import METHODS

# Each makes the step of another method here, with another averager, outer update or weight. The contracts and the
# equality with the references check that for all of them; what is user code's business is the same.
RELATIVES = {
    "dcd_psgd", "ecd_psgd", "deepsqueeze",  # D-PSGD
    "bmuf", "sparseloco",  # SlowMo, DiLoCo
    "cocod_sgd", "overlap_local_sgd",  # eager DiLoCo
    "fedmom", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "fedprox", "scaffold", "fednova",  # FedAvg
    "delay_adaptive", "ringmaster", "ringleader", "rennala", "malenia", "stale_synchronous",  # A-PSGD, backup workers
    "cocoa", "cocoa_plus",  # local SGD in rounds of one step
    "acpd",  # backup workers; what is clamped is a change of one worker, of which the model has the sum: as A-PSGD
}  # fmt: skip
KINDS = [name for name in METHODS if name not in RELATIVES]
