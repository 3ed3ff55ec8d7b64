"""Federated learning: who takes part in which round, and which samples of a data set belong to whom.

`Clients` says who is drawn and how much each counts; a `Partition` divides a data set, and `ClientData` hands it to a
strategy.
"""

from lightning_decentral.federated.algorithm import AbstractFederatedAlgorithm
from lightning_decentral.federated.clients import Availability, Clients, Round, Turn
from lightning_decentral.federated.data import ClientData
from lightning_decentral.federated.partition import (
    Partition,
    by_group,
    by_quantity,
    dirichlet_by_class,
    dirichlet_by_client,
    dirichlet_epfml,
    given,
    iid,
    shards,
)

__all__ = [
    "AbstractFederatedAlgorithm",
    "Availability",
    "ClientData",
    "Clients",
    "Partition",
    "Round",
    "Turn",
    "by_group",
    "by_quantity",
    "dirichlet_by_class",
    "dirichlet_by_client",
    "dirichlet_epfml",
    "given",
    "iid",
    "shards",
]
