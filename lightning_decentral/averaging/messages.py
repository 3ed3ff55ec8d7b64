"""Compressed vectors as messages: vectors of packed bytes, which every exchange carries as it carries any other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_decentral.compression import AbstractCompressor, Payload, TopK
from lightning_decentral.compression.sparse import values_and_positions
from lightning_decentral.compression.tiles import chunk_elements
from lightning_decentral.errors import CompressionError, ConfigurationError, TopologyError
from lightning_decentral.flat import AbstractVector, SizeOnlyVector, Vector
from lightning_decentral.topology import AbstractTopology
from lightning_decentral.worker import Worker

_DTYPES = {2: torch.float16, 8: torch.float64}  # by the bytes of an element


@dataclass(frozen=True, slots=True, eq=False)
class Message:
    """A compressed vector.

    Args:
        compressor: that made it.
        vector: what travels: one buffer of bytes for each buffer of the vector; or only its size.
        payloads: the same, as the compressor knows it; none if there is only a size.
    """

    compressor: AbstractCompressor
    vector: AbstractVector
    payloads: tuple[Payload, ...]

    def read(self, received: AbstractVector) -> tuple[Payload, ...]:
        """Read what a neighbour made with the same compressor in the same step, of a vector like this message's."""
        if not isinstance(received, Vector):
            return ()
        return tuple(
            self.compressor.from_buffer(buffer, own.shape, own.dtype, own.seed)
            for buffer, own in zip(received.buffers, self.payloads, strict=True)
        )

    def decode_(self, payloads: tuple[Payload, ...], out: AbstractVector) -> None:
        """Write what payloads stand for into ``out``, which is like the vector that was compressed."""
        if isinstance(out, Vector):
            for payload, buffer in zip(payloads, out.buffers, strict=True):
                self.compressor.decompress(payload, out=buffer)

    def add_decoded_(self, payloads: tuple[Payload, ...], to: AbstractVector, alpha: float = 1.0) -> None:
        """Add ``alpha`` times what payloads stand for, a piece at a time where the compressor allows it."""
        if isinstance(to, Vector):
            for payload, buffer in zip(payloads, to.buffers, strict=True):
                if isinstance(self.compressor, TopK):
                    values, positions = values_and_positions(payload.tensors)
                    # Each position occurs once. `index_add_` would round twice where `add_` does once.
                    buffer.index_copy_(0, positions, buffer[positions].add_(values, alpha=alpha))
                    continue
                for piece, (values,) in self._decoded(buffer, payload):
                    piece.add_(values, alpha=alpha)

    def in_pieces(
        self, vectors: Sequence[AbstractVector], received: Sequence[AbstractVector]
    ) -> Iterator[tuple[list[Tensor], Tensor, list[Tensor]]]:
        """Go through vectors, and what messages stand for there: nothing is decoded whole, where the compressor allows.

        Args:
            vectors: like the one that was compressed, or wider, or of half precision where it was not.
            received: messages of others.

        Yields:
            A piece of each vector, to be changed, what this message stands for there, and what the received ones do;
            these lie in memory that is used again, and may be changed, too.
        """
        if any(not isinstance(vector, Vector) for vector in vectors):
            return
        read = [self.read(each) for each in received]
        of_vectors = [vector.buffers for vector in vectors if isinstance(vector, Vector)]
        for buffers, *payloads in zip(zip(*of_vectors, strict=True), self.payloads, *read, strict=True):
            rest = [iter(torch.split(buffer, _piece_elements(self.compressor, buffer))) for buffer in buffers[1:]]
            for piece, (own, *theirs) in self._decoded(buffers[0], *payloads):
                yield [piece, *(next(each) for each in rest)], own, theirs

    def _decoded(self, buffer: Tensor, *payloads: Payload) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Yield pieces of a buffer, each with the values that payloads have there, in memory that is used again."""
        pieces = torch.split(buffer, _piece_elements(self.compressor, buffer))
        sizes = [piece.numel() for piece in pieces]
        parts = [self.compressor.split(each, sizes) if len(pieces) > 1 else [each] for each in payloads]
        scratch = [torch.empty(sizes[0], dtype=each.dtype, device=buffer.device) for each in payloads]
        for piece, *of_piece in zip(pieces, *parts, strict=True):
            values = [memory[: piece.numel()] for memory in scratch]
            for payload, out in zip(of_piece, values, strict=True):
                self.compressor.decompress(payload, out=out)
            yield piece, values


def _piece_elements(compressor: AbstractCompressor, buffer: Tensor) -> int:
    """Tell how many elements of a buffer are compressed or decoded at once: all, if the compressor looks at all."""
    traits, most = compressor.traits, chunk_elements(buffer.device)
    size = max(buffer.numel(), 1)
    if traits.divisible and traits.randomness != "shared":
        size = min(size, max(most - most % traits.unit, traits.unit))
    return size


def message_like(compressor: AbstractCompressor, value: AbstractVector) -> AbstractVector:
    """Make a vector of the form of the message of ``value``, for whoever receives one; its values do not matter."""
    if isinstance(value, Vector):
        return Vector(
            torch.empty(compressor.num_bits(buffer.numel(), buffer.dtype) // 8, dtype=torch.uint8, device=buffer.device)
            for buffer in value.buffers
        )
    assert isinstance(value, SizeOnlyVector)
    num_bits = compressor.num_bits(elements(value)[0], _DTYPES.get(value.element_bytes, torch.float32))
    return SizeOnlyVector(num_bits // 8)


def compressed(
    compressor: AbstractCompressor,
    value: AbstractVector,
    worker: Worker,
    alike: bool = False,
    seed: int | None = None,
) -> Message:
    """Make the message of a vector: each of its buffers compressed by itself.

    Of a vector that has only a size, a vector of the message's size; other 2-byte elements are as float16.

    Args:
        compressor: of fixed size.
        value: is not changed.
        worker: draws the random numbers: its own from its ``rng``; those that all workers share from the step's number.
        alike: all workers compress the same vector, and make the same message of it.
        seed: of these random numbers, in the place of a draw or of the step's number.

    Raises:
        CompressionError: for NaN and infinity.
    """
    if isinstance(value, SizeOnlyVector):
        return Message(compressor, message_like(compressor, value), ())
    assert isinstance(value, Vector)
    generator = _generator(compressor, value, worker, alike, seed)
    with _naming(worker):
        payloads = tuple(compressor.compress(buffer, generator) for buffer in value.buffers)
    message = Vector(payload.to_buffer() for payload in payloads)
    # Messages of a linear compressor are reduced in place, and the payloads, whose memory they may be, are used after.
    if compressor.traits.linear:
        return Message(compressor, message.clone(), payloads)
    if compressor.traits.fixed_size:  # the payloads may lie in the message: one copy, and not two
        payloads = tuple(
            compressor.from_buffer(buffer, payload.shape, payload.dtype, payload.seed)
            for buffer, payload in zip(message.buffers, payloads, strict=True)
        )
    return Message(compressor, message, payloads)


def compressed_in_pieces(
    compressor: AbstractCompressor,
    worker: Worker,
    like: AbstractVector,
    vectors: Sequence[AbstractVector],
    fill: Callable[..., object],
) -> Message:
    """Make the message of a vector that is never there as a whole, where the compressor allows it.

    It is the message that `compressed` makes of the whole one, and takes less time: a piece stays in the cache.

    Args:
        compressor: of fixed size.
        worker: as for `compressed`.
        like: of the form of what is compressed; its values do not matter.
        vectors: of which it is computed.
        fill: writes a piece of it into its first argument; the others are that piece of each vector.

    Raises:
        CompressionError: for NaN and infinity.
    """
    if not isinstance(like, Vector):
        return Message(compressor, message_like(compressor, like), ())
    generator = _generator(compressor, like, worker)
    buffers, payloads = [], []
    parts = zip(*(vector.buffers for vector in vectors if isinstance(vector, Vector)), strict=True)
    with _naming(worker):
        for buffer, own in zip(like.buffers, parts, strict=True):
            size = _piece_elements(compressor, buffer)
            scratch = torch.empty(min(size, buffer.numel()), dtype=buffer.dtype, device=buffer.device)
            if size >= buffer.numel():
                fill(scratch, *own)
                payload = compressor.compress(scratch, generator)
                message = payload.to_buffer()
                payload = compressor.from_buffer(message, payload.shape, payload.dtype, payload.seed)
            else:
                num_bytes = compressor.num_bits(buffer.numel(), buffer.dtype) // 8
                message = torch.empty(num_bytes, dtype=torch.uint8, device=buffer.device)
                payload = compressor.from_buffer(message, buffer.shape, buffer.dtype)
                pieces = list(zip(*(torch.split(each, size) for each in own), strict=True))
                places = compressor.split(payload, [piece[0].numel() for piece in pieces])
                for piece, place in zip(pieces, places, strict=True):
                    room = scratch[: piece[0].numel()]
                    fill(room, *piece)
                    made = compressor.compress(room, generator)
                    for target, tensor in zip(place.tensors, made.tensors, strict=True):
                        target.copy_(tensor)
            buffers.append(message)
            payloads.append(payload)
    return Message(compressor, Vector(buffers), tuple(payloads))


def _generator(
    compressor: AbstractCompressor, value: Vector, worker: Worker, alike: bool = False, seed: int | None = None
) -> torch.Generator | None:
    """Make the generator of a message, as `compressed` describes it; none where nothing is drawn."""
    if compressor.traits.randomness == "none" or not value.buffers:
        return None
    alike = alike or compressor.traits.randomness == "shared"
    if seed is None:
        seed = worker.step if alike else worker.rng.getrandbits(62)
    return torch.Generator(value.buffers[0].device).manual_seed(seed)


@contextmanager
def _naming(worker: Worker) -> Iterator[None]:
    """Say in errors of compression whose they are."""
    try:
        yield
    except CompressionError as error:
        raise CompressionError(f"Worker {worker.rank} in step {worker.step}: {error}") from error


def add_decoded_(
    vector: AbstractVector,
    compressor: AbstractCompressor,
    message: AbstractVector,
    alpha: float,
    seed: int | None = None,
) -> None:
    """Add ``alpha`` times what a message stands for; of a sparse one only what is in it is touched.

    Args:
        vector: like the one that the message was made of.
        compressor: that made it; of fixed size.
        message: what travelled.
        alpha: factor.
        seed: with which `compressed` made it, if its random numbers are shared.
    """
    if not (isinstance(vector, Vector) and isinstance(message, Vector)):
        return
    for buffer, payload in zip(vector.buffers, _payloads(compressor, message, vector, seed), strict=True):
        if isinstance(compressor, TopK):
            values, positions = values_and_positions(payload.tensors)
            buffer.index_add_(0, positions, values, alpha=alpha)
        else:
            buffer.add_(compressor.decompress(payload), alpha=alpha)


def decoded(
    like: AbstractVector, compressor: AbstractCompressor, message: AbstractVector, seed: int | None = None
) -> AbstractVector:
    """Return what a message stands for, in new memory.

    Args:
        like: a vector like the one that the message was made of.
        compressor: that made it; of fixed size.
        message: what travelled.
        seed: with which `compressed` made it, if its random numbers are shared.
    """
    if not (isinstance(like, Vector) and isinstance(message, Vector)):
        return like.clone()
    out = like.empty_like()
    for buffer, payload in zip(out.buffers, _payloads(compressor, message, out, seed), strict=True):
        compressor.decompress(payload, out=buffer)
    return out


def _payloads(compressor: AbstractCompressor, message: Vector, like: Vector, seed: int | None) -> list[Payload]:
    """Read a message of a vector like another one; what is drawn alike at both ends is drawn again."""
    drawn = [0] * len(like.buffers)
    if compressor.traits.randomness == "shared" and like.buffers:
        assert seed is not None, "who sends it has drawn of the same"
        generator = torch.Generator(like.buffers[0].device).manual_seed(seed)
        drawn = [compressor.shared_seed(generator) for _ in like.buffers]
    return [
        compressor.from_buffer(received, buffer.shape, buffer.dtype, each)
        for received, buffer, each in zip(message.buffers, like.buffers, drawn, strict=True)
    ]


def same_types(one: AbstractVector, other: AbstractVector) -> bool:
    """Tell whether two vectors have the same types: not if one is of half precision and one of float32."""
    if isinstance(one, Vector) and isinstance(other, Vector):
        return [buffer.dtype for buffer in one.buffers] == [buffer.dtype for buffer in other.buffers]
    return True


def elements(value: AbstractVector) -> list[int]:
    """Elements of each buffer."""
    if isinstance(value, Vector):
        return [buffer.numel() for buffer in value.buffers]
    assert isinstance(value, SizeOnlyVector)
    return [-(-value.num_bytes // value.element_bytes)]


def in_double(value: AbstractVector) -> AbstractVector:
    """Return the same values in float64, for sums over a whole training."""
    return Vector(buffer.double() for buffer in value.buffers) if isinstance(value, Vector) else value


def require_compressor(method: str, compressor: AbstractCompressor) -> None:
    """Refuse what is no compressor."""
    if not isinstance(compressor, AbstractCompressor):
        raise ConfigurationError(
            f"{method} got compressor={compressor!r}, needs a compressor of lightning_decentral.compression. Write "
            "Int8(), or TopK(ratio=0.01); a graph is given to the algorithm."
        )


def require_fixed_size(method: str, compressor: AbstractCompressor) -> None:
    """Refuse a compressor whose messages differ in size: receivers have their memory ready before a message comes."""
    if not compressor.traits.fixed_size:
        raise ConfigurationError(
            f"{method} got {compressor}, whose messages have no fixed size, needs to know how much it will receive. "
            "Use TopK(ratio=...) or another compressor of fixed size."
        )


def require_contraction(method: str, compressor: AbstractCompressor, value: AbstractVector) -> None:
    """Refuse a compressor whose error may be as large as what it compresses: what is left to send would grow."""
    bound = max((compressor.error_bound(count) for count in elements(value) if count), default=0.0)
    if not bound < 1.0:
        raise ConfigurationError(
            f"{method} got {compressor}, whose squared error may be {bound:g} times the vector's square, needs a "
            "contraction, below 1. Use Int8(), ScaledSign(), TopK(ratio=...), or smaller buckets."
        )


def require_share(method: str, name: str, value: float) -> None:
    """Refuse a number that is not in (0, 1]."""
    if not (isinstance(value, int | float) and 0.0 < value <= 1.0):
        raise ConfigurationError(f"{method} got {name}={value!r}, needs a number in (0, 1]. Use 1.0 for full steps.")


def refuse_sums(averager: str, adds_up: bool) -> None:
    """Refuse a method that adds up by what averages move values: these moves do not sum up to zero over the workers.

    Raises:
        ConfigurationError: if it does.
    """
    if adds_up:
        raise ConfigurationError(
            f"{averager} got a method that adds up the moves of its averages, as D2, EXTRA and gradient tracking do; "
            "it needs one that does not: what compression loses would add up. Use Choco() with this method."
        )


def require_unbiased(method: str, compressor: AbstractCompressor) -> None:
    """Refuse a compressor whose errors have a direction."""
    if not compressor.traits.unbiased:
        raise ConfigurationError(
            f"{method} got {compressor}, which is biased, needs an unbiased compressor: its errors stay in the models. "
            "Use Int8(stochastic=True) or QSGD(), or ChocoSGD, which takes any contraction."
        )


def require_replicas(method: str, graph: AbstractTopology) -> None:
    """Refuse a graph on which neighbours would miss some of the messages that they add up."""
    if graph.period != 1 or not graph.is_symmetric:
        kind = "directed" if graph.period == 1 else "changing with the step"
        raise TopologyError(
            f"{method} needs a symmetric graph that stays the same, got {graph!r}, {kind}: neighbours add up every "
            "message. Use Ring, or Moniqua, which remembers nothing."
        )
