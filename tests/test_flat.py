"""Proved here: vectors compute what plain torch does, at every size (chunks included), in place and under aliasing,
with half precision rounded once; parameters of any shape, order in memory and dtype survive being laid out flat."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.flat import FlatParameters, Layout, LentVector, SizeOnlyVector, Vector, mean_over, pack, unpack

CHUNK = 1 << 20
SIZES = [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3]
CPU = torch.device("cpu")


def random_tensors(count: int, size: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(size)
    return [torch.randn(size, generator=generator).to(dtype) for _ in range(count)]


def vector(*tensors: Tensor) -> Vector:
    return Vector(tensor.clone() for tensor in tensors)


# One more operation between the two ways to compute it is one more float32 rounding of values around 4.
CLOSE = {"rtol": 0.0, "atol": 2e-6}


@pytest.mark.parametrize("size", SIZES)
def test_operations_equal_plain_torch(size: int) -> None:
    a, b, c = random_tensors(3, size)
    torch.testing.assert_close(vector(a).add_(vector(b), alpha=0.3).buffers[0], a + 0.3 * b, **CLOSE)
    torch.testing.assert_close(vector(a).mul_(-2.5).buffers[0], -2.5 * a, **CLOSE)
    torch.testing.assert_close(vector(a).copy_(vector(b)).buffers[0], b, **CLOSE)
    torch.testing.assert_close(
        vector(a).add_difference_(vector(b), vector(c), 0.5).buffers[0], a + 0.5 * (b - c), **CLOSE
    )
    mixed = vector(a).mix_(vector(b), 0.25, [(vector(c), 0.75)]).buffers[0]
    torch.testing.assert_close(mixed, 0.25 * b + 0.75 * c, **CLOSE)
    torch.testing.assert_close(mean_over([vector(a), vector(b), vector(c)]).buffers[0], (a + b + c) / 3, **CLOSE)
    # A float64 sum of float32 values: only the order of the additions differs.
    assert vector(a).squared_distance(vector(b)) == pytest.approx(float((a.double() - b).square().sum()), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 5, CHUNK + 1])
def test_approaching_leaves_the_difference_in_the_other_vector(size: int, dtype: torch.dtype) -> None:
    a, b = random_tensors(2, size, dtype)
    mine, theirs = vector(a), vector(b)
    assert mine.approach_(theirs) is mine
    assert torch.equal(theirs.buffers[0], b - a)
    assert torch.equal(mine.buffers[0], (a.double() + (b - a).double() / 2).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lent_values_stay_and_are_copied_only_where_they_are_asked_for(dtype: torch.dtype) -> None:
    a, b = random_tensors(2, CHUNK + 1, dtype)
    lender, plain = vector(b), vector(b)
    lent = LentVector(lender.empty_like().buffers, lender)
    expected, result = vector(a).approach_(plain), vector(a).approach_(lent)
    assert torch.equal(result.buffers[0], expected.buffers[0])
    assert torch.equal(lent.buffers[0], plain.buffers[0])  # the difference
    again = vector(a)
    assert torch.equal(again.approach_(lent).buffers[0], vector(a).approach_(plain).buffers[0])  # with what it is now
    changed = LentVector(lender.empty_like().buffers, lender).mul_(2.0)
    assert torch.equal(changed.buffers[0], 2 * b)
    assert torch.equal(LentVector(lender.empty_like().buffers, lender).clone().mul_(2.0).buffers[0], 2 * b)
    moved = LentVector(lender.empty_like().buffers, lender)
    moved.move()
    assert torch.equal(moved.mul_(3.0).buffers[0], 3 * b)
    assert torch.equal(lender.buffers[0], b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [0, 1, 5, CHUNK + 1])
def test_what_rounding_leaves_out_is_kept_and_added_the_next_time(size: int, dtype: torch.dtype) -> None:
    x, change = random_tensors(1, size, dtype)[0], random_tensors(1, size)[0].to(dtype) * 1e-2
    mine = vector(x)
    wide, rest = mine.zeros_like(), mine.remainder_like()
    wide.buffers[0].copy_(change).mul_(1 / 3)
    assert rest.buffers[0].dtype == torch.bfloat16
    for _ in range(10):
        assert mine.add_rest_(wide, rest) is mine
    # Alone, ten additions would be off by up to ten halves of a unit in the last place.
    unit = torch.finfo(dtype).eps * float(x.double().abs().max() + 1 if size else 1)
    exact = x.double() + 10 * wide.buffers[0].double()
    torch.testing.assert_close(mine.buffers[0].double(), exact, rtol=0.0, atol=unit)
    together = mine.buffers[0].double() + rest.buffers[0].double()
    if dtype == torch.float64:
        return  # nothing wider to compare with
    torch.testing.assert_close(together, exact, rtol=0.0, atol=unit / 20)  # bfloat16 keeps 1/500 of a rest


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [0, 1, 5, CHUNK + 1])
def test_two_that_pull_each_other_add_opposite_numbers(size: int, dtype: torch.dtype) -> None:
    a, b, c = random_tensors(3, size, dtype)
    one, other, third = vector(a), vector(b), vector(c)
    totals, rests = [one.zeros_like() for _ in range(2)], [one.remainder_like() for _ in range(2)]
    assert one.clone().pull_([(other, 0.3)], totals[0], rests[0]).buffers[0].dtype == dtype
    other.clone().pull_([(one, 0.3)], totals[1], rests[1])
    assert torch.equal(totals[0].buffers[0], -totals[1].buffers[0])
    result = one.clone().pull_([(other, 0.3), (third, 0.25)], one.zeros_like(), one.remainder_like()).buffers[0]
    expected = (0.45 * a.double() + 0.3 * b.double() + 0.25 * c.double()).to(dtype)
    torch.testing.assert_close(result, expected)
    alike = one.clone().pull_([(other, 0.3), (third, 0.3)], one.zeros_like(), one.remainder_like()).buffers[0]
    torch.testing.assert_close(alike, (0.4 * a.double() + 0.3 * b.double() + 0.3 * c.double()).to(dtype))
    assert torch.equal(one.clone().pull_([], totals[0], rests[0]).buffers[0] * 0, a * 0)


@pytest.mark.parametrize("own_at", ["own", "first", "last", "elsewhere"])
@pytest.mark.parametrize("size", [3, CHUNK + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixing_may_write_into_any_of_its_terms(own_at: str, size: int, dtype: torch.dtype) -> None:
    a, b, c = random_tensors(3, size, dtype)
    own, first, last = vector(a), vector(b), vector(c)
    target = {"own": own, "first": first, "last": last, "elsewhere": vector(torch.zeros_like(a))}[own_at]
    target.mix_(own, 1 / 2, [(first, 1 / 3), (last, 1 / 6)])
    expected = (a.double() / 2 + b.double() / 3 + c.double() / 6).to(dtype)
    torch.testing.assert_close(target.buffers[0], expected)
    for untouched, before in ((own, a), (first, b), (last, c)):
        assert untouched is target or torch.equal(untouched.buffers[0], before)


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.2, 0.8), (0.25, 0.5, 0.25), (0.5, -0.1, 0.6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_average_is_the_same_to_the_last_bit_wherever_it_is_written(
    weights: tuple[float, ...], dtype: torch.dtype
) -> None:
    """Into the value itself, into the first of the others, or into new memory."""
    own, *others = random_tensors(len(weights), CHUNK + 1, dtype)
    results = []
    for place in ("own", "first", "elsewhere"):
        value, rest = vector(own), [vector(other) for other in others]
        target = {"own": value, "first": rest[0], "elsewhere": vector(torch.zeros_like(own))}[place]
        target.mix_(value, weights[0], list(zip(rest, weights[1:], strict=True)))
        results.append(target.buffers[0])
    average = min(weights) >= 0.0  # with other weights the order of the additions differs
    for result in results:
        torch.testing.assert_close(result, results[0], **({"rtol": 0.0, "atol": 0.0} if average else {}))


def test_half_precision_is_mixed_in_float32_and_rounded_once() -> None:
    a, b, c = random_tensors(3, 10_000, torch.bfloat16)
    mixed = vector(a).mix_(vector(a), 1 / 3, [(vector(b), 1 / 3), (vector(c), 1 / 3)]).buffers[0]
    exact = (a.double() + b.double() + c.double()) / 3
    # Rounding twice (each product, then the sum) misses the nearest bfloat16 in a fifth of the cases; float32 in
    # between misses it only where the exact value lies within 2^-24 of the middle between two: well below 1 %.
    assert float((mixed != exact.bfloat16()).float().mean()) < 0.01


def test_half_precision_consensus_does_not_stall() -> None:
    values = [torch.full((4,), 1.0 + k / 128, dtype=torch.bfloat16) for k in range(2)]  # neighbours in bfloat16
    a, b = vector(values[0]), vector(values[1])
    assert torch.equal(a.approach_(b.clone()).buffers[0], vector(values[1]).approach_(vector(values[0])).buffers[0])


def test_zeros_like_is_wide_enough_for_a_sum() -> None:
    x = Vector([torch.ones(3, dtype=torch.bfloat16), torch.ones(2, dtype=torch.float64)])
    assert [buffer.dtype for buffer in x.zeros_like().buffers] == [torch.float32, torch.float64]
    assert [buffer.dtype for buffer in x.empty_like().buffers] == [torch.bfloat16, torch.float64]
    assert (x.num_bytes, x.numel) == (3 * 2 + 2 * 8, 5)


def test_a_vector_of_which_only_the_size_is_known_has_every_operation() -> None:
    x = SizeOnlyVector(100)
    results = [
        x.clone(), x.zeros_like(), x.copy_(x), x.add_(x), x.mul_(2.0), x.add_difference_(x, x, 1.0),
        x.approach_(x), x.remainder_like(), x.add_rest_(x, x), x.pull_([(x, 0.5)], x, x),
        x.mix_(x, 1.0, [(x, 0.5)]),
    ]  # fmt: skip
    assert all(result.num_bytes == 100 for result in results)


class Everything(nn.Module):
    """Parameters of every kind: tied, frozen, scalar, empty, channels-last, of two dtypes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.linear = nn.Linear(4, 5)
        self.tied = nn.Linear(4, 5)
        self.tied.weight = self.linear.weight
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.scalar = nn.Parameter(torch.tensor(2.0))
        self.empty = nn.Parameter(torch.zeros(0))
        self.wide = nn.Parameter(torch.randn(7, dtype=torch.float64))
        self.unused = nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.convolution(x).mean((2, 3))
        return (self.linear(hidden) + self.tied(hidden)).sum() * self.scalar + self.wide.sum()


