"""The tables of the pages that are computed and not written: `python docs/generate.py` rewrites them in place.

A table stands between two comments, ``<!-- generated: NAME -->`` and ``<!-- end of generated -->``; in YAML they begin
with ``#``. A figure in a sentence stands between ``<!-- figure: SUBJECT; ROW; COLUMN -->`` and ``<!-- end -->``: that
of the newest measurement in ``results/data``. With ``--check`` nothing is written: the exit status is 1 if a page
differs from what the code gives now, and the pages are named.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import measured
from measured import markdown
from pictures import MORE_GRAPHS, graph_of

from lightning_decentral.algorithms import ADPSGD, DPSGD, SGP
from lightning_decentral.commands.main import main as main_command
from lightning_decentral.compression import COMPRESSORS, AbstractCompressor, compressor
from lightning_decentral.errors import CompressionError
from lightning_decentral.gradient_compression.scheme import Way, scheme_of
from lightning_decentral.gradient_compression.sizes import bytes_sent
from lightning_decentral.methods import METHODS, PIPELINES, families
from lightning_decentral.moved import MOVED
from lightning_decentral.pipeline.clock import seconds_per_batch
from lightning_decentral.pipeline.schedules import SCHEDULES, gpipe
from lightning_decentral.planning.choosing import Data, Optimizer, choose
from lightning_decentral.planning.planner import Plan, called, compare_plans, plan, plan_ddp
from lightning_decentral.protocol import AbstractAsynchronousAlgorithm
from lightning_decentral.simulation.cluster import Cluster
from lightning_decentral.topology import TOPOLOGY_NAMES, from_name

DOCS = Path(__file__).parent
# One line each: the name, and options beside the defaults. What has no default stands for itself.
COMPRESSOR_VARIANTS: dict[str, list[dict[str, object]]] = {
    "cast": [{"dtype": "bfloat16"}, {"dtype": "float16"}],
    "int8": [{}, {"stochastic": True}, {"bucket": 2048}],
    "fp8": [{}, {"format": "e5m2"}],
    "qsgd": [{}, {"levels": 1}, {"levels": 127}],
    "terngrad": [{}, {"clip": None}],
    "nuqsgd": [{}, {"levels": 2}],
    "bingrad": [{}, {"variant": "b"}],
    "orq": [{"levels": 3}, {}, {"levels": 9}],
    "topk": [{"ratio": 0.001}, {}, {"ratio": 0.1}],
    "threshold": [{"threshold": 1.0}],
    "randomk": [{}, {"scaled": True}],
    "powersgd": [{"rank": 1}, {}],
    "lattice": [{"step": 0.01}, {"step": 0.01, "levels": 16}, {"step": 0.01, "levels": 2, "dither": True}],
    "countsketch": [{}, {"keep": 0.01}],
}
# Rows of a race that a page shows by themselves.
_ROWS: dict[str, tuple[str, ...]] = {
    "local": ("no communication", "torch DDP", "Local SGD", "D-PSGD, one peer"),
}
_ELEMENTS = 25_000_000
_BLOCK = re.compile(
    r"((?:<!--|#) generated: (?P<name>[\w -]+?)(?: -->)?\n).*?( *(?:<!--|#) end of generated)", re.DOTALL
)
_MODEL_BYTES = 100_000_000
_FIGURE = re.compile(r"(<!-- figure: ([^;>]+?); ([^;>]+?); ([^;>]+?) -->)[^<]*(<!-- end -->)")
# What the README shows of the races: the network, the page, the subject, and the rows with their names in the README.
_RACES: tuple[tuple[str, str, str, tuple[tuple[str, str], ...]], ...] = (
    (
        "8 hosts, 200 Mbit/s",
        "gossip",
        "gossip-200mbit",
        (
            ("AD-PSGD", "AD-PSGD"),
            ("D-PSGD, one peer", "D-PSGD"),
            ("Decent-DP, one-peer-exp", "Decent-DP"),
            ("no communication", "no communication"),
        ),
    ),
    (
        "8 hosts, 200 Mbit/s, compressed",
        "compressed-gradients",
        "compressed-200mbit",
        (
            ("Moniqua, one peer, 8 bits", "Moniqua"),
            ("Lightning DDP, int8", "DDP with int8"),
            ("no communication", "no communication"),
        ),
    ),
    (
        "8 hosts, 1 Gbit/s",
        "gossip",
        "gossip-1gbit",
        (("D-PSGD, one peer", "D-PSGD"), ("AD-PSGD", "AD-PSGD"), ("Decent-DP, one-peer-exp", "Decent-DP")),
    ),
    (
        "8 hosts, 50 ms apart",
        "far-apart",
        "far-apart",
        (("AD-PSGD", "AD-PSGD"), ("D-PSGD, one peer", "D-PSGD"), ("Decent-DP, ring", "Decent-DP on a ring")),
    ),
    (
        "two sites of 4, 50 Mbit/s between them",
        "sites",
        "two-sites",
        (
            ("AD-PSGD", "AD-PSGD"),
            ("D-PSGD, two sites", "D-PSGD on `Sites`"),
            ("Decent-DP, ring", "Decent-DP on a ring"),
        ),
    ),
    (
        "8 hosts, one 10 times slower",
        "stragglers",
        "one-slow-host",
        (("AD-PSGD", "AD-PSGD"), ("D-PSGD, one peer", "D-PSGD"), ("Decent-DP, one-peer-exp", "Decent-DP")),
    ),
    (
        "one machine, 4 processes on 2 cores",
        "one-machine",
        "loopback",
        (
            ("Local SGD", "Local SGD"),
            ("D-PSGD, one peer", "D-PSGD"),
            ("AD-PSGD", "AD-PSGD"),
            ("no communication", "no communication"),
        ),
    ),
)


def sends(method: str) -> str:
    """What one method sends, and how long its step is, for several numbers of workers."""
    rows = []
    for workers in (2, 4, 8, 16, 64):
        plans = []
        for share in (0.2, 1.0):  # of a gradient's seconds, to send the model once
            cluster = Cluster(compute_seconds=1.0, bandwidth_bytes_per_second=_MODEL_BYTES / share)
            algorithm = METHODS[method].load()()
            # Of equal workers that wait for each other, one period after the first is like all others.
            steps = 20 if isinstance(algorithm, AbstractAsynchronousAlgorithm) else 1
            plans.append(plan(algorithm, workers, _MODEL_BYTES, cluster, steps))
        fast, slow = plans
        rows.append(
            [
                str(workers),
                f"`{fast.topology}`" if fast.topology else "all",
                f"{fast.bytes_per_step / _MODEL_BYTES:.3g}",
                f"{fast.seconds_per_step:.2f}",
                f"{slow.seconds_per_step:.2f}",
                f"{fast.spectral_gap:.3f}",
                f"{fast.rounds_to_consensus:g}",
            ]
        )
    headings = ["workers", "topology by default", "models sent", "step, fast link", "step, slow link", "gap", "rounds"]
    note = (
        "By the planner, for equal workers. *Models sent*: by one worker in one step, on average. *Step*: its length "
        "in gradients, where sending the model once takes 0.2 (fast link) or 1 (slow link) of a gradient; 1.00 means "
        "that communication is hidden. *Gap* and *rounds*: see [topologies](../concepts/topologies.md)."
    )
    return f"{markdown(headings, rows)}\n{textwrap.fill(note, 120, break_on_hyphens=False)}\n"


def methods() -> str:
    """The registered names, a table for each family."""
    tables = []
    for family, members in families().items():
        rows = [[f"[`{method.name}`](methods/{method.name}.md)", method.description] for method in members]
        tables.append(f"### {family}\n\n" + markdown(["`Trainer(strategy=...)`", "what it is"], rows))
    return "\n".join(tables)


def readme() -> str:
    """The methods with their pages, a line for each family."""
    lines = []
    for family, members in families().items():
        links = ", ".join(f"[{method.title}](docs/methods/{method.name}.md)" for method in members)
        lines.append(f"* **{family}**: {links}.\n")
    return "".join(lines)


def speeds() -> str:
    """Steps per second in the newest races, to torch DDP in the same round; and a picture of the race to a loss."""
    rows = []
    for network, page, subject, methods in _RACES:
        cells = [f"{title} {measured.figure(subject, row, 'speed')}" for row, title in methods]
        rows.append([f"[{network}](docs/results/{page}.md)", ", ".join(cells)])
    picture = measured.picture("frontier", DOCS.parent / "README.md")
    return markdown(["network", "speed, DDP = 1"], rows) + "\n" + picture


def plan_command() -> str:
    """A command of the planner, and the table that it prints."""
    command = (
        "plan --parameters 25.6e6 --workers 16 --bandwidth 1gbit --compute 250ms --methods ddp dpsgd local_sgd adpsgd "
        "--topologies one_peer_exponential"
    )
    printed = io.StringIO()
    with redirect_stdout(printed):
        main_command(command.split())
    lines = [line.strip() for line in printed.getvalue().splitlines()]
    first = next(number for number, line in enumerate(lines) if line.startswith("method"))
    rows = [line for line in lines[first : lines.index("", first)] if not line.startswith("─")]
    return "\n".join(["```console", f"$ lightning-decentral {command}", *rows, "```", ""])


def reference() -> str:
    """What the reference page of the algorithms has."""
    entry = "::: lightning_decentral.algorithms.{}\n    options: {{members: []}}\n"
    return "\n".join(entry.format(method.class_name) for method in METHODS.values())


def moved() -> str:
    """The old paths of modules, and the new ones."""
    rows = []
    for old, new in MOVED.items():
        places = (new,) if isinstance(new, str) else new
        rows.append([f"`{old}`", ", ".join(f"`{place}`" for place in places)])
    return markdown(["before, in `lightning_decentral`", "now"], rows)


def nav() -> str:
    """The pages of the methods, by family, for the site's navigation."""
    lines = []
    for family, members in families().items():
        lines.append(f"      - {family}:")
        lines.extend(f"          - {method.title}: methods/{method.name}.md" for method in members)
    return "\n".join(lines)


