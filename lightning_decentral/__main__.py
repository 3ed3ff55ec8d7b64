"""``python -m lightning_decentral``: the command line, see `lightning_decentral.commands.main`."""

import sys

from lightning_decentral.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
