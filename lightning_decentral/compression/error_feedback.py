"""Error feedback: what a message left out is remembered, and added to the next vector."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from lightning_decentral.compression.base import AbstractCompressor, Payload
from lightning_decentral.errors import CompressionError

_ALL = slice(None)
_WIDE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


@final
class ErrorFeedback:
    r"""Remembers what one worker's messages left out, and adds it to the next vector before that is compressed.

        input = x + f m;   send C(input);   m <- input - C(input)

    Whatever the compressor, nothing is lost: *sent + new memory = x + f (old memory)*, so that after any number of
    steps the sum of what was sent is the sum of the vectors, less one memory. It makes biased compressors converge that
    are a contraction (`error_bound` at most 1). With others the memory may grow without end.

    **Units.** The telescoping sum has to hold for what is *added to the parameters*, which is the gradient times the
    learning rate. A memory of gradients that is kept through a change of the learning rate, from `a` to `b`, is in the
    wrong unit: pass the factor `f = a / b` in the first step with `b`. The same holds for the scale of a loss scaler.

    **Two phases.** `compress` leaves the memory as it was; `commit` replaces it, and `discard` forgets the step, for
    one that is not applied after all (a loss scaler found an infinity on some worker).

    **Another number of workers.** The sum over the workers counts, divided by their number. Give every new worker the
    mean of the old memories: their mean is then what it was.

    Memory: two vectors, in float32 if the vector is in half precision.

    Args:
        compressor: any.
        memory: what to begin with, one-dimensional; it is kept and written to. Zeros where nothing is remembered yet.

    Attributes:
        memory: what was not sent yet.

    Raises:
        CompressionError: if the memory is not one-dimensional.

    Example:
        >>> import torch
        >>> from lightning_decentral.compression import TopK
        >>> feedback = ErrorFeedback(TopK(0.5), torch.zeros(2))
        >>> for _ in range(2):
        ...     payload, sent = feedback.compress(torch.tensor([1.0, 0.75]))
        ...     feedback.commit()
        ...     print(sent.tolist(), feedback.memory.tolist())
        [1.0, 0.0] [0.0, 0.75]
        [0.0, 1.5] [1.0, 0.0]

    References:
        Seide, Fu, Droppo, Li, Yu, *1-Bit Stochastic Gradient Descent*, Interspeech 2014; Stich, Cordonnier, Jaggi,
        *Sparsified SGD with Memory*, NeurIPS 2018, arXiv:1809.07599; Karimireddy, Rebjock, Stich, Jaggi, *Error
        Feedback Fixes SignSGD and other Gradient Compression Schemes*, ICML 2019, arXiv:1901.09847.
    """

    def __init__(self, compressor: AbstractCompressor, memory: Tensor) -> None:
        if memory.dim() != 1:
            raise CompressionError(
                f"ErrorFeedback got a memory of shape {tuple(memory.shape)}, needs one dimension. Pass .view(-1)."
            )
        self.compressor = compressor
        self.memory = memory
        self._pending = torch.empty_like(memory)
        self._open = False

    @staticmethod
    def dtype_of(dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of the memory for vectors of this dtype: half precision would lose what is small again."""
        return _WIDE.get(dtype, dtype)

    @property
    def left(self) -> Tensor:
        """What the message that is not committed yet left out: the memory after `commit`."""
        return self._pending

    @torch.no_grad()
    def add(self, x: Tensor, factor: float | Tensor = 1.0, where: slice = _ALL) -> Tensor:
        """Return `x + factor * memory`: what has to be compressed now. The first half of `compress`, for schemes of
        several rounds such as PowerSGD, and for vectors that are sent part by part; `remove` is the other.

        Args:
            x: a vector of the memory's length, or of the part's.
            factor: by which the memory's unit has changed; one for all, or a tensor with one for each element of ``x``.
            where: the part of the memory; in one step every element has to be part of one message.

        Returns:
            A buffer of this object, to be read before `remove`.
        """
        memory, pending = self.memory[where], self._pending[where]
        if isinstance(factor, Tensor):
            torch.addcmul(x.to(memory.dtype), memory, factor, out=pending)
        else:
            torch.add(x, memory, alpha=factor, out=pending)
        self._open = True
        return pending

    @torch.no_grad()
    def remove(self, sent: Tensor, where: slice = _ALL) -> None:
        """Tell what the message of this part stands for: the rest of what `add` gave is the next memory."""
        self._pending[where].sub_(sent)

    @torch.no_grad()
    def leave(self, payload: Payload, scratch: Tensor, where: slice = _ALL) -> None:
        """Do as `remove` with what a message stands for that is not needed otherwise.

        Args:
            payload: what the compressor made of what `add` gave.
            scratch: of the part's length and the message's dtype; its values are lost.
            where: the part.
        """
        self.compressor.subtract_(payload, self._pending[where], scratch)

    def compress(
        self, x: Tensor, generator: torch.Generator | None = None, factor: float | Tensor = 1.0
    ) -> tuple[Payload, Tensor]:
        """Return the message, and what it stands for. The memory changes with `commit` only.

        Args:
            x: a vector of the memory's length.
            generator: as for the compressor.
            factor: as for `add`.

        Raises:
            CompressionError: for NaN and infinity; the memory is as it was.
        """
        payload = self.compressor.compress(self.add(x, factor).to(x.dtype), generator)
        sent = self.compressor.decompress(payload)
        self.remove(sent)
        return payload, sent

    def commit(self) -> None:
        """Remember what a message left out: it was used."""
        if self._open:
            self.memory, self._pending = self._pending, self.memory
        self._open = False

    def discard(self) -> None:
        """Leave the memory as it was before: the message was not used."""
        self._open = False