def pipelines() -> str:
    """The schedules of pipelines, by name."""
    rows = [[f"[`{each.name}`]({each.name}.md)", each.description] for each in PIPELINES.values()]
    return markdown(["`Trainer(strategy=...)`", "what it is"], rows)


def pipeline_nav() -> str:
    """The pages of the schedules, for the site's navigation."""
    return "\n".join(f"      - {each.title}: pipelines/{each.name}.md" for each in PIPELINES.values())


def pipeline(name: str) -> str:
    """The picture of a schedule, and what it costs for several numbers of stages."""
    rows = []
    for stages in (2, 4, 8):
        schedule = SCHEDULES[name](stages)
        alone = seconds_per_batch(gpipe(1, 1), 3, float(stages), 2.0 * stages)
        forward = [stages * share for share in schedule.shares]
        slow = [*forward[:-1], 2 * forward[-1]]
        batches = 6 if schedule.flush else 36
        kept = [
            f"{lag + 1} {'inputs' if schedule.replays(stage) else 'graphs'}" for stage, lag in enumerate(schedule.lags)
        ]
        rows.append(
            [
                str(stages),
                str(schedule.workers),
                ", ".join(map(str, schedule.staleness)),
                f"{kept[0]} of {schedule.parts} in a batch" if schedule.parts > 1 else kept[0],
                *(
                    f"{alone / seconds_per_batch(schedule, batches, each, [2 * one for one in each], sending):.2f}"
                    for each, sending in ((forward, 0.0), (forward, 0.5), (slow, 0.0))
                ),
            ]
        )
    headings = [
        *("stages", "workers", "staleness by stage", "first stage keeps", "speed, free link", "speed, slow link"),
        "speed, last stage slow",
    ]
    note = (
        "By the schedule's clock, once the pipeline is full; one worker with the whole model has speed 1. Workers have "
        "equal shares of the model, and a backward pass takes twice a forward pass. *Slow link*: sending a batch's "
        "activations takes half of a forward pass of the model divided by the stages. *Last stage slow*: it takes "
        "twice as long as it would. In the picture numbers and colours are batches, light bars are forward passes and "
        "dark ones backward passes, replays included."
    )
    picture = f"![{name}, time against stages](../pictures/pipelines/{name}.svg)"
    return f"{picture}\n\n{markdown(headings, rows)}\n{textwrap.fill(note, 120, break_on_hyphens=False)}\n"


