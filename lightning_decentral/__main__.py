"""``python -m lightning_decentral``: the command line, see `lightning_decentral.cli`."""

import sys

from lightning_decentral.cli import main

if __name__ == "__main__":
    sys.exit(main())
