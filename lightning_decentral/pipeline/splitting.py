"""How a model is cut into stages: which call in the training step is cut, into which blocks, and where."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module, Parameter, Sequential
from torch.utils.flop_counter import FlopCounterMode

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.pipeline.random_numbers import own_random_numbers, seed_random_numbers

CONFIGURE = "configure_stages"
_FLOPS_PER_BYTE = 16.0  # of a device of today: what a block without products costs, by the bytes that it writes
_HOW = (
    "Give the LightningModule a method `configure_stages(self)` that returns the nn.Sequential which its training_step "
    "calls once; or, if that call is of another module, `(module, blocks)`: the module, and a list of modules that do, "
    "one after the other, what its forward does."
)


@dataclass(frozen=True)
class Chain:
    """A module that is called in the training step, and blocks that do the same one after the other.

    Attributes:
        module: whose call is cut.
        blocks: in their order.
        names: of the blocks, in the model.
    """

    module: Module
    blocks: tuple[Module, ...]
    names: tuple[str, ...]


class BlockCost(NamedTuple):
    """What a block costs.

    Attributes:
        seconds: of a forward and a backward pass.
        bytes: that it gives to the next block.
    """

    seconds: float
    bytes: int


def find_chain(model: Module) -> Chain:
    """Find what is to be cut.

    Args:
        model: a LightningModule, or any module. If it has a method ``configure_stages``, that says it: it returns an
            ``nn.Sequential``, or a pair of a module and the blocks that its forward consists of. Otherwise it is an
            ``nn.Sequential``: the module itself, or the one of its children that has most parameters to be trained.

    Raises:
        ConfigurationError: if nothing can be cut; it says what to write. If parameters to be trained are outside.
    """
    name = type(model).__name__
    configure = getattr(model, CONFIGURE, None)
    if configure is not None:
        found = configure()
        pair = isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], Module)
        module, blocks = (found[0], list(found[1])) if pair else (found, [found])
        if not isinstance(module, Module) or not all(isinstance(block, Module) for block in blocks):
            raise ConfigurationError(f"{name}.{CONFIGURE}() returned {found!r}, which cannot be cut. {_HOW}")
        if not pair and not isinstance(module, Sequential):
            raise ConfigurationError(
                f"{name}.{CONFIGURE}() returned {type(module).__name__}, and needs to return an nn.Sequential. {_HOW}"
            )
    else:
        trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
        candidates = [child for child in (model, *model.children()) if isinstance(child, Sequential)]
        if not candidates:
            raise ConfigurationError(
                f"A pipeline got {name}, which has no nn.Sequential of its own, and needs to know where the model can "
                f"be cut. {_HOW}"
            )
        module = max(candidates, key=lambda child: sum(p.numel() for p in trained.intersection(child.parameters())))
        blocks = [module]
    flat = tuple(itertools.chain.from_iterable(map(_flattened, blocks)))
    refuse_outside(model, flat)
    names = {id(module): name for name, module in model.named_modules()}
    return Chain(module, flat, tuple(names.get(id(block), type(block).__name__) for block in flat))


def refuse_outside(model: Module, inside: Sequence[Module]) -> None:
    """Refuse parameters to be trained that are in none of some modules, and so on no stage.

    Raises:
        ConfigurationError: with their names.
    """
    known = {parameter for module in inside for parameter in module.parameters()}
    outside = [name for name, value in model.named_parameters() if value.requires_grad and value not in known]
    if outside:
        raise ConfigurationError(
            f"A pipeline got {type(model).__name__} with the parameters {outside[:5]}"
            f"{' and more' * (len(outside) > 5)} to be trained, which belong to no block; each needs a stage that it "
            f"is on. Put what they are for into a block, or freeze them. {_HOW}"
        )


def _flattened(block: Module) -> list[Module]:
    """Take a chain apart into blocks, and chains in it; what has hooks or a forward of its own is a block."""
    plain = type(block) is Sequential and not (
        block._forward_hooks or block._forward_pre_hooks or block._backward_hooks or block._backward_pre_hooks
    )
    if not plain:
        return [block]
    return list(itertools.chain.from_iterable(map(_flattened, block.children())))


def record_call(module: Module, step: Callable[[], object]) -> object:
    """Find what a training step gives the module that is cut; nothing behind that call is done.

    Raises:
        ConfigurationError: if the step does not call it, or with more than one value.
    """

    class Found(BaseException):
        pass

    given: list[object] = []

    def forward(*arguments: object, **named: object) -> object:
        if len(arguments) != 1 or named:
            raise ConfigurationError(
                f"training_step called {type(module).__name__} with {len(arguments)} values and {sorted(named)}, "
                "and needs to call what is cut with one. Put several tensors into a tuple, and let the first block "
                "take them apart."
            )
        given.append(arguments[0])
        raise Found

    own = vars(module)
    before = own.get("forward")
    own["forward"] = forward
    try:
        step()
    except Found:
        pass
    finally:
        del own["forward"]
        if before is not None:
            own["forward"] = before
    if not given:
        raise ConfigurationError(
            f"training_step did not call {type(module).__name__}, which is to be cut into stages. {_HOW}"
        )
    return given[0]


def costs_of(chain: Chain, inputs: object) -> list[float]:
    """Tell what each block costs, in floating-point operations: counted, so that all workers find the same.

    A block that multiplies nothing is counted by the bytes that it writes.

    Args:
        chain: of blocks.
        inputs: of the first block.

    Raises:
        ConfigurationError: if a block does not give tensors, or the blocks give something else than the module.
    """
    costs: list[float] = []
    was_training = [(module, module.training) for block in chain.blocks for module in block.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in chain.module.buffers()]  # a traced block knows no `eval`
    device = batch_tensors(inputs)[0].device if batch_tensors(inputs) else torch.device("cpu")
    value = inputs
    try:
        for block in chain.blocks:
            block.eval()
        with torch.no_grad(), own_random_numbers(device):
            seed_random_numbers(device, 0)
            whole = chain.module(inputs)
            seed_random_numbers(device, 0)
            for name, block in zip(chain.names, chain.blocks, strict=True):
                with FlopCounterMode(display=False) as counter:
                    value = block(value)
                tensors = [value] if isinstance(value, Tensor) else list(value) if isinstance(value, tuple) else []
                if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors):
                    raise ConfigurationError(
                        f"Block {name!r} of the pipeline gives {type(value).__name__}, and needs to give a tensor or a "
                        "tuple of tensors: that is what can be sent. Let it return that."
                    )
                written = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
                costs.append(float(counter.get_total_flops()) + _FLOPS_PER_BYTE * written)
        if isinstance(whole, Tensor) and isinstance(value, Tensor) and not _same(whole, value):
            raise ConfigurationError(
                f"The blocks that {CONFIGURE}() gives do not do what {type(chain.module).__name__} does: the same "
                "input "
                "gave other outputs. They need to be all of its forward, in the same order. Compare the two on a batch."
            )
    finally:
        for module, training in was_training:
            module.training = training
        with torch.no_grad():
            for buffer, values in buffers:
                buffer.copy_(values)
    return costs


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one.float(), other.float(), rtol=1e-2, atol=1e-4, equal_nan=True)


def measured_costs(chain: Chain, inputs: object, repetitions: int = 3) -> list[BlockCost]:
    """Measure how long each block takes here, forward and backward, and count what it gives to the next one.

    Two workers do not measure the same: give the cuts that `balanced_cuts` finds from it to all of them. Buffers and
    random numbers are afterwards what they were.

    Args:
        chain: of blocks, in the mode in which they train.
        inputs: of the first block.
        repetitions: of which the shortest counts.
    """
    buffers = [(buffer, buffer.clone()) for buffer in chain.module.buffers()]
    device = next((p.device for p in chain.module.parameters()), torch.device("cpu"))
    found: list[BlockCost] = []
    value = inputs
    with own_random_numbers(device), torch.enable_grad():
        for block in chain.blocks:
            best = float("inf")
            for _ in range(repetitions):
                leaves = _as_leaves(value)
                _wait_for(device)
                began = time.perf_counter()
                output = block(leaves)
                roots = [tensor for tensor in batch_tensors(output) if tensor.requires_grad]
                wanted = [tensor for tensor in [*batch_tensors(leaves), *block.parameters()] if tensor.requires_grad]
                if roots and wanted:
                    torch.autograd.grad(roots, wanted, [torch.ones_like(root) for root in roots], allow_unused=True)
                _wait_for(device)
                best = min(best, time.perf_counter() - began)
            value = output
            found.append(BlockCost(best, sum(t.numel() * t.element_size() for t in batch_tensors(output))))
    with torch.no_grad():
        for buffer, values in buffers:
            buffer.copy_(values)
    return found


def _as_leaves(value: object) -> object:
    """Take the floating-point tensors of a value as leaves of a graph of their own."""
    if isinstance(value, Tensor):
        return value.detach().requires_grad_(value.is_floating_point())
    return tuple(map(_as_leaves, value)) if isinstance(value, tuple) else value


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def balanced_cuts(
    costs: Sequence[float], stages: int, sending: Sequence[float] | None = None, ring: bool = False
) -> tuple[int, ...]:
    """Tell where to cut blocks so that the dearest worker, or link, is as cheap as can be.

    Sending goes on beside computing, so the slower of the two counts.

    Args:
        costs: of each block.
        stages: K, at most as many as there are blocks.
        sending: what it costs to send what each block gives to the next one; nothing by default.
        ring: whether the first and the last stage are on one worker. Of cuts that are as good, those with the cheapest
            last stage are taken: its backward pass is in everybody's way.

    Returns:
        The number of the first block of each stage but the first, ascending.

    Raises:
        ConfigurationError: if there are more stages than blocks.

    Example:
        >>> balanced_cuts([1.0, 1.0, 1.0, 3.0], 2)
        (3,)
        >>> balanced_cuts([1.0, 1.0, 1.0, 3.0], 2, sending=[1.0, 1.0, 9.0, 0.0])
        (2,)
        >>> balanced_cuts([1.0, 1.0, 1.0, 1.0], 3, ring=True)
        (1, 3)
    """
    check_cuts(tuple(range(1, stages)), len(costs), stages)
    sent = [0.0] * len(costs) if sending is None else list(sending)
    if not ring or stages < 3:
        return _cheapest(costs, sent, stages)[1]
    found: tuple[float, tuple[int, ...]] | None = None
    for begin in range(len(costs) - 1, stages - 2, -1):  # of the last stage
        beside = sum(costs[begin:])
        if found is not None and beside >= found[0]:
            break
        dearest, cuts = _cheapest(costs[:begin], sent, stages - 1, beside)
        if found is None or max(dearest, sent[begin - 1]) < found[0]:
            found = max(dearest, sent[begin - 1]), (*cuts, begin)
    assert found is not None
    return found[1]


def _cheapest(
    costs: Sequence[float], sent: Sequence[float], stages: int, beside: float = 0.0
) -> tuple[float, tuple[int, ...]]:
    """Compute the dearest stage's cost, with the best cuts, and these; the first one has so much to do beside."""
    total = list(itertools.accumulate(costs, initial=0.0))
    best = {(1, end): (total[end] + beside, 0) for end in range(1, len(costs) + 1)}  # and where the last one begins
    for count in range(2, stages + 1):
        for end in range(count, len(costs) + 1):
            best[count, end] = min(
                (max(best[count - 1, cut][0], sent[cut - 1], total[end] - total[cut]), cut)
                for cut in range(count - 1, end)
            )
    cuts: list[int] = []
    end = len(costs)
    for count in range(stages, 1, -1):
        end = best[count, end][1]
        cuts.append(end)
    return best[stages, len(costs)][0], tuple(reversed(cuts))


