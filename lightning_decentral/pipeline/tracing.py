"""Cuts a module that names no blocks: torch's tracer for pipelines writes down what it computes, and where one value
alone is alive the graph is cut."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import Module

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.pipeline.splitting import CONFIGURE, Chain, part_of, record_call, refuse_outside, rows_of

_NAMED = (
    f"Or name the blocks, without traced=True: let the LightningModule have a method {CONFIGURE}() that returns the "
    "module and the blocks that its forward consists of."
)


class _SameShape(Module):
    """Refuses what a traced graph was not made for: sizes of its operations are those of the first batch."""

    def __init__(self, inputs: Tensor) -> None:
        super().__init__()
        self._shape, self._type = inputs.shape, inputs.dtype

    def forward(self, x: Tensor) -> Tensor:
        if x.shape != self._shape or x.dtype != self._type:
            raise ConfigurationError(
                f"A pipeline was traced with a batch of {self._type} of shape {tuple(self._shape)}, and got one of "
                f"{x.dtype} of shape {tuple(x.shape)}; it needs all to be alike. Use drop_last=True, and a batch_size "
                f"that micro-batches divide. {_NAMED}"
            )
        return x


def module_to_trace(model: Module) -> Module:
    """Find the module whose call is traced: the model's only child with parameters to be trained, or the model itself.

    Args:
        model: a LightningModule, or any module. What its ``configure_stages()`` gives comes first.
    """
    configure = getattr(model, CONFIGURE, None)
    if configure is not None:
        found = configure()
        module = found[0] if isinstance(found, tuple) else found
        if isinstance(module, Module):
            return module
    trained = [child for child in model.children() if any(p.requires_grad for p in child.parameters())]
    own = [p for p in model.parameters(recurse=False) if p.requires_grad]
    return trained[0] if len(trained) == 1 and not own else model


def traced_call(model: Module, step: Callable[[Any], object], batch: Any, parts: int) -> tuple[Chain, object]:
    """Trace the module that a training step calls.

    Args:
        model: in which it is; see `module_to_trace`.
        step: the training step.
        batch: the first one.
        parts: micro-batches that each is divided into.

    Returns:
        Its blocks, and what it is called with for a micro-batch.

    Raises:
        ConfigurationError: as `traced_chain`, and if parameters to be trained are not in the module.
    """
    module = module_to_trace(model)
    refuse_outside(model, [module])
    part = batch if parts == 1 else part_of(batch, rows_of(batch, parts), parts, 0)
    inputs = record_call(module, lambda: step(part))
    return traced_chain(module, inputs), inputs


def traced_chain(module: Module, inputs: object) -> Chain:
    """Cut a module into as many blocks as can be.

    Args:
        module: is called with one tensor, and gives one. It is in the mode in which it trains: that is what is written
            down.
        inputs: of a batch, or of a micro-batch. All others need its shape.

    Returns:
        Blocks with the module's own parameters and buffers.

    Raises:
        ConfigurationError: if it cannot be traced; it says what to write.
    """
    name = type(module).__name__
    if not isinstance(inputs, Tensor):
        raise ConfigurationError(
            f"A pipeline cannot trace {name}, which is called with {type(inputs).__name__}, and needs to be called "
            f"with one tensor. {_NAMED}"
        )
    if torch.is_autocast_enabled(inputs.device.type):
        raise ConfigurationError(
            f"A pipeline cannot trace {name} in mixed precision, as its casts would be written down, too. Use "
            f'precision="32-true" or "bf16-true". {_NAMED}'
        )
    from torch.distributed.pipelining import pipeline  # takes a second: only who traces has it

    before = {key: buffer.clone() for key, buffer in module.named_buffers()}
    try:
        pipe = pipeline(module, (inputs,), split_policy=_split)
        blocks = [child for key, child in pipe.split_gm.named_children() if key.startswith("submod_")]
    except Exception as error:
        cause = error.__cause__ or error
        told = next((line.strip() for line in str(cause).splitlines() if line.strip()), "")
        raise ConfigurationError(
            f"A pipeline cannot trace {name}: {type(cause).__name__}: {told[:200]} It needs operations that do not "
            f"depend on the values of a batch. {_NAMED}"
        ) from error
    finally:
        with torch.no_grad():
            for key, buffer in module.named_buffers():
                buffer.copy_(before[key])
    for block in blocks:
        _give_own(block, module)
    return Chain(module, (_SameShape(inputs), *blocks), ("input", *(f"traced {i}" for i in range(len(blocks)))))


def _split(graph: fx.GraphModule) -> fx.GraphModule:
    """Put a split behind each operation whose result is all that later ones need."""
    nodes = [node for node in graph.graph.nodes if node.op not in ("get_attr", "output")]
    place = {node: index for index, node in enumerate(nodes)}
    last_use = [max((place.get(user, len(nodes)) for user in node.users), default=-1) for node in nodes]
    for index, node in enumerate(nodes[:-1]):
        alive = [other for other in range(index + 1) if last_use[other] > index]
        if node.op != "placeholder" and alive == [index] and isinstance(node.meta.get("val"), Tensor):
            with graph.graph.inserting_after(node):
                graph.graph.call_function(torch.ops.pippy._pipe_split.default)
    graph.recompile()
    return graph


def _give_own(block: Module, module: Module) -> None:
    """Let a traced block use the parameters and buffers of the module that it was traced from, and no copies."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    buffers = dict(module.named_buffers(remove_duplicate=False))
    for name, _ in [*block.named_parameters(remove_duplicate=False), *block.named_buffers(remove_duplicate=False)]:
        original = re.sub(r"@\d+", "", name)  # of a module that is called again
        holder, _, key = name.rpartition(".")
        if original in parameters:
            setattr(block.get_submodule(holder), key, parameters[original])
        elif original in buffers:
            setattr(block.get_submodule(holder), key, buffers[original])
        else:
            raise ConfigurationError(
                f"A pipeline cannot trace {type(module).__name__}: a tensor {name!r} of the graph is none of its "
                f"parameters or buffers. Register it with register_buffer. {_NAMED}"
            )
