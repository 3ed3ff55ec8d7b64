"""What every compressor is: a frozen set of hyper-parameters with `compress`, `decompress` and `num_bits`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_decentral.compression.memory import uninitialized
from lightning_decentral.errors import CompressionError

Field = tuple[torch.dtype, int]
"""One tensor of a message: its dtype and its number of elements."""


@dataclass(frozen=True)
class Traits:
    """What the users of a compressor have to know about it, as data.

    Args:
        unbiased: the mean over the generator's draws is the vector itself. Methods such as DCD-PSGD need it; what is
            biased needs error feedback.
        linear: the sum (or mean) of the tensors of several workers is the message of their vectors' sum: an
            all-reduce works. Otherwise messages are gathered and decoded one by one.
        randomness: ``"none"``; ``"own"``: a generator that differs between workers; ``"shared"``: one in the same
            state on all workers, because what is drawn does not travel.
        keeps_dtype: values travel in the dtype of the vector, and lose nothing by that. Otherwise everything is
            computed in float32.
        fixed_size: the size of a message follows from the vector's size. Otherwise `num_bits` is the largest.
        unit: elements that are compressed together (a bucket): a vector that is cut into parts is cut between units.
        divisible: the tensors of a vector's message are those of its parts' messages, one after the other, if it is cut
            between units: `split` works.
        sums_grow: a sum of messages has more in it than fits into one, as of sparse and low-rank ones.
    """

    unbiased: bool
    linear: bool = False
    randomness: Literal["none", "own", "shared"] = "none"
    keeps_dtype: bool = False
    fixed_size: bool = True
    unit: int = 1
    divisible: bool = False
    sums_grow: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Payload:
    """A compressed vector. Only `tensors` travel; the rest is known on both sides.

    Args:
        tensors: what is sent: contiguous, one-dimensional.
        shape: of the vector.
        dtype: of the vector.
        seed: of what was drawn from a shared generator; all workers have the same. Zero if nothing was.
    """

    tensors: tuple[Tensor, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    seed: int = 0

    @property
    def num_bits(self) -> int:
        """The number of bits that travel."""
        return 8 * sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)

    def to_buffer(self) -> Tensor:
        """Return one tensor of bytes with everything that travels, for one message; `from_buffer` reads it.

        It is the memory of the tensors themselves if they lie there one after the other.
        """
        pieces = [tensor.view(torch.uint8) for tensor in self.tensors]
        first, storage = pieces[0], pieces[0].untyped_storage().data_ptr()
        end = first.storage_offset()
        for piece in pieces:
            if piece.storage_offset() != end or piece.untyped_storage().data_ptr() != storage:
                return torch.cat(pieces)
            end += piece.numel()
        return first.as_strided((end - first.storage_offset(),), (1,))

    def replace(self, tensors: Sequence[Tensor]) -> Payload:
        """Return the same message with other tensors: the sum that an all-reduce gave, or what a peer sent."""
        return Payload(tuple(tensors), self.shape, self.dtype, self.seed)


class AbstractCompressor(ABC):
    """Makes a vector smaller. It remembers nothing: error feedback is somebody else's.

    A compressor is a frozen dataclass of hyper-parameters. `compress` takes a tensor of any shape and floating-point
    dtype, contiguous or not, on any device; the result of `decompress` has the same shape and dtype. An empty tensor
    makes an empty message. NaN and infinity are refused: one of them would spoil a whole bucket without a trace.

    The result is finite, up to the largest numbers of the dtype: where what has to be computed of such numbers may be
    beyond float32's range, as sums are, `compress` refuses them.
    """

    # -- what a compressor says about itself --------------------------------------------------------------------------

    @property
    @abstractmethod
    def traits(self) -> Traits:
        """Whether it is unbiased, can be all-reduced, draws random numbers."""

    @abstractmethod
    def error_bound(self, numel: int) -> float:
        """Return the smallest known `c` with `E ||C(x) - x||^2 <= c ||x||^2` for every vector of so many elements.

        The literature calls it omega where the compressor is unbiased, and `1 - delta` where it is a contraction.
        Infinite if nothing of this kind is known.
        """

    @abstractmethod
    def fields(self, shape: Sequence[int], dtype: torch.dtype) -> tuple[Field, ...]:
        """Return the tensors that a vector of this shape and dtype is sent as, those of wide dtypes first."""

    _shows_what_is_not_finite: ClassVar[bool] = False
    """Whether NaN and infinity in a vector make a floating-point tensor of its message NaN or infinite, which is looked
    at then in the place of the vector, or are refused by `_encode`: a pass over the memory less."""

    _may_overflow: ClassVar[bool] = False
    """Whether large values make a floating-point tensor of the message infinite or NaN; they are refused then."""

    # -- what it does -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def compress(self, x: Tensor, generator: torch.Generator | None = None) -> Payload:
        """Make the message.

        A tensor of torch's `meta` device, which has a size and no values, makes a message of the same kind: of the size
        that `num_bits` tells.

        Args:
            x: the vector; it is not changed.
            generator: on the device of ``x``, if `traits` say that one is needed; with ``"shared"`` randomness one in
                the same state on all workers.

        Raises:
            CompressionError: for NaN, infinity, values too large for this compressor, a dtype that is not
                floating-point, or a missing generator.
        """
        if not x.dtype.is_floating_point:
            raise CompressionError(
                f"{type(self).__name__} got a tensor of {x.dtype}, needs a floating-point one. Convert it, or leave it "
                "uncompressed."
            )
        if generator is None and self.traits.randomness != "none" and not x.is_meta:
            raise CompressionError(
                f"{self} got no generator and draws random numbers. Pass generator=torch.Generator() with a seed"
                + (" that is the same on all workers." if self.traits.randomness == "shared" else " of this worker.")
            )
        shape, dtype = tuple(x.shape), x.dtype
        flat = x.detach().reshape(-1)
        if not self.traits.keeps_dtype:
            flat = flat.float()
        seed = 0
        if self.traits.randomness == "shared" and generator is not None:
            seed = self.shared_seed(generator)
        if not flat.numel() or x.is_meta:
            tensors: tuple[Tensor, ...] = tuple(
                torch.empty(count if flat.numel() else 0, dtype=field, device=x.device)
                for field, count in self.fields(shape, dtype)
            )
        else:
            if not self._shows_what_is_not_finite:
                _require_finite(flat, x, type(self).__name__)
            try:
                tensors = self._encode(flat.contiguous(), shape, generator, seed)
            except CompressionError:
                _require_finite(flat, x, type(self).__name__)  # the better reason
                raise
            if (self._shows_what_is_not_finite or self._may_overflow) and not all(
                bool(tensor.isfinite().all()) for tensor in tensors if tensor.is_floating_point()
            ):
                _require_finite(flat, x, type(self).__name__)
                raise CompressionError(
                    f"{self} got values of up to {float(flat.abs().max()):.3g}, needs smaller ones: what has to be "
                    f"computed of them is beyond the range of {flat.dtype}. Scale them down."
                )
        return Payload(tensors, shape, dtype, seed)

    @staticmethod
    def shared_seed(generator: torch.Generator) -> int:
        """Draw the `Payload.seed` of the next message, as `compress` does with shared randomness: for who receives it.

        Args:
            generator: in the state in which that of the sender is.
        """
        return int(torch.randint(1, 2**62, (), generator=generator, device=generator.device))

    @torch.no_grad()
    def decompress(self, payload: Payload, out: Tensor | None = None) -> Tensor:
        """Make the vector that a message stands for.

        Args:
            payload: what `compress` returned here or on another worker, or the sum or mean of such tensors if `traits`
                say that this compressor is linear.
            out: written to and returned if given: contiguous, of the payload's shape and dtype. New memory costs more
                time than decoding does.
        """
        if out is None:
            device = payload.tensors[0].device
            out = uninitialized(payload.shape, payload.dtype, device)
        elif tuple(out.shape) != payload.shape or out.dtype != payload.dtype or not out.is_contiguous():
            raise CompressionError(
                f"decompress got out of shape {tuple(out.shape)} and {out.dtype}, needs a contiguous one of shape "
                f"{payload.shape} and {payload.dtype}. Leave it out to get a new tensor."
            )
        if out.numel() and not out.is_meta:
            flat = out.view(-1)
            if self.traits.keeps_dtype or out.dtype == torch.float32:
                self._decode(payload, flat)
            else:
                wide = torch.empty(flat.shape, dtype=torch.float32, device=flat.device)
                self._decode(payload, wide)
                if out.dtype.itemsize < wide.dtype.itemsize:  # rounded up, the largest would be infinite
                    limit = torch.finfo(out.dtype).max
                    wide.clamp_(-limit, limit)
                flat.copy_(wide)
        return out

    @torch.no_grad()
    def subtract_(self, payload: Payload, x: Tensor, scratch: Tensor | None = None) -> Tensor:
        """Turn the vector that a message was made of into what the message left out, `x - C(x)`.

        Args:
            payload: what `compress` made of ``x``.
            x: contiguous; it is changed.
            scratch: memory for what the message stands for, as ``out`` of `decompress`; its values are lost. New memory
                if there is none.

        Returns:
            ``x``.
        """
        return x.sub_(self.decompress(payload, out=scratch))

    def at_epoch(self, epoch: int) -> AbstractCompressor:
        """Give the compressor of an epoch: itself, unless it warms up."""
        return self

    def num_bits(self, shape: int | Sequence[int], dtype: torch.dtype = torch.float32) -> int:
        """Bits of a message, or of the largest one where the size is not fixed.

        Args:
            shape: number of elements, or the vector's shape; only compressors of matrices look at the latter.
            dtype: of the vector; only compressors that keep it look at it.
        """
        return 8 * sum(count * field.itemsize for field, count in self.fields(_as_shape(shape), dtype))

    def from_buffer(self, buffer: Tensor, shape: Sequence[int], dtype: torch.dtype, seed: int = 0) -> Payload:
        """Read what `Payload.to_buffer` wrote: the receiving side. The tensors are views of the buffer.

        Args:
            buffer: the bytes that arrived.
            shape: of the vector that was sent.
            dtype: of the vector that was sent.
            seed: of the message; for shared randomness that of one's own message of the same step.

        Raises:
            CompressionError: if the number of bytes does not fit.
        """
        fields = self.fields(tuple(shape), dtype)
        if not self.traits.fixed_size:  # all fields have the same number of elements; the buffer tells which
            each = buffer.numel() // sum(field.itemsize for field, _ in fields)
            fields = tuple((field, each) for field, _ in fields)
        sizes = [count * field.itemsize for field, count in fields]
        if buffer.dtype != torch.uint8 or buffer.numel() != sum(sizes):
            raise CompressionError(
                f"{self} got a message of {buffer.numel()} x {buffer.dtype}, needs {sum(sizes)} bytes (uint8) for "
                f"shape {tuple(shape)}. Use the same compressor, with the same options, on all workers."
            )
        parts = torch.split(buffer, sizes)
        tensors = tuple(part.view(field) for part, (field, _) in zip(parts, fields, strict=True))
        return Payload(tensors, tuple(shape), dtype, seed)

    def split(self, payload: Payload, sizes: Sequence[int]) -> list[Payload]:
        """Return the messages of a vector's parts out of the message of the whole; only if `traits` say ``divisible``.

        Args:
            payload: of a one-dimensional vector.
            sizes: elements of each part, all of the vector together; the parts end between units.

        Returns:
            One message per part; the tensors are views.
        """
        counts = [[count for _, count in self.fields((size,), payload.dtype)] for size in sizes]
        fields = zip(payload.tensors, zip(*counts, strict=True), strict=True)
        parts = zip(*(torch.split(tensor, list(of_parts)) for tensor, of_parts in fields), strict=True)
        return [Payload(part, (size,), payload.dtype) for part, size in zip(parts, sizes, strict=True)]

    # -- what a scheme implements -------------------------------------------------------------------------------------

    @abstractmethod
    def _encode(
        self, x: Tensor, shape: tuple[int, ...], generator: torch.Generator | None, seed: int
    ) -> tuple[Tensor, ...]:
        """Return the tensors of the message of ``x``: contiguous, one-dimensional, finite, at least one element."""

    @abstractmethod
    def _decode(self, payload: Payload, out: Tensor) -> None:
        """Write the vector into ``out``: contiguous and one-dimensional; float32 unless the dtype is kept."""


def _as_shape(shape: int | Sequence[int]) -> tuple[int, ...]:
    return (shape,) if isinstance(shape, int) else tuple(shape)


def numel(shape: Sequence[int]) -> int:
    """Number of elements of a tensor of this shape."""
    return prod(shape)


def _require_finite(flat: Tensor, x: Tensor, kind: str) -> None:
    """Raise if there is a NaN or an infinity. The sum tells almost always, and costs one pass over the memory."""
    wide = torch.float32 if flat.dtype.itemsize < 4 else flat.dtype
    if bool(flat.sum(dtype=wide).isfinite()):
        return
    nans, bad = int(flat.isnan().sum()), int((~flat.isfinite()).sum())
    if bad == 0:  # the sum of large values overflowed
        return
    if bool(x.isfinite().all()):
        raise CompressionError(
            f"{kind} got {bad} values beyond float32's range in a tensor of {x.dtype}, needs values that float32 can "
            "hold. Scale them down."
        )
    raise CompressionError(
        f"{kind} got {nans} NaN and {bad - nans} infinite values among {flat.numel()}, needs finite ones. Find out "
        "where they come from (a too large learning rate, float16 without a loss scaler), or skip this step everywhere."
    )
