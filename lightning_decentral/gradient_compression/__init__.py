"""The gradients of Lightning's own ``ddp``, exchanged in compressed form."""
