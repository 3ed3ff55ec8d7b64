"""``fit``, ``validate``, ``test`` and ``predict`` of the command line: LightningCLI as the recipes need it."""

from __future__ import annotations

import json

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger

_PROGRAM = "lightning-decentral"
_USAGE = "-c BASE.yaml [-c MORE.yaml ...] [--OPTION VALUE ...]"


class _SaveConfig(SaveConfigCallback):
    """Saves the configuration next to the logs and, as that file does not reach W&B, in the run as well."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Called on rank 0 only: nothing here may communicate.
        loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
        if loggers:
            config = json.loads(self.parser.dump(self.config, format="json"))
            for logger in loggers:
                logger.log_hyperparams(config)


class DecentralCLI(LightningCLI):
    """LightningCLI as the recipes need it: any model, any data, the optimizer is the model's.

    The resolved configuration is saved as ``config.yaml`` in the log folder, over that of an earlier run there, and
    is logged to every `WandbLogger`. Lightning does not scale the learning rate with the number of workers; neither
    does this.

    Args:
        args: Arguments as on a command line; ``None``: ``sys.argv``, needed wherever Lightning launches processes.
        run: Run the subcommand; ``False``: parse and construct only, without subcommands.
    """

    def __init__(self, args: ArgsType = None, run: bool = True) -> None:
        super().__init__(
            LightningModule,
            LightningDataModule,
            save_config_callback=_SaveConfig,
            save_config_kwargs={"overwrite": True},
            # A short usage line: the generated one is 60 lines long and would hide the error below it.
            parser_kwargs={"prog": _PROGRAM}
            | {command: {"usage": f"{_PROGRAM} {command} {_USAGE}"} for command in LightningCLI.subcommands()},
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            args=args,
            run=run,
        )
