"""What the papers measured, on what: one or two sentences for each, of what was seen of the paper itself.

Most are from abstracts. What was read elsewhere says so. A model, data, machines or a figure that were not seen are
left out.
"""

from __future__ import annotations

_UNSEEN = "the models, data and figures of its experiments were not seen"

DPSGD = (
    "With CNTK and Torch, on several networks and up to 112 GPUs, it was up to ten times as fast as a well-optimized "
    "centralized implementation where bandwidth was low or latency high (abstract)"
)
ADPSGD = (
    "ResNet-50 on ImageNet, up to 128 GPUs of a cluster whose network others use too: as good as an all-reduce after "
    "as many epochs, each up to 4 to 8 times as fast as with synchronous methods (abstract)"
)
SWARM = (
    "Image classification and translation on a supercomputer: less time to the end than earlier decentralized methods "
    "and, for some tasks, as good as carefully tuned SGD of large batches (abstracts)"
)
D2 = (
    "Image classification, where each worker has some labels only: much better than D-PSGD (abstract); LeNet on "
    "CIFAR-10, and 16 classes of ImageNet, as others quote the paper"
)
TRACKING = (
    f"It proves that errors fall geometrically for strongly convex functions, also on graphs that change; {_UNSEEN}"
)
FEDMOM = f"Simulated clients, deep networks: faster than earlier methods (abstract); {_UNSEEN} otherwise"
APSGD = (
    "It proves that the speed-up is linear as long as there are at most as many workers as the root of the number of "
    "updates (abstract). Networks were trained on a cluster and on one multicore machine, as others summarize the "
    "paper; the figures were not seen"
)
STALENESS_AWARE = "CIFAR-10 and ImageNet: better than synchronous and than plain asynchronous SGD (abstract)"
BACKUP_WORKERS = f"It was faster, and more accurate in tests, than both synchronous and asynchronous SGD; {_UNSEEN}"
MONIQUA = (
    "ResNet-20 and ResNet-110 on CIFAR-10 with 1 bit for each parameter: as accurate. Sooner than other methods of few "
    "bits (abstract)"
)
SAEF = (
    "Fewer epochs than with full precision and than with local error feedback, and no loss (abstract); "
    f"{_UNSEEN} otherwise"
)
QUANTIZATION = "Several convolutional networks on CIFAR and ImageNet: better than other quantizers (abstract)"
ACPD = (
    f"Large problems on simulated and on real machines: much faster than other methods (abstract); {_UNSEEN} otherwise"
)
DSP = (
    "Deep networks for images: a significant speed-up, and less hurt by slow devices than other methods (abstract); "
    "the figures were not seen"
)
OUROBOROS = (
    "Transformer and Transformer-XL: much faster than data parallelism, as accurate or more so (abstract); enwik8, "
    "text8 and WikiText-103 on one machine with 4 GPUs (V100), as others quote the paper"
)
FULL_NORM = (
    "With batches of one sample BatchNorm fails to learn three samples (the paper's first figure, as it describes it); "
    "of its experiments with Full Normalization no figures were seen"
)
RSGD = (
    "Image classification, language models and networks on graphs: faster than SGD at the beginning, as good or better "
    "at the end (abstract)"
)
CLARS = (
    "ResNet, DenseNet and MobileNet on ImageNet: far better than a gradual warm-up, and sooner than the best optimizer "
    "for large batches (abstract)"
)
ZEROTH_ORDER = (
    "It proves an error that falls with the number of steps, where that of ZO-ProxSGD falls with its root, and saw it "
    f"fall faster (abstract); {_UNSEEN} otherwise"
)
