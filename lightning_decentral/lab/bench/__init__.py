"""A race of this package against what people would otherwise use: ``lightning-decentral bench``.

Every contender trains the same model on the same batches with the same optimizer for the same number of steps, one
process per emulated host (`lightning_decentral.lab.bench.worker`); what a process measured is a `Record` on disk.
"""
