"""What a decentralized run is doing, in the progress bar and in any logger; what layers and optimizers need; stragglers
for experiments."""

from lightning_decentral.callbacks.arrivals import Arrivals
from lightning_decentral.callbacks.communication import Communication
from lightning_decentral.callbacks.consensus import ConsensusDistance
from lightning_decentral.callbacks.evaluate_exploited import EvaluateExploited
from lightning_decentral.callbacks.gradient_compression import GradientCompression
from lightning_decentral.callbacks.micro_batch_norms import MicroBatchNorms
from lightning_decentral.callbacks.normalization import NormalizationSwap
from lightning_decentral.callbacks.progress import Progress
from lightning_decentral.callbacks.rounds import RoundReport
from lightning_decentral.callbacks.staleness import Staleness
from lightning_decentral.callbacks.stragglers import Stragglers
from lightning_decentral.callbacks.timeline import Timeline

__all__ = [
    "Arrivals",
    "Communication",
    "ConsensusDistance",
    "EvaluateExploited",
    "GradientCompression",
    "MicroBatchNorms",
    "NormalizationSwap",
    "Progress",
    "RoundReport",
    "Staleness",
    "Stragglers",
    "Timeline",
]
