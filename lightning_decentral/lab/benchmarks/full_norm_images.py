"""Accuracy of the image recipe where BatchNorm fails, with BatchNorm and with what can take its place.

    python -m lightning_decentral.lab.benchmarks.full_norm_images run --case single_class \\
        --norms full_norm,shuffled --seeds 1 --output FOLDER
    python -m lightning_decentral.lab.benchmarks.full_norm_images report --output FOLDER

``run`` trains the recipe's own files, one run after the other, and adds a line per epoch to ``FOLDER/epochs.csv``;
``report`` prints the table of the last epoch and draws ``FOLDER/epochs.svg``.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[3]
RECIPE = ROOT / "recipes" / "images"
CASES = {
    "single_class": "batches of one class",
    "tiny_batches": "batches of two images",
    "non_iid": "4 workers with 2 or 3 classes each",
}
SHUFFLED = "batch_norm, shuffled"
NORMS = ("batch_norm", "full_norm", "full_norm_synchronized", "batch_renorm", "mabn", "group_norm", SHUFFLED)
COLOURS = ("#d62728", "#1f77b4", "#1f77b4", "#9467bd", "#ff7f0e", "#2ca02c", "#444444")
Row = dict[str, str]


def train(case: str, norm: str, seed: int, epochs: int | None) -> list[Row]:
    """Return one run of the recipe, for its number of epochs or another; its validation accuracy after every epoch."""
    files = [RECIPE / "base.yaml", RECIPE / f"{case}.yaml", RECIPE / "method" / "ddp.yaml"]
    if not norm.startswith("batch_norm"):
        files.append(RECIPE / "norm" / f"{norm}.yaml")
    with tempfile.TemporaryDirectory() as folder:
        arguments = [argument for file in files for argument in ("-c", str(file))]
        arguments += ["--trainer.accelerator", "cpu", "--seed_everything", str(seed)]
        arguments += ["--trainer.enable_progress_bar", "false", "--trainer.logger.init_args.save_dir", folder]
        if epochs is not None:
            arguments += ["--trainer.max_epochs", str(epochs)]
        if case != "non_iid":
            arguments += ["--trainer.strategy", "auto"]
        if norm == SHUFFLED:
            arguments += ["--data.init_args.order", "shuffled"]
        done = subprocess.run(
            [sys.executable, "-m", "lightning_decentral", "fit", *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
        with open(next(Path(folder).rglob("metrics.csv"))) as file:
            rows = [row for row in csv.DictReader(file) if row.get("val_accuracy")]
    common = {"case": case, "norm": norm, "seed": str(seed)}
    return [{**common, "epoch": str(i + 1), "val_accuracy": row["val_accuracy"]} for i, row in enumerate(rows)]


def run(case: str, norms: list[str], seeds: list[int], epochs: int | None, output: Path) -> None:
    """Train, and add what came out to the file."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / "epochs.csv"
    for seed in seeds:
        for norm in norms:
            rows = train(case, norm, seed, epochs)
            new = not path.exists()
            with open(path, "a", newline="") as file:
                writer = csv.DictWriter(file, rows[0].keys())
                if new:
                    writer.writeheader()
                writer.writerows(rows)
            print(json.dumps([row["val_accuracy"] for row in rows]), case, norm, seed, flush=True)


def curves(rows: list[Row], case: str, norm: str) -> list[list[float]]:
    """Accuracy over epochs, one list for each seed."""
    own = [row for row in rows if (row["case"], row["norm"]) == (case, norm)]
    seeds = sorted({row["seed"] for row in own})
    return [[100 * float(row["val_accuracy"]) for row in own if row["seed"] == seed] for seed in seeds]


def report(output: Path) -> None:
    """Print the table and draw the plot."""
    from lightning_decentral.lab.results import environment

    with open(output / "epochs.csv") as file:
        rows = list(csv.DictReader(file))
    print(f"{environment()}\n\n| case | normalization | seeds | val_accuracy, last epoch (%) |\n|---|---|---|---|")
    for case in CASES:
        for norm in NORMS:
            if last := [curve[-1] for curve in curves(rows, case, norm)]:
                spread = f" ({min(last):.1f} to {max(last):.1f})" if len(last) > 1 else ""
                print(f"| {CASES[case]} | {norm} | {len(last)} | {statistics.mean(last):.1f}{spread} |")
    draw(rows, output / "epochs.svg")


def draw(rows: list[Row], path: Path) -> None:
    """Accuracy over epochs, the mean over seeds, as an SVG file: one panel for each case."""
    width, height, margin = 330, 250, 45
    parts = []
    cases = [case for case in CASES if any(row["case"] == case for row in rows)]
    for panel, case in enumerate(cases):
        left, epochs = panel * (width + margin) + margin, max(int(r["epoch"]) for r in rows if r["case"] == case)
        parts.append(f'<rect x="{left}" y="30" width="{width}" height="{height}" fill="none" stroke="#999"/>')
        parts.append(f'<text x="{left + width / 2}" y="20" text-anchor="middle">{CASES[case]}</text>')
        for accuracy in range(0, 101, 20):
            y = 30 + height * (1 - accuracy / 100)
            parts.append(f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{accuracy}</text>')
            parts.append(f'<path d="M{left} {y}h{width}" stroke="#ddd"/>')
        for epoch in range(2, epochs + 1, 2):
            x = left + width * (epoch - 1) / (epochs - 1)
            parts.append(f'<text x="{x:.0f}" y="{height + 46}" text-anchor="middle">{epoch}</text>')
        shown = [norm for norm in NORMS if curves(rows, case, norm)]
        for line, norm in enumerate(shown):
            means = [statistics.mean(values) for values in zip(*curves(rows, case, norm), strict=True)]
            points = " ".join(
                f"{left + width * i / (epochs - 1):.1f},{30 + height * (1 - value / 100):.1f}"
                for i, value in enumerate(means)
            )
            style = f'stroke="{COLOURS[NORMS.index(norm)]}" stroke-width="2" fill="none"'
            dashes = ' stroke-dasharray="6 4"' if norm == SHUFFLED else ""
            parts.append(f'<polyline points="{points}" {style}{dashes}/>')
            y = height + 12 - 16 * (len(shown) - 1 - line)
            parts.append(f'<path d="M{left + 160} {y - 4}h22" {style}{dashes}/>')
            parts.append(f'<text x="{left + 188}" y="{y}">{norm.replace("_", " ")}</text>')
    size = f'width="{len(cases) * (width + margin) + margin}" height="{height + 75}"'
    caption = f'<text x="{margin}" y="{height + 66}">validation accuracy (%) over epochs</text>'
    text = "\n".join([*parts, caption])
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n{text}\n</svg>\n'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("run")
    training.add_argument("--case", choices=CASES, required=True)
    training.add_argument("--norms", default="batch_norm,full_norm", help=f"of {', '.join(NORMS[:-1])}, shuffled")
    training.add_argument("--seeds", default="1")
    training.add_argument("--epochs", type=int, help="in the place of the recipe's")
    for command in (training, commands.add_parser("report")):
        command.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    if options.command == "report":
        report(options.output)
        return
    norms = [SHUFFLED if norm == "shuffled" else norm for norm in options.norms.split(",")]
    unknown = sorted(set(norms) - set(NORMS))
    if unknown:
        parser.error(f"got {', '.join(unknown)}, needs some of {', '.join(NORMS[:-1])}, shuffled")
    run(options.case, norms, [int(seed) for seed in options.seeds.split(",")], options.epochs, options.output)


if __name__ == "__main__":
    main()
