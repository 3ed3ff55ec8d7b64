"""A W&B logger that never asks: offline without a login, online with one."""

from __future__ import annotations

import netrc
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from lightning.pytorch.loggers import WandbLogger

from lightning_decentral.errors import ConfigurationError, to_install


def wandb_login_exists() -> bool:
    """Tell whether W&B would find credentials without asking: an environment variable or an entry in the netrc file.

    Only their presence is looked at. Environment: ``WANDB_API_KEY``, ``WANDB_IDENTITY_TOKEN_FILE``, ``WANDB_BASE_URL``
    (whose host the netrc entry must name; ``api.wandb.ai`` without it), ``NETRC``.
    """
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    given = os.environ.get("NETRC")
    for path in [Path(given)] if given else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        try:
            if host in netrc.netrc(path.expanduser()).hosts:
                return True
        except (OSError, netrc.NetrcParseError):  # absent, unreadable or malformed: W&B cannot use it either
            continue
    return False


def _settings(quiet: bool) -> dict[str, Any]:
    if not quiet:
        return {}
    from wandb import Settings

    return {"settings": Settings(silent=True)}


class OfflineFirstWandbLogger(WandbLogger):
    """`WandbLogger` for runs on machines of any kind: a cluster without internet, a laptop that never logged in.

    An offline run is a folder ``wandb/offline-run-*`` in ``save_dir``; ``wandb sync FOLDER`` uploads it later. In a
    training with several processes rank 0 alone opens a run, as in every Lightning logger; the others log nothing.

    Args:
        name: Name of the run; null: W&B invents one.
        save_dir: Folder of the local files.
        project: Project the run belongs to.
        group: Runs to be shown together: by convention the task, such as ``images``.
        job_type: Kind of run within the group: by convention the method, such as ``dpsgd``.
        tags: Free labels, such as the topology and the number of workers.
        offline: ``true``: never connect; ``false``: connect, and let W&B ask for a login; null: ``WANDB_MODE`` if it is
            set, otherwise offline exactly if there is no login.
        id: Identifier of an earlier run to continue; null: a new run.
        log_model: Upload checkpoints: ``false``, ``true`` (at the end) or ``"all"``. Online only.
        quiet: Let W&B print nothing: no greeting and no summary at the end of the run.

    Raises:
        ConfigurationError: wandb is not installed, or checkpoints should be uploaded by an offline run.

    Example:
        In a YAML file::

            trainer:
              logger:
                class_path: lightning_decentral.loggers.OfflineFirstWandbLogger
                init_args: {group: images, job_type: dpsgd, tags: [ring, 4 workers]}
    """

    def __init__(
        self,
        name: str | None = None,
        save_dir: str = "runs",
        project: str = "lightning-decentral",
        group: str | None = None,
        job_type: str | None = None,
        tags: Sequence[str] = (),
        offline: bool | None = None,
        id: str | None = None,
        log_model: Literal["all"] | bool = False,
        quiet: bool = False,
    ) -> None:
        if offline is None:
            mode = os.environ.get("WANDB_MODE")
            offline = mode in ("offline", "dryrun") if mode else not wandb_login_exists()
        if offline and log_model:
            raise ConfigurationError(
                f"log_model={log_model!r} needs an online run, and this one is offline. Run `wandb login` first and "
                "leave offline unset, or set log_model=False."
            )
        folder = Path(save_dir).absolute()  # W&B's own process is in the folder in which this one first asked for it
        folder.mkdir(parents=True, exist_ok=True)  # W&B would silently use a temporary folder instead
        try:
            super().__init__(
                name=name,
                save_dir=str(folder),
                project=project,
                offline=offline,
                id=id,
                log_model=log_model,
                group=group,
                job_type=job_type,
                tags=list(tags),
                **_settings(quiet),
            )
        except ModuleNotFoundError as error:
            raise ConfigurationError(
                f"OfflineFirstWandbLogger needs the package wandb, which is not installed ({error}). "
                f"Install it ({to_install('wandb')}), or use another logger of Lightning."
            ) from error
