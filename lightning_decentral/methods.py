"""The methods, in one table: what is registered, planned, raced, tested and documented comes from here.

It needs the standard library only, so that names can be registered, and the command line can tell them, without torch.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from lightning_decentral.protocol import AbstractAlgorithm


@dataclass(frozen=True)
class Method:
    """A method of the package.

    Args:
        name: in ``Trainer(strategy=...)`` and on command lines; its module in `algorithms`, its page and its tests are
            called so, too.
        class_name: of its class in `algorithms`.
        title: what its paper calls it.
        sentence: what it does, in half a sentence that follows the title.
        paper: authors, venue, year and arXiv number of the paper that the class follows; empty: it has none.
        family: the heading under which lists and menus show it, with others of its kind.
        asynchronous: whether its workers wait for nobody, so that it needs the strategy for that.
        exact: whether the workers exchange in every step, by default, messages arrive as they were, and all gradients
            count. The planner counts what compression, local steps and dropped gradients save and not what they cost
            in further steps, so it plans the others only if they are asked for.
        graphs: whether the planner puts it on each of several graphs, to say which one suits a cluster. Others have the
            graph that is their default.
        suits: the data for which `planning.choosing` considers it: ``"alike"`` on all workers, ``"differ"``; a method
            whose fixed point depends on how the data are spread does not suit data that differ. Empty: it is not
            considered, but has to be asked for.
        adaptive: whether it suits data that differ with Adam, too: what the optimizer is given vanishes at the optimum.
    """

    name: str
    class_name: str
    title: str
    sentence: str
    paper: str = ""
    family: str = field(kw_only=True)
    asynchronous: bool = False
    exact: bool = True
    graphs: bool = False
    suits: tuple[str, ...] = ()
    adaptive: bool = False

    @property
    def description(self) -> str:
        """The title and the sentence."""
        return f"{self.title}: {self.sentence}"

    def load(self) -> type[AbstractAlgorithm]:
        """Import the class."""
        module = importlib.import_module(f"lightning_decentral.algorithms.{self.name}")
        return cast("type[AbstractAlgorithm]", getattr(module, self.class_name))


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "sync_sgd",
            "SyncSGD",
            "Synchronous SGD",
            "the mean of all gradients in each step, through the engine of this package; the baseline",
            family="Means of all gradients",
            suits=("alike", "differ"),
            adaptive=True,
        ),
        Method(
            "c_psgd",
            "CPSGD",
            "C-PSGD",
            "all gradients go through one worker: the centralized baseline of the D-PSGD paper",
            "Lian et al., NeurIPS 2017, arXiv:1705.09056",
            family="Means of all gradients",
        ),
        Method(
            "dpsgd",
            "DPSGD",
            "D-PSGD",
            "gossip with the neighbours while the gradient is computed",
            "Lian et al., NeurIPS 2017, arXiv:1705.09056",
            graphs=True,
            family="Gossip",
            suits=("alike",),
        ),
        Method(
            "d2",
            "D2",
            "D2",
            "gossip that is exact on data that differs between workers",
            "Tang et al., ICML 2018, arXiv:1803.07068",
            family="Gossip",
            suits=("differ",),
        ),
        Method(
            "extra",
            "Extra",
            "EXTRA",
            "exact on data that differs, like D2, with its messages hidden",
            "Shi, Ling, Wu, Yin, SIAM Journal on Optimization 2015, arXiv:1404.6264",
            family="Gossip",
            suits=("differ",),
        ),
        Method(
            "gradient_tracking",
            "GradientTracking",
            "Gradient tracking",
            "gossip of models and of the mean gradient; exact on data that differs, on any doubly stochastic graph",
            "Nedić, Olshevsky, Shi, SIAM Journal on Optimization 2017, arXiv:1607.03218",
            graphs=True,
            family="Gossip",
            suits=("differ",),
            adaptive=True,
        ),
        Method(
            "momentum_tracking",
            "MomentumTracking",
            "Momentum tracking",
            "gradient tracking of momenta; exact on data that differs",
            "Takezawa et al., TMLR 2023, arXiv:2209.15505",
            family="Gossip",
        ),
        Method(
            "qg_dsgdm",
            "QGDSGDm",
            "QG-DSGDm",
            "a momentum that follows where the averaged models go, for data that differs",
            "Lin et al., ICML 2021, arXiv:2102.04761",
            family="Gossip",
        ),
        Method(
            "decentlam",
            "DecentLaM",
            "DecentLaM",
            "a momentum that adds no error on data that differs, for large batches",
            "Yuan et al., ICCV 2021, arXiv:2104.11981",
            family="Gossip",
        ),
        Method(
            "sgp",
            "SGP",
            "SGP",
            "push-sum on any directed graph, a weight travels with each model; overlap-SGP too",
            "Assran et al., ICML 2019, arXiv:1811.10792",
            graphs=True,
            family="Gossip",
        ),
        Method(
            "relaysgd",
            "RelaySGD",
            "RelaySGD",
            "models relayed along a tree, each counted once; exact on data that differs",
            "Vogels et al., NeurIPS 2021, arXiv:2110.04175",
            family="Gossip",
        ),
        Method(
            "gossip_pga",
            "GossipPGA",
            "Gossip-PGA",
            "D-PSGD with an exact average after every few steps",
            "Chen et al., ICML 2021, arXiv:2105.09080",
            family="Gossip",
        ),
        Method(
            "hierarchical_gossip",
            "HierarchicalGossip",
            "Hierarchical gossip",
            "D-PSGD between hosts, and exact inside each, whose workers have one model",
            family="Gossip",
            suits=("alike",),
        ),
        Method(
            "choco_sgd",
            "ChocoSGD",
            "CHOCO-SGD",
            "D-PSGD with compressed differences, whose error vanishes as the workers agree",
            "Koloskova, Stich, Jaggi, ICML 2019, arXiv:1902.00340",
            exact=False,
            family="Compressed gossip",
        ),
        Method(
            "moniqua_sgd",
            "MoniquaSGD",
            "Moniqua",
            "D-PSGD with modulo-quantized messages, without memory between steps",
            "Lu, De Sa, ICML 2020, arXiv:2002.11787",
            exact=False,
            family="Compressed gossip",
        ),
        Method(
            "dcd_psgd",
            "DCDPSGD",
            "DCD-PSGD",
            "D-PSGD whose models move by the compressed differences that are sent",
            "Tang et al., NeurIPS 2018, arXiv:1803.06443",
            exact=False,
            family="Compressed gossip",
        ),
        Method(
            "ecd_psgd",
            "ECDPSGD",
            "ECD-PSGD",
            "D-PSGD with compressed extrapolations, from which neighbours estimate",
            "Tang et al., NeurIPS 2018, arXiv:1803.06443",
            exact=False,
            family="Compressed gossip",
        ),
        Method(
            "deepsqueeze",
            "DeepSqueeze",
            "DeepSqueeze",
            "D-PSGD with compressed models, whose errors are added to the next",
            "Tang et al., 2019, arXiv:1907.07346",
            exact=False,
            family="Compressed gossip",
        ),
        Method(
            "saef",
            "SAEF",
            "SAEF",
            "compressed updates with error feedback, gradients a step ahead of the error; DEF and EF too",
            "Xu, Huo, Huang, AAAI 2021, arXiv:2008.05823",
            exact=False,
            family="Means of all gradients",
        ),
        Method(
            "ef21",
            "EF21",
            "EF21",
            "compressed differences of gradients to what all workers know of them",
            "Richtarik, Sokolov, Fatkhullin, NeurIPS 2021, arXiv:2106.05203",
            exact=False,
            family="Means of all gradients",
        ),
        Method(
            "local_sgd",
            "LocalSGD",
            "Local SGD",
            "local steps, and the mean of all models after every few of them; post-local SGD too",
            "Stich, ICLR 2019, arXiv:1805.09767",
            exact=False,
            family="Local updates",
        ),
        Method(
            "slowmo",
            "SlowMo",
            "SlowMo",
            "local SGD whose means have a momentum of their own",
            "Wang et al., ICLR 2020, arXiv:1910.00643",
            exact=False,
            family="Local updates",
        ),
        Method(
            "bmuf",
            "BMUF",
            "BMUF",
            "local SGD with a momentum over blocks, in Nesterov's form",
            "Chen, Huo, ICASSP 2016",
            exact=False,
            family="Local updates",
        ),
        Method(
            "diloco",
            "DiLoCo",
            "DiLoCo",
            "hundreds of local steps, then an outer step with Nesterov's momentum",
            "Douillard et al., 2023, arXiv:2311.08105",
            exact=False,
            family="Local updates",
        ),
        Method(
            "streaming_diloco",
            "StreamingDiLoCo",
            "Streaming DiLoCo",
            "DiLoCo in fragments that are averaged beside the local steps",
            "Douillard et al., 2025, arXiv:2501.18512",
            exact=False,
            family="Local updates",
        ),
        Method(
            "eager_diloco",
            "EagerDiLoCo",
            "DiLoCo, eager",
            "DiLoCo whose differences are averaged beside the next round, the own one at once",
            "Kale, Douillard, Donchev, 2025, arXiv:2502.12996",
            exact=False,
            family="Local updates",
        ),
        Method(
            "sparseloco",
            "SparseLoCo",
            "SparseLoCo",
            "local steps, then the largest differences of each chunk in 2 bits, with error feedback",
            "Sarfi et al., 2025, arXiv:2508.15706",
            exact=False,
            family="Local updates",
        ),
        Method(
            "noloco",
            "NoLoCo",
            "NoLoCo",
            "DiLoCo in pairs instead of all together, another partner in every round",
            "Kolehmainen et al., 2025, arXiv:2506.10911",
            exact=False,
            family="Local updates",
        ),
        Method(
            "fedavg",
            "FedAvg",
            "FedAvg",
            "clients train on their own data, and their mean is the next model",
            "McMahan et al., AISTATS 2017, arXiv:1602.05629",
            exact=False,
            family="Federated",
        ),
        Method(
            "fedmom",
            "FedMom",
            "FedMom",
            "FedAvg with Nesterov's momentum on the server",
            "Huo, Yang, Gu, Carin, Huang, 2020, arXiv:2002.02090",
            exact=False,
            family="Federated",
        ),
        Method(
            "fedavgm",
            "FedAvgM",
            "FedAvgM",
            "FedAvg with heavy-ball momentum on the server",
            "Hsu, Qi, Brown, 2019, arXiv:1909.06335",
            exact=False,
            family="Federated",
        ),
        Method(
            "fedadam",
            "FedAdam",
            "FedAdam",
            "FedAvg with Adam on the server",
            "Reddi et al., ICLR 2021, arXiv:2003.00295",
            exact=False,
            family="Federated",
        ),
        Method(
            "fedyogi",
            "FedYogi",
            "FedYogi",
            "FedAvg with Yogi on the server",
            "Reddi et al., ICLR 2021, arXiv:2003.00295",
            exact=False,
            family="Federated",
        ),
        Method(
            "fedadagrad",
            "FedAdagrad",
            "FedAdagrad",
            "FedAvg with Adagrad on the server",
            "Reddi et al., ICLR 2021, arXiv:2003.00295",
            exact=False,
            family="Federated",
        ),
        Method(
            "fedprox",
            "FedProx",
            "FedProx",
            "FedAvg whose clients are held near the common model",
            "Li et al., MLSys 2020, arXiv:1812.06127",
            exact=False,
            family="Federated",
        ),
        Method(
            "scaffold",
            "SCAFFOLD",
            "SCAFFOLD",
            "FedAvg whose clients correct their gradients, so that local steps have no bias",
            "Karimireddy et al., ICML 2020, arXiv:1910.06378",
            exact=False,
            family="Federated",
        ),
        Method(
            "fednova",
            "FedNova",
            "FedNova",
            "FedAvg in which unequal numbers of local steps do not count",
            "Wang et al., NeurIPS 2020, arXiv:2007.07481",
            exact=False,
            family="Federated",
        ),
        Method(
            "cocod_sgd",
            "CoCoDSGD",
            "CoCoD-SGD",
            "local SGD whose average is computed beside the next round",
            "Shen et al., IJCAI 2019, arXiv:1906.12043",
            exact=False,
            family="Local updates",
        ),
        Method(
            "overlap_local_sgd",
            "OverlapLocalSGD",
            "Overlap-Local-SGD",
            "local steps, and a pull towards an anchor that is averaged beside them",
            "Wang, Liang, Joshi, ICASSP 2020, arXiv:2002.09539",
            exact=False,
            family="Local updates",
        ),
        Method(
            "easgd",
            "EASGD",
            "EASGD",
            "workers tied to a centre by springs, synchronously; EAMSGD too",
            "Zhang, Choromanska, LeCun, NeurIPS 2015, arXiv:1412.6651",
            exact=False,
            family="Local updates",
        ),
        Method(
            "sparta",
            "SPARTA",
            "SPARTA",
            "a small random share of the parameters becomes the mean after each step",
            exact=False,
            family="Local updates",
        ),
        Method(
            "adpsgd",
            "ADPSGD",
            "AD-PSGD",
            "asynchronous pairwise averaging, nobody waits for a slow worker",
            "Lian et al., ICML 2018, arXiv:1710.06952",
            asynchronous=True,
            family="Asynchronous",
            suits=("alike",),
        ),
        Method(
            "acid",
            "ACiD",
            "A2CiD2",
            "AD-PSGD with a momentum between models, so that sparse graphs average faster",
            "Nabli et al., NeurIPS 2023, arXiv:2306.08289",
            asynchronous=True,
            family="Asynchronous",
        ),
        Method(
            "swarm",
            "Swarm",
            "SwarmSGD",
            "local steps, then the average with one random neighbour in 8 bits; nobody waits",
            "Nadiradze et al., NeurIPS 2021, arXiv:1910.12308",
            asynchronous=True,
            exact=False,
            family="Asynchronous",
        ),
        Method(
            "apsgd",
            "APSGD",
            "A-PSGD",
            "a server applies the gradients of all workers as they come",
            "Lian et al., NeurIPS 2015, arXiv:1506.08272",
            asynchronous=True,
            family="Servers",
        ),
        Method(
            "staleness_aware",
            "StalenessAware",
            "Staleness-aware SGD",
            "A-PSGD that divides the learning rate of each gradient by its staleness",
            "Zhang et al., IJCAI 2016, arXiv:1511.05950",
            asynchronous=True,
            exact=False,
            family="Servers",
        ),
        Method(
            "backup_workers",
            "BackupWorkers",
            "Backup workers",
            "synchronous SGD with the first gradients of each step, without waiting for the last",
            "Chen et al., 2016, arXiv:1604.00981",
            asynchronous=True,
            exact=False,
            family="Servers",
        ),
        Method(
            "delay_adaptive",
            "DelayAdaptive",
            "Delay-adaptive SGD",
            "A-PSGD with a smaller learning rate for gradients that are staler than usual",
            "Mishchenko et al., NeurIPS 2022, arXiv:2206.07638; Koloskova et al., NeurIPS 2022, arXiv:2206.08307",
            asynchronous=True,
            exact=False,
            family="Servers",
        ),
        Method(
            "stale_synchronous",
            "StaleSynchronous",
            "Stale-synchronous SGD",
            "A-PSGD in which nobody gets more than a bound ahead of the slowest worker",
            "Ho et al., NeurIPS 2013",
            asynchronous=True,
            family="Servers",
        ),
        Method(
            "ringmaster",
            "Ringmaster",
            "Ringmaster ASGD",
            "A-PSGD that drops gradients which are too stale",
            "Maranjyan, Tyurin, Richtarik, ICML 2025, arXiv:2501.16168",
            asynchronous=True,
            exact=False,
            family="Servers",
        ),
        Method(
            "ringleader",
            "Ringleader",
            "Ringleader ASGD",
            "asynchronous SGD in which fast workers do not count more",
            "Maranjyan, Richtarik, ICLR 2026, arXiv:2509.22860",
            asynchronous=True,
            family="Servers",
        ),
        Method(
            "rennala",
            "Rennala",
            "Rennala SGD",
            "all compute gradients at one model, until there are enough of them",
            "Tyurin, Richtarik, NeurIPS 2023, arXiv:2305.12387",
            asynchronous=True,
            exact=False,
            family="Servers",
        ),
        Method(
            "malenia",
            "Malenia",
            "Malenia SGD",
            "Rennala SGD in which each worker's data counts the same",
            "Tyurin, Richtarik, NeurIPS 2023, arXiv:2305.12387",
            asynchronous=True,
            exact=False,
            family="Servers",
        ),
        Method(
            "fedbuff",
            "FedBuff",
            "FedBuff",
            "local steps at each worker's own speed; a server adds several workers' at a time",
            "Nguyen et al., AISTATS 2022, arXiv:2106.06639",
            asynchronous=True,
            exact=False,
            family="Servers",
        ),
        Method(
            "delayed_nesterov",
            "DelayedNesterov",
            "Delayed Nesterov",
            "asynchronous DiLoCo: an outer momentum that waits for several workers, local steps by speed",
            "Liu et al., 2024, arXiv:2401.09135",
            asynchronous=True,
            exact=False,
            family="Servers",
        ),
        Method(
            "async_easgd",
            "AsyncEASGD",
            "Asynchronous EASGD",
            "workers tied by springs to a centre on a server, which they pull at their own times",
            "Zhang et al., NeurIPS 2015, arXiv:1412.6651",
            asynchronous=True,
            exact=False,
            family="Servers",
        ),
        Method(
            "hogwild",
            "Hogwild",
            "Hogwild",
            "the processes of one machine train one model in shared memory, without a lock",
            "Niu et al., NeurIPS 2011, arXiv:1106.5730; Lian et al., NeurIPS 2015, arXiv:1506.08272",
            asynchronous=True,
            exact=False,
            family="Servers",
        ),
        Method(
            "cocoa",
            "CoCoA",
            "CoCoA",
            "linear models: the mean of what workers change in their own dual variables",
            "Jaggi et al., NeurIPS 2014, arXiv:1409.1458",
            family="Dual coordinates",
            exact=False,
        ),
        Method(
            "cocoa_plus",
            "CoCoAPlus",
            "CoCoA+",
            "linear models: what workers change in their own dual variables is added",
            "Ma et al., ICML 2015, arXiv:1502.03508",
            family="Dual coordinates",
            exact=False,
        ),
        Method(
            "acpd",
            "ACPD",
            "ACPD",
            "linear models: dual variables, groups of the first workers, and only large changes travel",
            "Huo, Huang, 2019, arXiv:1910.04235",
            family="Dual coordinates",
            asynchronous=True,
            exact=False,
        ),
    )
}
"""By name, in the order of the documentation."""


def families() -> dict[str, list[Method]]:
    """List the methods of each family, both in the order of the table."""
    return {
        family: [method for method in METHODS.values() if method.family == family]
        for family in dict.fromkeys(method.family for method in METHODS.values())
    }


@dataclass(frozen=True)
class Pipeline:
    """A schedule of a pipeline, in which one model is cut into stages.

    Args:
        name: in ``Trainer(strategy=...)``; its function in `lightning_decentral.pipeline.schedules` and its page in
            ``docs/pipelines`` are called so, too.
        title: what its paper calls it.
        sentence: what it does, in half a sentence that follows the title.
        paper: authors, venue, year and arXiv number.
    """

    name: str
    title: str
    sentence: str
    paper: str

    @property
    def description(self) -> str:
        """The title and the sentence."""
        return f"{self.title}: {self.sentence}"


PIPELINES: dict[str, Pipeline] = {
    pipeline.name: pipeline
    for pipeline in (
        Pipeline(
            "dsp",
            "DSP",
            "a pipeline whose stages wait for nobody; inputs are kept, and replayed at the weights of now",
            "Xu, Huo, Huang, CVPR 2020, arXiv:1909.02625",
        ),
        Pipeline(
            "ouroboros",
            "Ouroboros",
            "delayed gradients in a ring of workers, with an embedding that the first and last stage share",
            "Yang et al., NeurIPS 2019, arXiv:1909.06695",
        ),
        Pipeline(
            "ddg",
            "DDG",
            "a pipeline with delayed gradients at the weights of the forward pass, which are kept",
            "Huo, Gu, Yang, Huang, ICML 2018, arXiv:1804.10574",
        ),
        Pipeline(
            "features_replay",
            "Features Replay",
            "a pipeline with the delays of DDG that keeps inputs instead of graphs",
            "Huo, Gu, Huang, NeurIPS 2018, arXiv:1807.04511",
        ),
        Pipeline(
            "pipe_2bw",
            "PipeDream-2BW",
            "a pipeline of micro-batches with two versions of the weights, and a delay of one update everywhere",
            "Narayanan et al., ICML 2021, arXiv:2006.09503",
        ),
        Pipeline(
            "pipedream",
            "PipeDream",
            "a pipeline with one forward, one backward, and stashed weights",
            "Narayanan et al., SOSP 2019, arXiv:1806.03377",
        ),
        Pipeline(
            "gpipe",
            "GPipe",
            "a synchronous pipeline of micro-batches; exact, and the baseline",
            "Huang et al., NeurIPS 2019, arXiv:1811.06965",
        ),
        Pipeline(
            "one_f_one_b",
            "1F1B",
            "a synchronous pipeline that keeps fewer micro-batches than GPipe, in the same time",
            "Narayanan et al., SC 2021, arXiv:2104.04473",
        ),
    )
}
"""The schedules of pipelines, by name."""
