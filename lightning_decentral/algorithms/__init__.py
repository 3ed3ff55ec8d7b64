"""The methods: one paper, one file. Each is a frozen dataclass of hyper-parameters and a coroutine per step."""

from lightning_decentral.algorithms.adpsgd import ADPSGD
from lightning_decentral.algorithms.choco_sgd import ChocoSGD
from lightning_decentral.algorithms.d2 import D2
from lightning_decentral.algorithms.diloco import DiLoCo
from lightning_decentral.algorithms.dpsgd import DPSGD
from lightning_decentral.algorithms.ef21 import EF21
from lightning_decentral.algorithms.gradient_tracking import GradientTracking
from lightning_decentral.algorithms.local_sgd import LocalSGD
from lightning_decentral.algorithms.moniqua_sgd import MoniquaSGD
from lightning_decentral.algorithms.noloco import NoLoCo
from lightning_decentral.algorithms.saef import SAEF
from lightning_decentral.algorithms.slowmo import SlowMo
from lightning_decentral.algorithms.streaming_diloco import StreamingDiLoCo
from lightning_decentral.algorithms.sync_sgd import SyncSGD

__all__ = [
    "ADPSGD",
    "D2",
    "DPSGD",
    "EF21",
    "SAEF",
    "ChocoSGD",
    "DiLoCo",
    "GradientTracking",
    "LocalSGD",
    "MoniquaSGD",
    "NoLoCo",
    "SlowMo",
    "StreamingDiLoCo",
    "SyncSGD",
]
