"""Models and data of the recipes: ordinary Lightning modules that know nothing of decentralized training.

Everything here is named by ``class_path`` in the YAML files of the ``recipes`` folder of the repository, and works with
every Lightning strategy. Images: `ResNetClassifier`, `LargeBatchResNet`, `TorchvisionClassifier` with `EmbeddedImages`,
`CIFAR10`, `ImageNet`. Text: `TransformerLM` with `Shakespeare`, `WikiText`.
Any of this data divided among workers or clients that differ: `NonIIDDataModule`.
"""

from lightning_decentral.recipes.image_data import CIFAR10, EmbeddedImages, ImageNet
from lightning_decentral.recipes.images import ResNetClassifier, TorchvisionClassifier
from lightning_decentral.recipes.large_batch import LargeBatchResNet
from lightning_decentral.recipes.non_iid_data import NonIIDDataModule
from lightning_decentral.recipes.text import TransformerLM
from lightning_decentral.recipes.text_data import Shakespeare, WikiText
from lightning_decentral.recipes.zeroth_order import PlayPassages, SparseTextClassifier, UniversalAttack

__all__ = [
    "CIFAR10",
    "EmbeddedImages",
    "ImageNet",
    "LargeBatchResNet",
    "NonIIDDataModule",
    "PlayPassages",
    "ResNetClassifier",
    "Shakespeare",
    "SparseTextClassifier",
    "TorchvisionClassifier",
    "TransformerLM",
    "UniversalAttack",
    "WikiText",
]