def check_cuts(cuts: Sequence[int], blocks: int, stages: int) -> None:
    """Refuse cuts that leave a stage without a block.

    Raises:
        ConfigurationError: if they do.
    """
    if stages > blocks:
        raise ConfigurationError(
            f"A pipeline got {stages} stages and {blocks} blocks, and needs a block for each stage. Use fewer stages "
            f"(devices={blocks}), or cut the model into smaller blocks. {_HOW}"
        )
    places = [0, *cuts, blocks]
    if len(cuts) != stages - 1 or any(after <= before for before, after in itertools.pairwise(places)):
        raise ConfigurationError(
            f"A pipeline got cuts={tuple(cuts)} for {stages} stages and {blocks} blocks; it needs {stages - 1} "
            f"ascending numbers between 1 and {blocks - 1}: the first block of each stage but the first."
        )


def stages_of(chain: Chain, cuts: Sequence[int]) -> list[tuple[Module, ...]]:
    """List the blocks of each stage."""
    places = [0, *cuts, len(chain.blocks)]
    return [chain.blocks[begin:end] for begin, end in itertools.pairwise(places)]


def tied(stages: Sequence[Sequence[Module]]) -> dict[Parameter, list[int]]:
    """Find the parameters that several stages have, and which stages these are."""
    users: dict[Parameter, list[int]] = {}
    for index, blocks in enumerate(stages):
        for parameter in dict.fromkeys(p for block in blocks for p in block.parameters()):
            users.setdefault(parameter, []).append(index)
    return {parameter: at for parameter, at in users.items() if len(at) > 1}