def topologies() -> str:
    """All topologies that have a name, for two numbers of workers."""
    rows = []
    for name in sorted(TOPOLOGY_NAMES):
        graph = from_name(name, 8)
        larger = from_name(name, 16)
        peers = [max(len(graph.out_neighbors(rank, step)) for rank in range(8)) for step in range(max(graph.period, 1))]
        rows.append(
            [
                f"`{name}`",
                str(max(peers)),
                "yes" if graph.is_symmetric else "no",
                {0: "at random", 1: "no"}.get(graph.period, f"every {graph.period} steps"),
                f"{graph.spectral_gap:.3f}, {larger.spectral_gap:.3f}",
                f"{graph.rounds_to_consensus():g}, {larger.rounds_to_consensus():g}",
                f"{round(graph.smallest_eigenvalue, 3) + 0.0:.3f}" if graph.is_symmetric else "-",  # no -0.000
            ]
        )
    headings = ["name", "messages", "symmetric", "changes", "gap, 8 and 16", "rounds, 8 and 16", "smallest eigenvalue"]
    note = (
        "*Messages*: sent per step, by the worker that sends most, of 8. *Rounds*: until 0.1 % of a disagreement is "
        "left, of 8 and of 16 workers. *Smallest eigenvalue*: for 8 workers."
    )
    return f"{markdown(headings, rows)}\n{textwrap.fill(note, 120, break_on_hyphens=False)}\n"


