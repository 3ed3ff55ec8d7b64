"""Tensors of a model one by one, of whatever kind users put there: what they have, and giving them a value."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.parameter import is_lazy

from lightning_decentral.errors import ConfigurationError

_ROW = 1024
_FACTORS = (torch.arange(_ROW) * 2 + 1) * 0x9E3779B97F4A7C1  # odd, so that every bit counts
_UNIT = 1e-3  # how far the length of a direction may be from one
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


def has_values(tensor: Tensor) -> bool:
    """Tell whether a tensor is one of numbers in memory: not of a lazy module, sparse, quantized or of the meta
    device."""
    return (
        not is_lazy(tensor)
        and tensor.layout is torch.strided
        and tensor.device.type != "meta"
        and not tensor.is_quantized
        and not tensor.is_nested
    )


def give(tensor: Tensor, value: Tensor) -> None:
    """Give a tensor a value in place; one whose elements share memory gets memory of its own."""
    if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        if not torch.equal(tensor, value):
            tensor.data = value.to(tensor.device, copy=True)
    else:
        tensor.data.copy_(value)


def fingerprints(tensors: Iterable[Tensor]) -> list[int]:
    """Return a number for each tensor, equal for equal bits, and for others hardly ever. One pass over them."""
    sums = [_bit_sum(tensor) for tensor in tensors]
    return [int(each) for each in sums] if len({each.device for each in sums}) > 1 else _to_list(sums)


def _to_list(scalars: Sequence[Tensor]) -> list[int]:
    values: list[int] = torch.stack(list(scalars)).tolist() if scalars else []
    return values


def _bit_sum(tensor: Tensor) -> Tensor:
    value = tensor.detach()
    if value.is_complex():
        value = torch.view_as_real(value.resolve_conj())
    bits = value.resolve_neg().contiguous().reshape(-1)
    bits = bits.view(_BITS[bits.element_size()])
    factors = _FACTORS.to(bits.device)
    rows = bits.numel() // _ROW
    columns = bits[: rows * _ROW].view(rows, _ROW).sum(0, dtype=torch.int64)
    rest = bits[rows * _ROW :]
    return (columns * factors).sum() + 3 * (rest * factors[: rest.numel()]).sum()


def find_masks(tensors: Mapping[str, Tensor]) -> list[bool]:
    """Tell whether each tensor is a mask, of which no mean means anything.

    One has zeros and ones only: both of them, or a name that says so.
    """
    return [
        _is_binary(tensor.reshape(-1)[:_ROW]) and _is_binary(tensor) and ("mask" in name.lower() or _varies(tensor))
        for name, tensor in tensors.items()
    ]


def find_directions(tensors: Iterable[Tensor]) -> list[bool]:
    """Tell whether each tensor is a vector of length one, of which no mean is one: as the vectors of a spectral norm.

    Where workers' models differ, so do these vectors, in their sign too; their mean may be next to nothing.
    """
    return [
        tensor.dim() == 1
        and tensor.numel() > 1
        and tensor.is_floating_point()
        and abs(float(tensor.detach().float().norm()) - 1) < _UNIT
        for tensor in tensors
    ]


def _is_binary(tensor: Tensor) -> bool:
    if tensor.dtype == torch.bool:
        return True
    if tensor.numel() == 0 or tensor.is_complex():
        return False
    value = tensor.detach().float() if tensor.element_size() == 1 else tensor  # float8 has no comparison
    return bool(((value == 0) | (value == 1)).all())


def _varies(tensor: Tensor) -> bool:
    value = tensor.detach().float()
    return tensor.numel() > 1 and bool((value != value.reshape(-1)[0]).any())


def check_parameters(module: Module) -> None:
    """Refuse a model that cannot be laid out anew: every worker's parameters move to memory of ours.

    Raises:
        ConfigurationError: for parameters of lazy modules or of the meta device, and for two that share memory.
    """
    for name, parameter in module.named_parameters():
        if is_lazy(parameter) or parameter.device.type == "meta":
            kind = "a lazy module's, without a shape" if is_lazy(parameter) else "on the meta device, without values"
            raise ConfigurationError(
                f"Parameter {name} is {kind}, but all workers must start with the same values. Run a forward pass "
                "with a batch of the right shape, or give it values, before fit."
            )
    ranges = sorted(
        (str(parameter.device), parameter.data_ptr(), parameter.data_ptr() + parameter.nbytes, name)
        for name, parameter in module.named_parameters()
        if has_values(parameter) and parameter.numel() and parameter.is_contiguous()
    )
    for (device, _, end, first), (other, start, _, second) in itertools.pairwise(ranges):
        if device == other and start < end:
            raise ConfigurationError(
                f"Parameters {first} and {second} share memory, but are two parameters, which part when training "
                "begins. To tie them, make them one, as in decoder.weight = encoder.weight (without .data); or give "
                "each a copy of its own."
            )
