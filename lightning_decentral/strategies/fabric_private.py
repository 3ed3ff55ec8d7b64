"""Every private name of Lightning's Fabric that our strategy for it reads or derives from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from typing import Any

from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.fabric.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.fabric.strategies.strategy import _BackwardSyncControl
from torch.nn import Module


class NoBackwardSync(_BackwardSyncControl):
    """For ``fabric.no_backward_sync``: no backward pass exchanges anything, so there is nothing to leave out."""

    def no_backward_sync(self, module: Module, enabled: bool) -> AbstractContextManager[None]:
        """Do nothing."""
        return nullcontext()


class LeavingLauncher(_MultiProcessingLauncher):
    """Starts processes that end the run when their function has returned or raised.

    They do not come to what a script calls at its end.

    Args:
        strategy: of the run.
        start_method: how processes are started.
        around: the run of one of them.
    """

    def __init__(
        self, strategy: DDPStrategy, start_method: Any, around: Callable[[], AbstractContextManager[None]]
    ) -> None:
        super().__init__(strategy, start_method)
        self._around = around

    def launch(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a function in processes of its own."""
        return super().launch(partial(_run, self._around, function), *args, **kwargs)


def _run(
    around: Callable[[], AbstractContextManager[None]], function: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    with around():
        return function(*args, **kwargs)


def timeout_of(strategy: DDPStrategy) -> timedelta | None:
    """Tell how long what all workers do together may take."""
    return strategy._timeout


class AbstractFabricStrategy(DDPStrategy):
    """Fabric's strategy, whose private steps lead to public ones: ours overrides only these."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._backward_sync_control = NoBackwardSync()

    def know_ranks(self) -> None:
        """Go on when this process knows its rank and the number of workers."""

    def know_others(self) -> None:
        """Go on when the workers have met."""

    @contextmanager
    def leaving(self) -> Iterator[None]:
        """Surround what a process that Fabric started runs."""
        yield

    def converted(self, state: dict[str, Any], filter: dict[str, Any]) -> dict[str, Any]:
        """Return what a checkpoint has of a dictionary of modules, optimizers and values."""
        return self._convert_stateful_objects_in_state(state, filter=filter)

    def _set_world_ranks(self) -> None:
        super()._set_world_ranks()
        self.know_ranks()

    def _configure_launcher(self) -> None:
        super()._configure_launcher()
        if self._start_method != "popen":
            self._launcher = LeavingLauncher(self, self._start_method, self.leaving)

    def _setup_distributed(self) -> None:
        super()._setup_distributed()
        self.know_others()
