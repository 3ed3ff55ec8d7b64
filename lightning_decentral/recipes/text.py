"""Language modelling: a small decoder-only transformer over bytes, characters or words."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.recipes.text_data import AbstractTextData


class _Block(nn.Module):
    """Causal self-attention, then a two-layer perceptron, each normalized first and added to its input.

    Attributes:
        memory: what a block with a memory was given last, ``[batch, length, width]``, without a gradient; ``None`` at
            the beginning of a text.
        remembers: whether it uses its memory where nothing is learnt, too.
    """

    def __init__(self, width: int, heads: int, dropout: float, memory_length: int) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.memory_length = memory_length
        self.memory: Tensor | None = None
        self.remembers = False
        self.norm1 = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.mix = nn.Linear(width, width, bias=False)
        self.norm2 = nn.LayerNorm(width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        known = self._with_memory(x) if self.memory_length else x  # [batch, past + length, width]
        batch, places, width = known.shape
        past = places - x.shape[1]
        packed = self.query_key_value(self.norm1(known)).view(batch, places, 3, self.heads, width // self.heads)
        query, key, value = packed.permute(2, 0, 3, 1, 4)  # each [batch, heads, past + length, width / heads]
        if self.memory_length:
            query, key = _rotated(query)[:, :, past:], _rotated(key)
        dropout = self.dropout if self.training else 0.0
        seen = torch.ones(places - past, places, dtype=torch.bool, device=x.device).tril(past) if past else None
        attended = F.scaled_dot_product_attention(query, key, value, seen, dropout, is_causal=not past)
        attended = attended.transpose(1, 2).reshape(x.shape)
        x = x + F.dropout(self.mix(attended), self.dropout, self.training)
        return x + F.dropout(self.perceptron(self.norm2(x)), self.dropout, self.training)

    def _with_memory(self, x: Tensor) -> Tensor:
        """Put the memory before what the block is given, and remember that: in training, and where it is asked for."""
        learns = self.training and torch.is_grad_enabled()
        if self.training and not learns and self.memory is not None:
            raise ConfigurationError(
                "A block with a memory got a forward pass without a graph in the middle of training, as in pipelines "
                "that make forward passes again, and needs one pass for each batch. Use a schedule that keeps graphs, "
                "such as strategy='ouroboros' or PipelineStrategy('ddg'); or memory_length=0."
            )
        if not (learns or self.remembers):
            return x
        known = x if self.memory is None or len(self.memory) != len(x) else torch.cat([self.memory.to(x.dtype), x], 1)
        self.memory = known[:, -self.memory_length :].detach()
        return known


def _rotated(x: Tensor) -> Tensor:
    """Turn pairs of channels by angles that grow with the place, so that products depend on distances alone."""
    half = x.shape[-1] // 2
    turns = 10_000.0 ** (-torch.arange(half, device=x.device) / half)
    angles = torch.arange(x.shape[-2], device=x.device)[:, None] * turns  # [length, half]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    one, other = x[..., :half], x[..., half:]
    return torch.cat([one * cos - other * sin, one * sin + other * cos], -1)


class _Embed(nn.Module):
    """What comes before the first block."""

    def __init__(self, tokens: nn.Embedding, positions: nn.Embedding | None, dropout: float) -> None:
        super().__init__()
        self.tokens = tokens
        self.positions = positions
        self.dropout = dropout

    def forward(self, tokens: Tensor) -> Tensor:
        return _embedded(tokens, self.tokens, self.positions, self.dropout if self.training else 0.0)


def _embedded(tokens: Tensor, embedding: nn.Embedding, positions: nn.Embedding | None, dropout: float) -> Tensor:
    x = embedding(tokens)  # [batch, length, width]
    if positions is not None:
        x = x + positions.weight[: tokens.shape[1]]
    return F.dropout(x, dropout)


class _Score(nn.Module):
    """What comes after the last norm: the tied output."""

    def __init__(self, tokens: nn.Embedding) -> None:
        super().__init__()
        self.tokens = tokens

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.tokens.weight)


class TransformerLM(LightningModule):
    """A decoder-only transformer that predicts the next token (GPT-2 layout: pre-norm, learned positions, tied output).

    Logged: ``train_loss`` per step, of this worker alone (nothing is communicated while training); ``val_loss`` and
    ``test_loss`` in nats per token and ``val_bits_per_character`` (= ``val_loss`` / ln 2; per *token*, so bits per
    character where a token is a character) over all workers. Positions early in a window have little context, so the
    loss of short windows is a little higher than that of the same model with a sliding window.

    With a memory it is a Transformer-XL: each block also attends to what it was given in the batches before, without a
    gradient. Places are then told by rotations of queries and keys, where the paper has sinusoids with learned biases.
    The rows of a batch must go on where those of the last one ended: data with ``streams``. Each epoch, and a run that
    is resumed, begins with an empty memory. In evaluation the first half of a window fills it.

    Args:
        vocabulary_size: Number of different tokens; 256 for bytes. Must be at least that of the data.
        depth: Number of transformer blocks.
        width: Channels; a multiple of ``heads``.
        heads: Attention heads.
        context_length: Longest sequence, in tokens; at least that of the data.
        dropout: In [0, 1), on embeddings, attention and residual branches.
        learning_rate: Step size after the warm-up: about 1e-3 for ``"adamw"`` and 0.1 for ``"sgd"``.
        optimizer: ``"adamw"`` (betas 0.9, 0.95) or ``"sgd"`` with momentum 0.9.
        weight_decay: Decoupled for AdamW, L2 for SGD; on matrices and embeddings, not on biases and norms.
        warmup_steps: Steps of linear warm-up. Counted in steps of one worker, which an asynchronous worker knows too.
        schedule: After the warm-up: ``"constant"``, or ``"inverse_sqrt"``: times sqrt(warmup_steps / step). Neither
            needs the total number of steps, which an asynchronous worker does not know.
        memory_length: Tokens that each block remembers; 0: it has no memory. The paper trains with as many as
            ``context_length``. Costs ``depth * batch * memory_length * width`` numbers.

    Raises:
        ConfigurationError: Heads do not divide the width, or the data has more tokens than the model. With a memory: in
            the second batch, if its rows do not go on from the first one's; in a pipeline that divides batches, or that
            makes forward passes again.

    Example:
        >>> import torch
        >>> model = TransformerLM(depth=1, width=32, heads=2)
        >>> model(torch.zeros(3, 10, dtype=torch.int64)).shape
        torch.Size([3, 10, 256])

    References:
        A. Vaswani et al.: Attention Is All You Need. NeurIPS 2017, arXiv:1706.03762.
        A. Radford et al.: Language Models are Unsupervised Multitask Learners. 2019.
        Z. Dai, Z. Yang, Y. Yang, J. Carbonell, Q. V. Le, R. Salakhutdinov: Transformer-XL. ACL 2019, arXiv:1901.02860.
        J. Su, Y. Lu, S. Pan, A. Murtadha, B. Wen, Y. Liu: RoFormer. 2021, arXiv:2104.09864.
    """

    def __init__(
        self,
        vocabulary_size: int = 256,
        depth: int = 4,
        width: int = 128,
        heads: int = 4,
        context_length: int = 128,
        dropout: float = 0.0,
        learning_rate: float = 1e-3,
        optimizer: Literal["adamw", "sgd"] = "adamw",
        weight_decay: float = 0.1,
        warmup_steps: int = 100,
        schedule: Literal["constant", "inverse_sqrt"] = "constant",
        memory_length: int = 0,
    ) -> None:
        super().__init__()
        if width % (2 * heads if memory_length else heads) or memory_length < 0:
            raise ConfigurationError(
                f"width must be a multiple of heads, with a memory of twice as many, and memory_length 0 or more, got "
                f"{width}, {heads} and {memory_length}. Use width={heads * 32}."
            )
        if optimizer not in ("adamw", "sgd") or schedule not in ("constant", "inverse_sqrt"):
            raise ConfigurationError(
                f"optimizer is 'adamw' or 'sgd' and schedule 'constant' or 'inverse_sqrt', got {optimizer!r} and "
                f"{schedule!r}. Use one of them, or override configure_optimizers."
            )
        self.save_hyperparameters()
        self.vocabulary_size = vocabulary_size
        self.context_length = context_length
        self.dropout = dropout
        self.learning_rate = learning_rate
        self.optimizer = optimizer
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.schedule = schedule
        self.memory_length = memory_length
        self._rows = 0  # of the batch
        self._ends: Tensor | None = None  # the last token of each row of the batch before
        self.tokens = nn.Embedding(vocabulary_size, width)
        self.positions = None if memory_length else nn.Embedding(context_length, width)
        self.blocks = nn.Sequential(*(_Block(width, heads, dropout, memory_length) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                last_of_branch = name.endswith(("mix.weight", "perceptron.2.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * depth) if last_of_branch else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores of the token that follows each position.

        Args:
            tokens: ``[batch, length]``, int64, ``length <= context_length``.

        Returns:
            Logits, ``[batch, length, vocabulary_size]``.
        """
        x = _embedded(tokens, self.tokens, self.positions, self.dropout if self.training else 0.0)
        return F.linear(self.norm(self.blocks(x)), self.tokens.weight)

    def configure_stages(self) -> tuple[nn.Module, list[nn.Module]]:
        """Name the blocks that a pipeline may cut between.

        The first and the last of them have the embedding in common: a pipeline needs them on one worker, as the ring of
        Ouroboros has them.
        """
        return self, [_Embed(self.tokens, self.positions, self.dropout), *self.blocks, self.norm, _Score(self.tokens)]

    def setup(self, stage: str) -> None:
        """Compares the model with the data, where the data come from this module's neighbour."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]  # absent from the annotations of Trainer
        if not isinstance(data, AbstractTextData):
            return
        for name, have, need in (
            ("vocabulary_size", self.vocabulary_size, data.vocabulary_size),
            ("context_length", self.context_length, data.context_length),
        ):
            if have < need:
                raise ConfigurationError(
                    f"The model has {name}={have}, the data need at least {need}. "
                    f"Set model.init_args.{name} and data.init_args.{name} to the same number."
                )

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """Let what comes be one text: begin with an empty memory, and go on with that of training afterwards.

        In training a model with a memory remembers by itself; outside of this, what it evaluates are texts apart.

        Example:
            >>> import torch
            >>> model = TransformerLM(depth=1, width=32, heads=2, memory_length=8).eval()
            >>> text = torch.randint(0, 256, (1, 8))
            >>> with torch.no_grad(), model.remembering():
            ...     parts = [model(text[:, :4]), model(text[:, 4:])]
            >>> torch.allclose(torch.cat(parts, 1), model(text), atol=1e-5)
            True
        """
        blocks = [block for block in self.modules() if isinstance(block, _Block)]
        before = [block.memory for block in blocks]
        for block in blocks:
            block.memory, block.remembers = None, True
        try:
            yield
        finally:
            for block, memory in zip(blocks, before, strict=True):
                block.memory, block.remembers = memory, False

    def on_train_epoch_start(self) -> None:
        """Begin at the beginning of the texts."""
        self._ends = None
        for block in self.modules():
            if isinstance(block, _Block):
                block.memory = None

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        """See, in the second batch, that the rows go on: with a memory only."""
        if not self.memory_length:
            return
        self._rows = len(batch)
        if self._ends is not None and batch_idx < 2 and not torch.equal(self._ends, batch[:, 0]):
            raise ConfigurationError(
                f"TransformerLM(memory_length={self.memory_length}) got a batch whose rows do not go on where those of "
                "the batch before ended. Set data.init_args.streams to the rows of a batch of all workers, batch_size "
                "times their number. The workers of an asynchronous strategy take rows as they come: there use "
                "memory_length=0."
            )
        self._ends = batch[:, -1]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Cross entropy of one batch of windows ``[batch, length + 1]`` (nats per token)."""
        if self.memory_length and len(batch) != self._rows:
            raise ConfigurationError(
                f"TransformerLM(memory_length={self.memory_length}) got {len(batch)} of the {self._rows} rows of a "
                "batch, and needs all of them at once: each has a memory. Use memory_length=0, or a pipeline that does "
                "not divide batches, such as strategy='ouroboros'."
            )
        loss = self._loss(batch)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch))
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Logs ``val_loss`` and ``val_bits_per_character``."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        """Logs ``test_loss`` and ``test_bits_per_character``."""
        self._evaluate(batch, "test")

    def _loss(self, batch: Tensor) -> Tensor:
        logits = self(batch[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def _evaluate(self, batch: Tensor, split: str) -> None:
        with self.remembering():
            if self.memory_length:
                half = batch.shape[1] // 2
                self(batch[:, :half])
                batch = batch[:, half:]
            loss = self._loss(batch)
        bits = loss / math.log(2)
        self.log(f"{split}_loss", loss, sync_dist=True, batch_size=len(batch))
        self.log(f"{split}_bits_per_character", bits, sync_dist=True, prog_bar=True, batch_size=len(batch))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW or SGD, with a schedule that is advanced at every step."""
        decayed = [parameter for parameter in self.parameters() if parameter.dim() >= 2]
        others = [parameter for parameter in self.parameters() if parameter.dim() < 2]
        groups = [{"params": decayed, "weight_decay": self.weight_decay}, {"params": others, "weight_decay": 0.0}]
        optimizer: Optimizer
        if self.optimizer == "adamw":
            optimizer = AdamW(groups, lr=self.learning_rate, betas=(0.9, 0.95))
        else:
            optimizer = SGD(groups, lr=self.learning_rate, momentum=0.9)
        decay = self.schedule == "inverse_sqrt"
        factor = functools.partial(_learning_rate_factor, warmup_steps=self.warmup_steps, inverse_sqrt=decay)
        scheduler = LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _learning_rate_factor(step: int, warmup_steps: int, inverse_sqrt: bool) -> float:
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return math.sqrt(max(1, warmup_steps) / (step + 1)) if inverse_sqrt else 1.0
