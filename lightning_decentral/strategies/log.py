"""The log of workers that come and go: each line has its time and its host, which Lightning's handler leaves out."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import MutableMapping
from typing import Any


class Stamped(logging.LoggerAdapter[logging.Logger]):
    """Writes the time of day and the host before each message, so that the logs of several machines can be merged."""

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """Return the message with its stamp."""
        stamp = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {socket.gethostname()}"
        return f"{stamp.replace('%', '%%')} {msg}", kwargs


log = Stamped(logging.getLogger("lightning.pytorch.decentral"), {})
"""What workers of `OpenStrategy` say, whatever their rank; a child of Lightning's own logger."""