def trainable(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def test_parameters_keep_values_shape_and_memory_order_as_views() -> None:
    module, untouched = Everything(), Everything()
    flat = FlatParameters(trainable(module))
    assert flat.x.numel == sum(parameter.numel() for parameter in trainable(untouched))
    assert [buffer.dtype for buffer in flat.x.buffers] == [torch.float32, torch.float64]
    for mine, theirs in zip(module.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.stride() == theirs.stride()
    assert module.convolution.weight.is_contiguous(memory_format=torch.channels_last)
    assert module.tied.weight is module.linear.weight
    flat.x.mul_(3.0)
    assert torch.equal(module.linear.weight, 3 * untouched.linear.weight)
    assert torch.equal(module.convolution.weight, 3 * untouched.convolution.weight)
    assert torch.equal(module.frozen.weight, untouched.frozen.weight)


def test_parameters_with_holes_or_overlaps_are_packed() -> None:
    holes = nn.Parameter(torch.arange(12.0).view(3, 4)[:, ::2])
    expanded = nn.Parameter(torch.tensor([5.0]).expand(3))
    transposed = nn.Parameter(torch.arange(6.0).view(2, 3).t())
    flat = FlatParameters([holes, expanded, transposed])
    assert holes.tolist() == [[0.0, 2.0], [4.0, 6.0], [8.0, 10.0]]
    assert expanded.tolist() == [5.0, 5.0, 5.0]
    assert transposed.tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    assert transposed.stride() == (1, 3)  # dense: its order is kept
    assert flat.x.numel == 15
    flat.x.mul_(2.0)
    assert expanded.tolist() == [10.0, 10.0, 10.0]


def test_data_of_another_shape_or_type_is_refused() -> None:
    for data in (torch.zeros(4), torch.zeros(3, dtype=torch.float64)):
        parameter = nn.Parameter(torch.zeros(3))
        flat = FlatParameters([parameter])
        parameter.data = data
        with pytest.raises(ConfigurationError, match="during training"):
            flat.collect()


def test_bind_moves_the_parameters_and_release_gives_them_their_own_memory() -> None:
    module = Everything()
    flat = FlatParameters(trainable(module))
    other = flat.x.clone().mul_(2.0)
    weight = module.linear.weight.clone()
    flat.bind(other)
    assert torch.equal(module.linear.weight, 2 * weight)
    flat.bind(flat.x)
    assert torch.equal(module.linear.weight, weight)
    flat.release()
    flat.x.mul_(0.0)
    assert torch.equal(module.linear.weight, weight)
    assert module.convolution.weight.is_contiguous(memory_format=torch.channels_last)
    assert module.linear.weight.untyped_storage().nbytes() == weight.numel() * 4


def test_a_swap_exchanges_values_without_copying_and_keeps_no_third_memory() -> None:
    module = Everything()
    flat = FlatParameters(trainable(module))
    weight = module.linear.weight.detach().clone()
    memory = weakref.ref(flat.x.buffers[0])
    addresses = set()
    for factor in (2.0, 4.0, 8.0):
        room = torch.zeros(2, sum(buffer.numel() for buffer in flat.x.buffers), dtype=torch.float64)  # views of it
        other = Vector(
            part.view(buffer.dtype)[: buffer.numel()] for part, buffer in zip(room, flat.x.buffers, strict=True)
        )
        other.copy_(flat.x).mul_(2.0)
        before = flat.x.clone()
        flat.swap(flat.x, other)
        assert torch.equal(module.linear.weight, factor * weight)
        assert torch.equal(other.buffers[0], before.buffers[0])
        addresses.add(module.linear.weight.data_ptr())
        with torch.no_grad():
            module.linear.weight.mul_(1.0)  # the parameter is that very memory
        assert module.linear.weight.untyped_storage().data_ptr() == room.untyped_storage().data_ptr()
    assert len(addresses) == 3
    del before, other
    gc.collect()
    assert memory() is None


def test_gradients_are_gathered_and_missing_ones_are_zero() -> None:
    module, untouched = Everything(), Everything()
    flat = FlatParameters(trainable(module))
    images = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    gradient = flat.x.clone().mul_(float("nan"))  # whatever was there before must not survive
    untouched(images).backward()
    for _ in range(2):  # the second time the gradients lie there already
        module.zero_grad()
        module(images).backward()
        flat.gather_gradient(gradient)
        for mine, theirs in zip(trainable(module), trainable(untouched), strict=True):
            expected = theirs.grad if theirs.grad is not None else torch.zeros_like(theirs)
            torch.testing.assert_close(mine.grad, expected)
    assert untouched.unused.grad is None
    assert module.unused.grad is not None
    gradient.mul_(0.0)
    assert float(module.linear.weight.grad.abs().sum()) == 0.0
    module(images).backward()  # accumulates in place, into the vector
    flat.gather_gradient(gradient)
    torch.testing.assert_close(module.linear.weight.grad, untouched.linear.weight.grad)


def test_gradients_are_gathered_as_they_are_computed() -> None:
    """Each lies in the vector before the next one is computed, and one that is under way is left alone."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
    twin, images = copy.deepcopy(module), torch.randn(2, 4)
    flat = FlatParameters(trainable(module))
    gradient = flat.x.zeros_like()
    places = [view.data_ptr() for view in flat.layout.views(gradient)]
    seen: list[bool] = []
    module[0].register_full_backward_hook(lambda *_: seen.append(module[2].weight.grad.data_ptr() == places[4]))
    flat.gather_early(gradient)
    for _ in range(2):  # the second backward pass accumulates there
        module(images).sum().backward()
        twin(images).sum().backward()
        assert [parameter.grad.data_ptr() for parameter in module.parameters()] == places
        for mine, theirs in zip(module.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=0.0, atol=0.0)
    assert seen == [True, True]
    before = gradient.clone()
    flat.gather_early(None)
    module.zero_grad()
    module(images).sum().backward()
    assert torch.equal(gradient.buffers[0], before.buffers[0])
    flat.gather_early(gradient)
    flat.release()
    module.zero_grad()
    module(images).sum().backward()
    assert places[0] != module[0].weight.grad.data_ptr()


def test_the_fingerprint_tells_layouts_apart() -> None:
    def fingerprint(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> str:
        return Layout([torch.zeros(shape, dtype=dtype) for shape in shapes]).fingerprint()

    assert fingerprint((2, 3), (4,)) == fingerprint((2, 3), (4,))
    others = {fingerprint((3, 2), (4,)), fingerprint((4,), (2, 3)), fingerprint((2, 3), (4,), dtype=torch.float64)}
    channels_last = Layout([torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last)]).fingerprint()
    assert len({*others, fingerprint((2, 3), (4,)), channels_last, fingerprint((2, 3, 4, 4))}) == 6


def test_pack_replaces_vectors_by_copies_and_unpack_brings_them_back() -> None:
    x = Vector([torch.tensor([1.0, 2.0]), torch.tensor([3.0], dtype=torch.float64)])
    state = {"x": x, "nested": {"y": x.clone(), "count": 3}, "text": "kept"}
    packed = pack(state)
    x.mul_(0.0)
    restored = unpack(packed, CPU)
    assert isinstance(restored, dict)
    assert [buffer.tolist() for buffer in restored["x"].buffers] == [[1.0, 2.0], [3.0]]
    assert restored["x"].buffers[1].dtype == torch.float64
    assert (restored["nested"]["count"], restored["text"]) == (3, "kept")
    x.load_state_dict(restored["nested"]["y"].state_dict())
    assert x.buffers[0].tolist() == [1.0, 2.0]


def test_a_vector_prints_its_sizes() -> None:
    assert repr(Vector([torch.zeros(3), torch.zeros(2).double()])) == "Vector(3 x torch.float32, 2 x torch.float64)"


def test_operations_on_vectors_of_other_structure_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        Vector([torch.zeros(3)]).add_(Vector([torch.zeros(3), torch.zeros(1)]))


def test_vectors_beside_each_other_are_views_of_them_and_sizes_add_up() -> None:
    one, other = Vector([torch.zeros(3), torch.zeros(2, dtype=torch.float64)]), Vector([torch.zeros(4)])
    both = one.beside(other, other)
    assert both.num_bytes == one.num_bytes + 2 * other.num_bytes
    both.buffers[3].fill_(2.0)
    assert other.buffers[0].tolist() == [2.0] * 4
    sizes = SizeOnlyVector(28).beside(SizeOnlyVector(16), SizeOnlyVector(16))
    assert sizes.num_bytes == both.num_bytes


def test_vectors_in_lists_and_tuples_are_packed_too() -> None:
    state = {"history": [Vector([torch.ones(2)]), (Vector([torch.zeros(1)]), 3)], "plain": [1, "two"]}
    packed = pack(state)
    assert isinstance(packed, dict)
    assert "Vector" not in repr(packed)
    again = unpack(packed, torch.device("cpu"))
    assert isinstance(again, dict)
    assert again["plain"] == [1, "two"]
    assert again["history"][0].buffers[0].tolist() == [1.0, 1.0]
    assert again["history"][1][0].buffers[0].tolist() == [0.0]
    assert again["history"][1][1] == 3