def topology(name: str) -> str:
    """The picture of one topology, and its figures for several numbers of workers."""
    calls, directed = name.startswith("bipartite"), name.startswith("directed")
    method, words = (ADPSGD, "AD-PSGD") if calls else (SGP, "SGP") if directed else (DPSGD, "D-PSGD")
    rows = []
    for workers in (8, 16) if name in MORE_GRAPHS else (8, 16, 64):
        graph = graph_of(name, workers)
        steps = range(graph.period or 20)
        degree = max(len(graph.out_neighbors(rank, step)) for rank in range(workers) for step in steps)
        plans = plan(method(graph), workers, _MODEL_BYTES, Cluster(bandwidth_bytes_per_second=_MODEL_BYTES / 0.4))
        rows.append(
            [
                str(workers),
                str(degree),
                f"{plans.bytes_per_step / _MODEL_BYTES:.3g}",
                f"{graph.spectral_gap:.3f}",
                f"{graph.rounds_to_consensus():g}",
            ]
        )
    headings = ["workers", "degree", f"models per step, {words}", "gap", "rounds"]
    return f"![{name}, 8 workers](../pictures/topologies/{name}.svg)\n\n{markdown(headings, rows)}"


def situations() -> str:
    """All methods on three clusters."""
    equal = {"compute_seconds": 0.25, "latency_seconds": 0.0001}
    clusters = {
        "10 Gbit/s": Cluster(**equal, bandwidth_bytes_per_second=1.25e9),
        "1 Gbit/s": Cluster(**equal, bandwidth_bytes_per_second=125e6),
        "10 Gbit/s, one worker 5 times slower": Cluster(**equal, bandwidth_bytes_per_second=1.25e9, slowdown={3: 5.0}),
    }
    columns = {name: compare_plans(16, _MODEL_BYTES, cluster) for name, cluster in clusters.items()}
    rows = [
        [_short(plans[0]), *(f"{one.steps_per_second:.3g}" for one in plans)]
        for plans in zip(*columns.values(), strict=True)
    ]
    headings = ["method", *columns]
    note = (
        "Steps per second of 16 workers together, for 25 million float32 parameters, 0.25 s per gradient and 0.1 ms of "
        "latency; by the planner, not measured."
    )
    return f"{markdown(headings, rows)}\n{textwrap.fill(note, 120, break_on_hyphens=False)}\n"


def choices() -> str:
    """What the planner chooses on several networks, by data and optimizer."""
    near = {"compute_seconds": 0.25, "latency_seconds": 1e-4}
    clusters = {
        "10 Gbit/s": Cluster(**near, bandwidth_bytes_per_second=1.25e9),
        "1 Gbit/s": Cluster(**near, bandwidth_bytes_per_second=125e6),
        "100 Mbit/s": Cluster(**near, bandwidth_bytes_per_second=12.5e6),
        "1 Gbit/s, 50 ms apart": Cluster(compute_seconds=0.25, latency_seconds=0.05, bandwidth_bytes_per_second=125e6),
        "10 Gbit/s, one worker 5 times slower": Cluster(**near, bandwidth_bytes_per_second=1.25e9, slowdown={3: 5.0}),
        "2 sites, 50 Mbit/s and 20 ms between them": Cluster(
            **near,
            bandwidth_bytes_per_second=25e6,
            sites=((0, 1, 2, 3), (4, 5, 6, 7)),
            site_bandwidth_bytes_per_second=6.25e6,
            site_latency_seconds=0.02,
        ),
    }
    sites = clusters["2 sites, 50 Mbit/s and 20 ms between them"]
    clusters["the same, with the odd ranks at one site"] = replace(sites, sites=((0, 2, 4, 6), (1, 3, 5, 7)))
    kinds: tuple[tuple[Data, Optimizer], ...] = (("alike", "sgd"), ("differ", "sgd"), ("differ", "adaptive"))
    rows = []
    for network, cluster in clusters.items():
        baseline = plan_ddp(8, 20_000_000, cluster, 6)
        made = [choose(8, 20_000_000, cluster, *kind) for kind in kinds]
        rows.append([network, *(f"{_cell(each.plan)}: {each.plan.speedup_over(baseline):.2f}" for each in made)])
    note = (
        "Beside each method: its steps per second, those of torch DDP = 1, whose ring follows the ranks. *Placed*: the "
        "workers take the places of the graph in another order. For 8 workers, 5 million float32 parameters and 0.25 s "
        "per gradient; by the planner, not measured."
    )
    headings = ["network", "data alike", "data differ, SGD", "data differ, Adam"]
    return f"{markdown(headings, rows)}\n{textwrap.fill(note, 120, break_on_hyphens=False)}\n"


