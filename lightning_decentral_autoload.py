"""Lets `Trainer(strategy="dpsgd")` work in a script that does not import `lightning_decentral`.

PyTorch (2.5 and later) calls `install` when it is imported, through the entry point group ``torch.backends``, which is
meant for device back ends; we borrow it because Lightning has no entry point for strategies. It imports neither
Lightning nor anything heavy, and never lets an error reach ``import torch``. ``LIGHTNING_DECENTRAL_AUTOLOAD=0`` turns
it off.
"""

import os


def install() -> None:
    """Register the strategy names as soon as Lightning is imported."""
    if os.environ.get("LIGHTNING_DECENTRAL_AUTOLOAD", "1") == "0":
        return
    try:
        import lightning_decentral  # noqa: F401  (importing it installs the hook)
    except Exception as error:  # an exception here would make `import torch` fail for everybody
        import warnings

        warnings.warn(f"lightning_decentral could not register its strategies: {error!r}", stacklevel=1)
