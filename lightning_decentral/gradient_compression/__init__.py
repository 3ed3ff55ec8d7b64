"""The compressed exchange of the gradients of `DistributedDataParallel`.

Read in this order: `aggregation/` has the five ways in which messages become their mean, each a coroutine that reads
from top to bottom; `step` what they work on; `requests` what they may ask for; `hook` who runs them beside the backward
pass; `sizes` who runs them on sizes alone, to count their bytes.
"""