def _cell(plan: Plan) -> str:
    name, _, graph = called(plan).partition(" on ")
    kind, _, options = graph.partition("(")
    return f"{name} on `{kind}`{', placed' * options.endswith(', placed')}" if graph else name


def _compressor_row(scheme: AbstractCompressor) -> list[str]:
    traits, bound = scheme.traits, scheme.error_bound(_ELEMENTS)
    bits = scheme.num_bits(_ELEMENTS) / _ELEMENTS
    return [
        f"`{scheme}`",
        f"{bits:.3g}" if traits.fixed_size else f"up to {bits:.3g}",
        f"{32 / bits:.3g}" if traits.fixed_size else "-",
        "yes" if traits.unbiased else "no",
        _constant(bound),
        "yes" if traits.linear else "no",
        {"none": "no", "own": "its own", "shared": "shared"}[traits.randomness],
    ]


def _constant(bound: float) -> str:
    if bound == float("inf"):
        return "none"
    return f"1 - {1 - bound:.2g}" if 0.9 < bound <= 1 else f"{bound:.2g}"


_COMPRESSOR_HEADINGS = [
    *("compressor", "bits per element", "times smaller", "unbiased", "constant", "all-reduce", "random"),
]
_COMPRESSOR_NOTE = (
    "For 25 million float32 elements. *Constant*: `c` in `E ||C(x) - x||^2 <= c ||x||^2`, for the worst vector. "
    "*All-reduce*: messages may be added. *Random*: whether numbers are drawn, and if so whether all workers draw the "
    "same."
)


def message(*names: str) -> str:
    """Size and properties of these compressors' messages."""
    rows = [
        _compressor_row(compressor(name, **options))
        for name in names
        for options in COMPRESSOR_VARIANTS.get(name, [{}])
    ]
    note = textwrap.fill(_COMPRESSOR_NOTE, 120, break_on_hyphens=False)
    return f"{markdown(_COMPRESSOR_HEADINGS, rows)}\n{note}\n"


def compressors() -> str:
    """All compressors that have a name, with their defaults."""
    required: dict[str, dict[str, object]] = {"threshold": {"threshold": 1.0}, "lattice": {"step": 0.01}}
    rows = [[f"`{name}`", *_compressor_row(compressor(name, **required.get(name, {})))] for name in COMPRESSORS]
    note = textwrap.fill(_COMPRESSOR_NOTE, 120, break_on_hyphens=False)
    return f"{markdown(['name', *_COMPRESSOR_HEADINGS], rows)}\n{note}\n"


def ways() -> str:
    """Bits that a worker sends for each element, with several compressors and ways of taking the mean."""
    numbers = (2, 3, 4, 5, 6, 8, 10, 11, 16, 64)
    called: dict[Way, str] = {"two_phase": "two phases", "all_gather": "gathered", "all_reduce": "all-reduce"}
    lines: tuple[tuple[str, tuple[Way, ...]], ...] = (
        ("int8", ("two_phase", "all_gather")),
        ("scaled_sign", ("two_phase",)),
        ("terngrad", ("all_gather", "all_reduce")),
        ("qsgd", ("all_gather", "all_reduce")),
    )
    rows = [["uncompressed", *(f"{32 * 2 * (n - 1) / n:.3g}" for n in numbers)]]
    for name, possible in lines:
        bits: dict[Way, list[float]] = {way: [] for way in possible}
        for n in numbers:
            for way in possible:
                try:
                    sent = bytes_sent(scheme_of(name), way, _ELEMENTS, n)
                except CompressionError:  # the sum of so many does not fit into a byte
                    sent = math.inf
                bits[way].append(8 * sent / _ELEMENTS)
        best = [min(column) for column in zip(*bits.values(), strict=True)]
        for way, values in bits.items():
            cells = ["-" if math.isinf(value) else f"{value:.3g}" for value in values]
            shown = [
                f"**{cell}**" if value == least and len(bits) > 1 else cell
                for cell, value, least in zip(cells, values, best, strict=True)
            ]
            rows.append([f"`{name}`, {called[way]}", *shown])
    return markdown(["bits sent per element", "n = 2", *map(str, numbers[1:])], rows)