# -- micro-batches ----------------------------------------------------------------------------------------------------


def rows_of(batch: Any, parts: int) -> int:
    """Count the rows of a batch.

    Raises:
        ConfigurationError: if it has none, its tensors have different numbers, or there are fewer than micro-batches.
    """
    found = {tensor.shape[0] if tensor.ndim else 0 for tensor in batch_tensors(batch)}
    if len(found) != 1 or min(found) < parts:
        raise ConfigurationError(
            f"A batch with tensors of {sorted(found)} rows cannot be divided into {parts} micro-batches: all its "
            "tensors "
            f"need the same number of rows, at least {parts}. Use larger batches, drop_last=True if it is the last "
            "one, or fewer micro-batches (parts=)."
        )
    return found.pop()


def part_of(batch: Any, rows: int, parts: int, part: int) -> Any:
    """Take out a micro-batch; the first ones are larger by a row where the rows cannot be divided evenly."""
    size, more = divmod(rows, parts)
    begin = part * size + min(part, more)
    return _sliced(batch, slice(begin, begin + size + (part < more)))


def _sliced(value: Any, rows: slice) -> Any:
    if isinstance(value, Tensor):
        return value[rows]
    if isinstance(value, dict):
        return type(value)((key, _sliced(item, rows)) for key, item in value.items())
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_sliced(item, rows) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(_sliced(item, rows) for item in value)
    return value


def batch_tensors(value: Any) -> list[Tensor]:
    """List all tensors of a batch, in its order."""
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in items for tensor in batch_tensors(item)]
