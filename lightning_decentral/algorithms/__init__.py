"""The methods: one paper, one file. Each is a frozen dataclass of hyper-parameters and a coroutine per step."""

from lightning_decentral.algorithms.acid import ACiD
from lightning_decentral.algorithms.acpd import ACPD
from lightning_decentral.algorithms.adpsgd import ADPSGD
from lightning_decentral.algorithms.apsgd import APSGD
from lightning_decentral.algorithms.async_easgd import AsyncEASGD
from lightning_decentral.algorithms.backup_workers import BackupWorkers
from lightning_decentral.algorithms.bmuf import BMUF
from lightning_decentral.algorithms.c_psgd import CPSGD
from lightning_decentral.algorithms.choco_sgd import ChocoSGD
from lightning_decentral.algorithms.cocoa import CoCoA
from lightning_decentral.algorithms.cocoa_plus import CoCoAPlus
from lightning_decentral.algorithms.cocod_sgd import CoCoDSGD
from lightning_decentral.algorithms.d2 import D2
from lightning_decentral.algorithms.dcd_psgd import DCDPSGD
from lightning_decentral.algorithms.decentlam import DecentLaM
from lightning_decentral.algorithms.deepsqueeze import DeepSqueeze
from lightning_decentral.algorithms.delay_adaptive import DelayAdaptive
from lightning_decentral.algorithms.delayed_nesterov import DelayedNesterov
from lightning_decentral.algorithms.diloco import DiLoCo
from lightning_decentral.algorithms.dpsgd import DPSGD
from lightning_decentral.algorithms.eager_diloco import EagerDiLoCo
from lightning_decentral.algorithms.easgd import EASGD
from lightning_decentral.algorithms.ecd_psgd import ECDPSGD
from lightning_decentral.algorithms.ef21 import EF21
from lightning_decentral.algorithms.extra import Extra
from lightning_decentral.algorithms.fedadagrad import FedAdagrad
from lightning_decentral.algorithms.fedadam import FedAdam
from lightning_decentral.algorithms.fedavg import FedAvg
from lightning_decentral.algorithms.fedavgm import FedAvgM
from lightning_decentral.algorithms.fedbuff import FedBuff
from lightning_decentral.algorithms.fedmom import FedMom
from lightning_decentral.algorithms.fednova import FedNova
from lightning_decentral.algorithms.fedprox import FedProx
from lightning_decentral.algorithms.fedyogi import FedYogi
from lightning_decentral.algorithms.gossip_pga import GossipPGA
from lightning_decentral.algorithms.gradient_tracking import GradientTracking
from lightning_decentral.algorithms.hierarchical_gossip import HierarchicalGossip
from lightning_decentral.algorithms.hogwild import Hogwild
from lightning_decentral.algorithms.local_sgd import LocalSGD
from lightning_decentral.algorithms.malenia import Malenia
from lightning_decentral.algorithms.momentum_tracking import MomentumTracking
from lightning_decentral.algorithms.moniqua_sgd import MoniquaSGD
from lightning_decentral.algorithms.noloco import NoLoCo
from lightning_decentral.algorithms.overlap_local_sgd import OverlapLocalSGD
from lightning_decentral.algorithms.qg_dsgdm import QGDSGDm
from lightning_decentral.algorithms.relaysgd import RelaySGD
from lightning_decentral.algorithms.rennala import Rennala
from lightning_decentral.algorithms.ringleader import Ringleader
from lightning_decentral.algorithms.ringmaster import Ringmaster
from lightning_decentral.algorithms.saef import SAEF
from lightning_decentral.algorithms.scaffold import SCAFFOLD
from lightning_decentral.algorithms.sgp import SGP
from lightning_decentral.algorithms.slowmo import SlowMo
from lightning_decentral.algorithms.sparseloco import SparseLoCo
from lightning_decentral.algorithms.sparta import SPARTA
from lightning_decentral.algorithms.stale_synchronous import StaleSynchronous
from lightning_decentral.algorithms.staleness_aware import StalenessAware
from lightning_decentral.algorithms.streaming_diloco import StreamingDiLoCo
from lightning_decentral.algorithms.swarm import Swarm
from lightning_decentral.algorithms.sync_sgd import SyncSGD

__all__ = [
    "ACPD",
    "ADPSGD",
    "APSGD",
    "BMUF",
    "CPSGD",
    "D2",
    "DCDPSGD",
    "DPSGD",
    "EASGD",
    "ECDPSGD",
    "EF21",
    "SAEF",
    "SCAFFOLD",
    "SGP",
    "SPARTA",
    "ACiD",
    "AsyncEASGD",
    "BackupWorkers",
    "ChocoSGD",
    "CoCoA",
    "CoCoAPlus",
    "CoCoDSGD",
    "DecentLaM",
    "DeepSqueeze",
    "DelayAdaptive",
    "DelayedNesterov",
    "DiLoCo",
    "EagerDiLoCo",
    "Extra",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedBuff",
    "FedMom",
    "FedNova",
    "FedProx",
    "FedYogi",
    "GossipPGA",
    "GradientTracking",
    "HierarchicalGossip",
    "Hogwild",
    "LocalSGD",
    "Malenia",
    "MomentumTracking",
    "MoniquaSGD",
    "NoLoCo",
    "OverlapLocalSGD",
    "QGDSGDm",
    "RelaySGD",
    "Rennala",
    "Ringleader",
    "Ringmaster",
    "SlowMo",
    "SparseLoCo",
    "StaleSynchronous",
    "StalenessAware",
    "StreamingDiLoCo",
    "Swarm",
    "SyncSGD",
]