def settings() -> str:
    """What each of Lightning's settings does under each strategy, and the words of those that are refused."""
    record: dict[str, dict[str, str]] = json.loads((DOCS / "concepts/lightning-settings.json").read_text())
    words: list[str] = []
    rows = []
    for setting, outcomes in record.items():
        cells = []
        for outcome in outcomes.values():
            kind, _, said = outcome.partition(": ")
            if not said:
                cells.append(outcome)
                continue
            if outcome not in words:
                words.append(outcome)
            what = (
                "refused" if kind in ("ConfigurationError", "MisconfigurationException", "TopologyError") else "fails"
            )
            cells.append(f"{what} ({words.index(outcome) + 1})")
        rows.append([f"`{setting}`" if re.search(r"[=(_.]|^[A-Z]\w+$", setting) else setting, *cells])
    strategies = [f"`{name}`" for name in next(iter(record.values()))]
    notes = [f"{number}. {' '.join(said.split())[:400]}" for number, said in enumerate(words, 1)]
    return "\n".join([markdown(["setting", *strategies], rows).rstrip("\n"), "", "What is said:", "", *notes])


def generate(name: str, page: Path) -> str:
    """The table of this name, for a page: links in it begin there."""
    first, *arguments = name.split()
    makers: dict[str, Callable[..., str]] = {
        "sends": sends,
        "methods": methods,
        "readme": readme,
        "speeds": speeds,
        "plan": plan_command,
        "reference": reference,
        "nav": nav,
        "moved": moved,
        "pipeline": pipeline,
        "pipelines": pipelines,
        "pipeline-nav": pipeline_nav,
        "topologies": topologies,
        "topology": topology,
        "situations": situations,
        "choices": choices,
        "message": message,
        "compressors": compressors,
        "settings": settings,
        "ways": ways,
        "result": lambda subject: measured.result(subject, page),
        "table": lambda subject, rows="": measured.table(subject, page, *_ROWS.get(rows, ())),
        "measurements": lambda: measured.every(page),
        "claims": lambda: measured.claims(page),
    }
    if first not in makers:
        raise ValueError(f"Got a table called {name!r}, need one of {', '.join(makers)}. Correct the page.")
    return makers[first](*arguments)


def pages() -> list[Path]:
    """The pages that have a computed table."""
    every = [*sorted(DOCS.rglob("*.md")), *sorted((DOCS.parent / "recipes").rglob("*.md"))]
    every += [DOCS.parent / "README.md", DOCS.parent / "mkdocs.yml"]
    texts = {page: page.read_text(encoding="utf-8") for page in every}
    return [page for page, text in texts.items() if _BLOCK.search(text) or _FIGURE.search(text)]


def regenerated(page: Path) -> str:
    """The text of a page with its tables and figures as they should be."""
    text = _BLOCK.sub(
        lambda match: f"{match[1]}\n{generate(match['name'], page)}\n{match[3]}", page.read_text(encoding="utf-8")
    )
    return _FIGURE.sub(lambda match: f"{match[1]}{measured.figure(match[2], match[3], match[4])}{match[5]}", text)


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite the tables, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page is out of date")
    parser.add_argument("pages", nargs="*", metavar="PAGE", help="only these; else all that have a computed table")
    options = parser.parse_args(argv)
    chosen = [Path(page).absolute() for page in options.pages] or pages()
    stale = [page for page in chosen if regenerated(page) != page.read_text(encoding="utf-8")]
    for page in stale:
        if options.check:
            print(f"{page.relative_to(DOCS.parent)} is out of date: run python docs/generate.py", file=sys.stderr)
        else:
            page.write_text(regenerated(page), encoding="utf-8")
            print(f"wrote {page.relative_to(DOCS.parent)}")
    return int(bool(stale) and options.check)


def _short(one: Plan) -> str:
    name = one.method.split("(")[0]
    return f"{name} on `{one.topology}`" if one.topology else name


if __name__ == "__main__":
    sys.exit(main())
