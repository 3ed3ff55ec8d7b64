"""Language modelling: a small decoder-only transformer over bytes, characters or words."""

from __future__ import annotations

import functools
import math
from typing import Literal

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.recipes.text_data import AbstractTextData


class _Block(nn.Module):
    """Causal self-attention, then a two-layer perceptron, each normalized first and added to its input."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.norm1 = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.mix = nn.Linear(width, width, bias=False)
        self.norm2 = nn.LayerNorm(width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        packed = self.query_key_value(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = packed.permute(2, 0, 3, 1, 4)  # each [batch, heads, length, width / heads]
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        attended = attended.transpose(1, 2).reshape(batch, length, width)
        x = x + F.dropout(self.mix(attended), self.dropout, self.training)
        return x + F.dropout(self.perceptron(self.norm2(x)), self.dropout, self.training)


class _Embed(nn.Module):
    """What comes before the first block."""

    def __init__(self, tokens: nn.Embedding, positions: nn.Embedding, dropout: float) -> None:
        super().__init__()
        self.tokens = tokens
        self.positions = positions
        self.dropout = dropout

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        return F.dropout(x, self.dropout, self.training)


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

    Raises:
        ConfigurationError: Heads do not divide the width, or the data has more tokens than the model.

    Example:
        >>> import torch
        >>> model = TransformerLM(depth=1, width=32, heads=2)
        >>> model(torch.zeros(3, 10, dtype=torch.int64)).shape
        torch.Size([3, 10, 256])

    References:
        A. Vaswani et al.: Attention Is All You Need. NeurIPS 2017, arXiv:1706.03762.
        A. Radford et al.: Language Models are Unsupervised Multitask Learners. 2019.
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
    ) -> None:
        super().__init__()
        if width % heads:
            raise ConfigurationError(
                f"width must be a multiple of heads, got {width} and {heads}. Use width={heads * 32}."
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
        self.tokens = nn.Embedding(vocabulary_size, width)
        self.positions = nn.Embedding(context_length, width)
        self.blocks = nn.Sequential(*(_Block(width, heads, dropout) for _ in range(depth)))
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
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]  # [batch, length, width]
        x = self.norm(self.blocks(F.dropout(x, self.dropout, self.training)))
        return F.linear(x, self.tokens.weight)

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

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Cross entropy of one batch of windows ``[batch, length + 1]`` (nats per token)."""
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
