"""Accuracy of the image recipe where BatchNorm fails, with BatchNorm and with what can take its place.

    python benchmarks/full_norm_images.py run --case single_class --norms full_norm,shuffled --seeds 1 --output FOLDER
    python benchmarks/full_norm_images.py report --output FOLDER

``run`` trains the recipe's own files, one run after the other, and adds a line per epoch to ``FOLDER/epochs.csv``;
``report`` prints the table of the last epoch and draws ``FOLDER/full-norm-images.png``.
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

from lightning_decentral.bench.report import environment

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "images"
CASES = {
    "single_class": "batches of one class",
    "tiny_batches": "batches of two images",
    "non_iid": "4 workers with 2 or 3 classes each",
}
SHUFFLED = "batch_norm, shuffled"
NORMS = ("batch_norm", "full_norm", "full_norm_synchronized", "batch_renorm", "mabn", "group_norm", SHUFFLED)
Row = dict[str, str]


def train(case: str, norm: str, seed: int) -> list[Row]:
    """One run of the recipe; its validation accuracy after every epoch."""
    files = [RECIPE / "base.yaml", RECIPE / f"{case}.yaml", RECIPE / "method" / "ddp.yaml"]
    if not norm.startswith("batch_norm"):
        files.append(RECIPE / "norm" / f"{norm}.yaml")
    with tempfile.TemporaryDirectory() as folder:
        arguments = [argument for file in files for argument in ("-c", str(file))]
        arguments += ["--trainer.accelerator", "cpu", "--seed_everything", str(seed)]
        arguments += ["--trainer.enable_progress_bar", "false", "--trainer.logger.init_args.save_dir", folder]
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


def run(case: str, norms: list[str], seeds: list[int], output: Path) -> None:
    """Train, and add what came out to the file."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / "epochs.csv"
    for seed in seeds:
        for norm in norms:
            rows = train(case, norm, seed)
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
    from matplotlib import pyplot as plt

    with open(output / "epochs.csv") as file:
        rows = list(csv.DictReader(file))
    cases = [case for case in CASES if any(row["case"] == case for row in rows)]
    print(f"{environment()}\n\n| case | normalization | seeds | val_accuracy, last epoch (%) |\n|---|---|---|---|")
    figure, axes = plt.subplots(1, len(cases), figsize=(4.2 * len(cases), 3.4), sharey=True, squeeze=False)
    for axis, case in zip(axes[0], cases, strict=True):
        for norm in NORMS:
            if found := curves(rows, case, norm):
                last = [curve[-1] for curve in found]
                spread = f" ({min(last):.1f} to {max(last):.1f})" if len(last) > 1 else ""
                print(f"| {CASES[case]} | {norm} | {len(last)} | {statistics.mean(last):.1f}{spread} |")
                mean = [statistics.mean(values) for values in zip(*found, strict=True)]
                style = "--" if norm == SHUFFLED else "-"
                axis.plot(range(1, len(mean) + 1), mean, style, label=norm.replace("_", " "), linewidth=1.5)
        axis.set_title(CASES[case], fontsize=10)
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    axes[0][0].set_ylabel("validation accuracy (%)")
    figure.tight_layout()
    figure.savefig(output / "full-norm-images.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("run")
    training.add_argument("--case", choices=CASES, required=True)
    training.add_argument("--norms", default="batch_norm,full_norm", help=f"of {', '.join(NORMS[:-1])}, shuffled")
    training.add_argument("--seeds", default="1")
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
    run(options.case, norms, [int(seed) for seed in options.seeds.split(",")], options.output)


if __name__ == "__main__":
    main()
