"""One stage: its blocks, and what it keeps of each batch between the forward and the backward pass.

Which of three things is kept follows from the schedule. Where no update comes between, it is the graph of an ordinary
forward pass. Where the gradient is to be that of the weights of now, it is the input, and the forward pass is made
again: with the same random numbers, and without a second update of running statistics. Where it is to be that of
earlier weights, it is a graph on a copy of these: autograd refuses a graph whose weights have been changed in place.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import Module, Parameter, Sequential

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.pipeline.random_numbers import seed_random_numbers
from lightning_decentral.pipeline.schedules import Schedule, Work

Value = Tensor | tuple[Tensor, ...]
"""What goes from one stage to the next: a tensor, or several."""


def tensors_of(value: Value) -> tuple[Tensor, ...]:
    """List the tensors of what goes between stages."""
    return (value,) if isinstance(value, Tensor) else tuple(value)


def check_value(value: object, stage: int) -> Value:
    """Refuse what cannot be sent to the next stage.

    Raises:
        ConfigurationError: if it is neither a tensor nor a tuple of tensors.
    """
    if isinstance(value, Tensor) or (isinstance(value, tuple) and value and all(isinstance(v, Tensor) for v in value)):
        return value
    raise ConfigurationError(
        f"Stage {stage} of the pipeline gave {type(value).__name__} to the next one, and needs to give a tensor or a "
        "tuple of tensors. Let the block before the cut return that, or cut elsewhere (cuts=)."
    )


@dataclass
class _Kept:
    """Of one micro-batch."""

    version: int
    inputs: object  # of the stage; leaves of the graph, if there is one
    roots: list[Tensor] = field(default_factory=list)  # of the graph
    parameters: dict[str, Tensor] = field(default_factory=dict)  # in the graph
    alone: bool = False  # whether nothing else has these
    sees_error: list[bool] = field(default_factory=list)  # of each output: whether its error is of use


class Kept(NamedTuple):
    """What a stage has kept at the same time, at most.

    Attributes:
        inputs: of micro-batches, without a graph.
        graphs: of micro-batches.
        versions: copies of its weights, beside the weights themselves.
    """

    inputs: int
    graphs: int
    versions: int


class BackwardPass(NamedTuple):
    """The backward pass of a micro-batch through a stage, about to be made.

    Attributes:
        stage: which makes it.
        work: which micro-batch.
        roots: where the graph begins, from behind.
        seeds: the errors of the roots; ``None`` of a loss.
        wanted: whose gradients are computed: the inputs, then the parameters.
        inputs: of the stage, those of floating point.
        names: of the parameters in the stage.
        version: of the weights that forwarded it.
    """

    stage: Stage
    work: Work
    roots: list[Tensor]
    seeds: list[Tensor | None]
    wanted: list[Tensor]
    inputs: list[Tensor]
    names: list[str]
    version: int


def differentiate(passes: Sequence[BackwardPass]) -> list[tuple[Tensor | None, ...]]:
    """Make backward passes of several stages at once, of graphs that have nothing in common; return what they wanted.

    Autograd is called once: of small stages that call is most of the time.
    """
    roots = [root for each in passes for root in each.roots]
    wanted = [value for each in passes for value in each.wanted]
    if len(passes) > 1 and len(set(map(id, wanted))) < len(wanted):  # tied weights: whose gradient is whose?
        return [found for each in passes for found in differentiate([each])]
    found: tuple[Tensor | None, ...] = (None,) * len(wanted)
    if roots and wanted:
        seeds = [seed for each in passes for seed in each.seeds]
        found = torch.autograd.grad(roots, wanted, seeds, allow_unused=True)
    ends = [0, *itertools.accumulate(len(each.wanted) for each in passes)]
    return [found[begin:end] for begin, end in itertools.pairwise(ends)]


class Stage:
    """Some blocks of a model, and what is under way in them.

    A pass seeds torch's random numbers, and leaves them so: whoever runs it has `own_random_numbers` around.

    Args:
        index: of the stage, from 0.
        blocks: in their order.
        schedule: says what is kept.
        seed: of the run, for random numbers.

    Attributes:
        device: of its parameters; of a stage without any, the processor.
        updates: made so far.
        staleness: updates between the forward pass and the update of the batch that was complete last.
        most_inputs, most_graphs, most_versions: kept at the same time: inputs without a graph, graphs, copies of
            weights.
    """

    def __init__(self, index: int, blocks: Sequence[Module], schedule: Schedule, seed: int) -> None:
        self.index = index
        self.module = Sequential(*blocks)
        self._only = blocks[0] if len(blocks) == 1 else self.module  # a call of a chain of one costs as much again
        self.updates = 0
        self.staleness = 0
        self.most_inputs = self.most_graphs = self.most_versions = 0
        self._schedule = schedule
        self._seed = seed
        self._parameters = dict(self.module.named_parameters())  # a walk through all modules, made once
        self.device = next((value.device for value in self._parameters.values()), torch.device("cpu"))
        self._has_buffers = next(self.module.buffers(), None) is not None
        self._replays, self._stashes = schedule.replays(index), schedule.stashes(index)
        self._kept: dict[tuple[int, int], _Kept] = {}
        self._versions: dict[int, dict[str, Tensor]] = {}  # copies of weights, by the update that they are of
        self._gradients: dict[int, dict[Parameter, Tensor]] = {}  # of batches that are not complete yet
        self._seen: dict[int, int] = {}  # by the same batches: the update whose weights they were forwarded with

    @property
    def under_way(self) -> int:
        """How many micro-batches have been forwarded and not backwarded."""
        return len(self._kept)

    def trainable(self) -> dict[str, Parameter]:
        """Find the parameters that get a gradient now, by their names in the stage."""
        return {name: value for name, value in self._parameters.items() if value.requires_grad}

    def forward(
        self, work: Work, inputs: object, count: int, first: bool, predicted: dict[str, Tensor] | None = None
    ) -> object:
        """Make the forward pass of a micro-batch.

        Args:
            work: which one it is.
            inputs: of the first stage, whatever the model was given; of another one, what the stage before gave.
            count: of batches since training began, for random numbers.
            first: whether it is the first stage: then nobody waits for an error of the inputs.
            predicted: weights, by their names in the stage, in the place of its own; kept with the graph, if there is
                one.

        Returns:
            The output. Of a stage that keeps a graph it is in it.
        """
        version = self._schedule.version(work.batch, self.updates)
        kept = _Kept(version, inputs if first else _leaves(inputs))
        seed_random_numbers(self._device(inputs), self._seed, count, work.part, self.index)
        if self._replays:
            with torch.no_grad():
                output = self._call(predicted or {}, kept.inputs)
        else:
            if predicted:
                kept.parameters, kept.alone = {name: value.requires_grad_() for name, value in predicted.items()}, True
            else:
                kept.parameters = dict(self._version(version) if self._stashes else self.trainable())
            output = self._call(kept.parameters if self._stashes else {}, kept.inputs)
        if isinstance(output, Tensor | tuple) and not self._replays:
            self._set_roots(kept, tensors_of(output))
        self._kept[work.batch, work.part] = kept
        if kept.alone:
            copies = len(self._versions) + sum(each.alone for each in self._kept.values())
            self.most_versions = max(self.most_versions, copies)
        if self._replays:
            self.most_inputs = max(self.most_inputs, len(self._kept))
        else:
            self.most_graphs = max(self.most_graphs, len(self._kept))
        return output

    def end_in(self, work: Work, loss: Tensor, share: float) -> None:
        """Let the graph of a micro-batch end in its loss, and not in the output of the stage.

        Args:
            work: which micro-batch.
            loss: of it.
            share: of the batch that it is.
        """
        self._kept[work.batch, work.part].roots = [loss * share if share != 1.0 else loss]

    def begin_backward(self, work: Work, errors: Sequence[Tensor] | None, count: int) -> BackwardPass:
        """Prepare the backward pass of a micro-batch: with its graph, which is made now if inputs are kept.

        Args:
            work: which one it is.
            errors: of the outputs, from the stage behind; none where the graph ends in a loss.
            count: of batches since training began, as it was in the forward pass.
        """
        kept = self._kept.pop((work.batch, work.part))
        if self._replays:
            self._replay(kept, work, count)
        inputs = _differentiable(kept.inputs)
        seeds: list[Tensor | None] = [None] * len(kept.roots)
        if errors is not None:
            seeds = [error for error, seen in zip(errors, kept.sees_error, strict=True) if seen]
        wanted = [*inputs, *kept.parameters.values()]
        return BackwardPass(self, work, kept.roots, seeds, wanted, inputs, list(kept.parameters), kept.version)

    def end_backward(self, done: BackwardPass, found: Sequence[Tensor | None]) -> list[Tensor]:
        """Keep the gradient of a micro-batch until the batch is complete.

        Args:
            done: the pass.
            found: the gradients of what it wanted.

        Returns:
            The errors of the inputs, for the stage before: one for each that is of floating point.
        """
        own, batch = self._parameters, done.work.batch
        gradients = self._gradients.setdefault(batch, {})
        for name, gradient in zip(done.names, found[len(done.inputs) :], strict=True):
            if gradient is not None:
                before = gradients.get(own[name])
                gradients[own[name]] = gradient if before is None else before + gradient
        self._seen[batch] = done.version
        self._forget_versions()
        return [
            torch.zeros_like(value) if gradient is None else gradient
            for value, gradient in zip(done.inputs, found[: len(done.inputs)], strict=True)
        ]

    def take_gradients(self, batch: int) -> dict[Parameter, Tensor]:
        """Hand over the gradients of a batch that is complete; the update with them is counted."""
        gradients = self._gradients.pop(batch)
        self.staleness = self.updates - self._seen.pop(batch)
        if self._schedule.weights == "previous":  # the weights of now are the previous ones soon
            self._version(self.updates)
        self.updates += 1
        self._forget_versions()
        return gradients

    def in_flight(self) -> dict[str, Any]:
        """Return what is under way, to be saved: copies of tensors, and plain values. Graphs are made again from it.

        Raises:
            ConfigurationError: if the first stage is given something else than tensors and plain values.
        """
        names = {parameter: name for name, parameter in self._parameters.items()}
        kept = [
            {
                "work": list(work),
                "version": each.version,
                "inputs": saved(each.inputs),
                "predicted": saved(each.parameters) if each.alone else None,
            }
            for work, each in self._kept.items()
        ]
        gradients = {
            batch: {names[parameter]: saved(value) for parameter, value in found.items()}
            for batch, found in self._gradients.items()
        }
        return {
            "updates": self.updates,
            "staleness": self.staleness,
            "kept": kept,
            "versions": saved(self._versions),
            "gradients": gradients,
            "seen": dict(self._seen),
        }

    def put_in_flight(self, state: Mapping[str, Any], before: int) -> None:
        """Go on with what was under way. Graphs are made again, at the weights and with the random numbers of then.

        Args:
            state: what `in_flight` gave, on this device.
            before: batches that were brought to their end before the first one of `state`, for random numbers.
        """
        self.updates, self.staleness, self._seen = state["updates"], state["staleness"], dict(state["seen"])
        self._versions = {
            version: {name: value.requires_grad_() for name, value in values.items()}
            for version, values in state["versions"].items()
        }
        self._gradients = {
            batch: {self._parameters[name]: value for name, value in found.items()}
            for batch, found in state["gradients"].items()
        }
        for each in state["kept"]:
            batch, part = each["work"]
            kept = _Kept(each["version"], each["inputs"] if self.index == 0 else _leaves(each["inputs"]))
            self._kept[batch, part] = kept
            if self._replays:
                continue
            if each["predicted"] is not None:
                kept.parameters = {name: value.requires_grad_() for name, value in each["predicted"].items()}
                kept.alone = True
            else:
                kept.parameters = dict(self._versions[kept.version] if self._stashes else self.trainable())
            self._make_graph(kept, kept.parameters, Work(False, batch, part), before + batch)

    def begin_anew(self) -> None:
        """Begin with the first batch again, once nothing is under way; a callback may have renamed parameters."""
        assert not self._kept
        self._parameters = dict(self.module.named_parameters())
        self.updates = 0
        self._versions.clear()

    def abandon(self) -> None:
        """Forget everything that is under way."""
        self._kept.clear()
        self._gradients.clear()
        self._seen.clear()
        self.begin_anew()

    def _replay(self, kept: _Kept, work: Work, count: int) -> None:
        """Make the graph of a micro-batch at the weights of now."""
        kept.parameters = dict(self.trainable())
        self._make_graph(kept, {}, work, count)

    def _make_graph(self, kept: _Kept, instead: dict[str, Tensor], work: Work, count: int) -> None:
        """Make the forward pass of a micro-batch again; what the pass does to buffers is thrown away."""
        buffers = {name: value.clone() for name, value in self.module.named_buffers()} if self._has_buffers else {}
        device = self._device(kept.inputs)
        if torch.is_autocast_enabled(device.type):
            torch.clear_autocast_cache()  # of casts that were made without a graph
        seed_random_numbers(device, self._seed, count, work.part, self.index)
        with torch.enable_grad():
            output = self._call({**instead, **buffers}, kept.inputs)
        self._set_roots(kept, tensors_of(check_value(output, self.index)))

    def _call(self, instead: dict[str, Tensor], inputs: object) -> object:
        """Call the blocks, with other tensors in the place of some of theirs."""
        return functional_call(self.module, instead, (inputs,)) if instead else self._only(inputs)

    def _set_roots(self, kept: _Kept, outputs: Sequence[Tensor]) -> None:
        outputs = [output for output in outputs if output.is_floating_point() or output.is_complex()]
        kept.sees_error = [output.requires_grad for output in outputs]
        kept.roots = [output for output in outputs if output.requires_grad]

    def _version(self, version: int) -> dict[str, Tensor]:
        """Copy the trainable weights after so many updates, as leaves of their own."""
        if version not in self._versions:
            assert version == self.updates
            self._versions[version] = {
                name: value.detach().clone().requires_grad_() for name, value in self.trainable().items()
            }
            self.most_versions = max(self.most_versions, len(self._versions))
        return self._versions[version]

    def _forget_versions(self) -> None:
        if not self._versions:
            return
        used = {kept.version for kept in self._kept.values()}
        oldest = self.updates - 1 if self._schedule.weights == "previous" else self.updates
        for version in [each for each in self._versions if each < oldest and each not in used]:
            del self._versions[version]

    def _device(self, inputs: object) -> torch.device:
        return inputs.device if not self._parameters and isinstance(inputs, Tensor) else self.device


def saved(value: Any) -> Any:
    """Copy tensors to the processor's memory, wherever they are in a value."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if type(value) is dict:
        return {key: saved(each) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(saved(each) for each in value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ConfigurationError(
        f"A pipeline has batches under way whose inputs have {type(value).__name__}, and can save tensors and plain "
        "values, in lists, tuples and dicts. Call what is cut with those, or use drains=True."
    )


def _leaves(inputs: object) -> object:
    """Take what a stage was given as leaves of its own graph."""
    if isinstance(inputs, Tensor):
        return inputs.detach().requires_grad_(inputs.is_floating_point() or inputs.is_complex())
    assert isinstance(inputs, tuple)
    return tuple(_leaves(value) for value in inputs)


def _differentiable(inputs: object) -> list[Tensor]:
    values = inputs if isinstance(inputs, tuple) else (inputs,)
    return [value for value in values if isinstance(value, Tensor) and value.requires_grad and value.is_leaf]
