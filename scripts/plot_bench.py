#!/usr/bin/env python3
"""plot_bench.py: tables (Markdown, to standard output) and plots (PNG) of measurements.

    python3 scripts/plot_bench.py ops CSV... [--png FILE]            times of operations, from riverrun bench ops --csv
    python3 scripts/plot_bench.py steps MODEL=LOG... [--png FILE]    speed of runs, from their log.jsonl, beside the
                                                                     figures of docs/measurements/gpu-figures.csv
    python3 scripts/plot_bench.py curves LABEL=LOG... [--png FILE]   losses of runs
    python3 scripts/plot_bench.py compare LABEL=LOG LABEL=LOG [--png FILE] [--last 100] [--limit 0.01]
                                                                     do two runs end alike? exit code 1 if not

The tables need nothing but Python 3.8. Plots need matplotlib; without it they are left out, and said.
"""

import argparse
import csv
import json
import math
import os
import statistics
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
FIGURES = os.path.join(HERE, "..", "docs", "measurements", "gpu-figures.csv")
OURS, THEIRS, MUST, AIM, FLOOR = "#1f77b4", "#7f7f7f", "#d62728", "#2ca02c", "#000000"


def pyplot():
    try:
        import matplotlib
    except ImportError:
        print("plots left out: the Python package matplotlib is not installed", file=sys.stderr)
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot
    return matplotlib.pyplot


def save(figure, path):
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    print(f"wrote {path}", file=sys.stderr)


def labelled(text):
    label, equals, path = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"'{text}' is not LABEL=FILE")
    return label, path


# ---- operations ------------------------------------------------------------------------------------------------------

def number(row, key):
    return float(row[key]) if row.get(key) else None


def pair(row, key, digits=3):
    values = [number(row, f"{which}_{key}") for which in ("forward", "both")]
    if values == [None, None]:
        return ""
    return " / ".join("–" if v is None else f"{v:.{digits}g}" for v in values[:1 if values[1] is None else 2])


def verdict(row):
    """How the times stand to what was asked for."""
    if row["right"] != "yes":
        return "wrong"
    words = []
    for name in ("aim", "must"):
        pairs = [(number(row, f"{w}_ms"), number(row, f"{w}_{name}_ms")) for w in ("forward", "both")]
        pairs = [(ours, wanted) for ours, wanted in pairs if ours is not None and wanted is not None]
        if pairs and all(ours <= wanted for ours, wanted in pairs):
            return name
        if pairs and any(ours <= wanted for ours, wanted in pairs):
            words.append(f"{name} in part")
        elif pairs and name == "must":
            words.append("below must")
    return ", ".join(words)


def operations_table(rows):
    first = rows[0]
    print(f"{first['machine']}, {first['precision']}, commit {first['commit']}: a device copy runs at "
          f"{float(first['copy_gb_per_s']):.0f} GB/s, a large product at {float(first['product_tflop_per_s']):.0f} "
          "TFLOP/s. Milliseconds are medians, forward / forward + backward; theirs, must and aim were set for an "
          "H200.\n")
    print("| operation | case | shape | ms | GB/s | TFLOP/s | share of the roofline, % | floor, ms | theirs | must "
          "| aim | reached | difference |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        share = [number(row, f"{which}_share") for which in ("forward", "both")]
        share = " / ".join(f"{100 * s:.0f}" for s in share if s is not None)
        print(f"| {row['operation']} | {row['label']} | {row['shape']} | {pair(row, 'ms')} "
              f"| {pair(row, 'gb_per_s', 4)} | {pair(row, 'tflop_per_s')} "
              f"| {share} | {pair(row, 'floor_ms')} | {pair(row, 'theirs_ms')} "
              f"| {pair(row, 'must_ms')} | {pair(row, 'aim_ms')} | {verdict(row)} | {float(row['difference']):.0e} |")


def operations_plot(rows, path):
    plt = pyplot()
    if not plt:
        return
    rows = [row for row in rows if number(row, "forward_ms")]
    figure, axes = plt.subplots(1, 2, figsize=(15, 1.5 + 0.33 * len(rows)), sharey=True)
    places = list(range(len(rows)))[::-1]
    for axis, which in zip(axes, ("forward", "both")):
        times = [number(row, f"{which}_ms") or math.nan for row in rows]
        axis.barh(places, times, color=OURS, label="riverrun")
        for key, colour, mark in (("floor_ms", FLOOR, "|"), ("theirs_ms", THEIRS, "s"), ("must_ms", MUST, ">"),
                                  ("aim_ms", AIM, "<")):
            values = [number(row, f"{which}_{key}") or math.nan for row in rows]
            axis.plot(values, places, mark, color=colour, markersize=9 if mark == "|" else 6, label=key[:-3],
                      linestyle="none")
        axis.set_xscale("log")
        axis.set_xlabel("ms, forward" if which == "forward" else "ms, forward + backward")
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(places, [f"{row['operation']}, {row['label']}" for row in rows])
    axes[0].legend(loc="lower right")
    figure.suptitle(f"{rows[0]['machine']}, {rows[0]['precision']}, commit {rows[0]['commit']}")
    save(figure, path)


def operations(options):
    rows = [row for path in options.files for row in csv.DictReader(open(path, newline=""))]
    if not rows:
        sys.exit("the files have no rows")
    operations_table(rows)
    if options.png:
        operations_plot(rows, options.png)


# ---- runs ------------------------------------------------------------------------------------------------------------

class Run:
    """A log.jsonl. Of steps that were logged twice, by a run that was killed and went on, the later one counts."""

    def __init__(self, label, path):
        self.label, steps, valid, self.about, self.memory, self.first = label, {}, {}, {}, {}, None
        with open(path) as lines:
            for line in lines:
                entry = json.loads(line)
                if entry["type"] == "run":
                    self.about = entry
                elif entry["type"] == "step":
                    steps[entry["step"]] = entry
                elif entry["type"] == "valid":
                    valid[entry["step"]] = entry
                elif entry["type"] == "memory":
                    self.memory = entry
                elif entry["type"] == "start":
                    self.first = entry["seconds"]
        self.steps = [steps[at] for at in sorted(steps)]
        self.valid = [valid[at] for at in sorted(valid)]
        if not self.steps:
            sys.exit(f"{path} has no steps")

    def option(self, section, key):
        return self.about["config"][section][key]

    def median(self, key, skip=10):
        values = [step[key] for step in self.steps[min(skip, len(self.steps) - 1):] if step.get(key) is not None]
        return statistics.median(values) if values else None

    def memory_text(self):
        """The most that a GPU had in use, and what the plan said."""
        if not self.memory:
            return ""
        return f"{self.memory['peak_bytes'] / 2**30:.1f} (plan {self.memory['planned_bytes'] / 2**30:.1f})"


def show(value, form="{:,.0f}"):
    return form.format(float(value)) if isinstance(value, (int, float)) or value else ""


def steps(options):
    figures = {row["model"]: row for row in csv.DictReader(open(FIGURES, newline=""))}
    runs = [Run(*one) for one in options.files]
    print("| model | chip | ranks | batch | precision | steps | tokens/s, median | MFU, % "
          "| 6 N tokens/s, TFLOP/s a rank | peak memory, GiB | first step, s | theirs | must | aim | commit |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    for run in runs:
        rate, about, figure = run.median("tokens_per_s"), run.about, figures.get(run.label.split(",")[0], {})
        mfu = run.median("mfu")
        wanted = [f"{show(figure.get(f'{name}_tokens_per_s'))}" +
                  (f", {figure[f'{name}_gib']} GiB" if figure.get(f"{name}_gib") else "")
                  for name in ("theirs", "must", "aim")]
        print(f"| {run.label} | {about['machine'].split(',')[0]} | {about['ranks']} | {run.option('train', 'batch')} x "
              f"{run.option('data', 'seq_len')} | {about['precision']} | {len(run.steps)} | {show(rate)} "
              f"| {show(mfu and 100 * mfu, '{:.1f}')} "
              f"| {show(6e-12 * about['parameters'] * rate / about['ranks'], '{:.0f}')} "
              f"| {run.memory_text()} | {show(run.first, '{:.2f}')} | {' | '.join(wanted)} | {about['commit']} |")
    plt = pyplot() if options.png else None
    if not plt:
        return
    figure, axis = plt.subplots(figsize=(9, 1.5 + 0.7 * len(runs)))
    for place, run in enumerate(runs[::-1]):
        axis.barh(place, run.median("tokens_per_s"), color=OURS, label="riverrun" if place == 0 else None)
        wanted = figures.get(run.label.split(",")[0], {})
        for name, colour, mark in (("theirs", THEIRS, "s"), ("must", MUST, ">"), ("aim", AIM, "<")):
            if wanted.get(f"{name}_tokens_per_s"):
                axis.plot(float(wanted[f"{name}_tokens_per_s"]), place, mark, color=colour,
                          label=name if place == 0 else None)
    axis.set_yticks(range(len(runs)), [run.label for run in runs[::-1]])
    axis.set_xlabel("tokens/s")
    axis.grid(axis="x", alpha=0.3)
    axis.legend()
    figure.suptitle(f"{runs[0].about['machine']}, commit {runs[0].about['commit']}")
    save(figure, options.png)


def smooth(values, width):
    """Means over the last `width` values, fewer at the start."""
    out, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - width] if i >= width else 0)
        out.append(total / min(i + 1, width))
    return out


def plot_losses(runs, path, title, zoom=None):
    plt = pyplot() if path else None
    if not plt:
        return
    figure, axes = plt.subplots(1, 2 if zoom else 1, figsize=(14 if zoom else 10, 6), squeeze=False)
    for place, axis in enumerate(axes[0]):
        for colour, run in enumerate(runs):
            shown = run.steps[-zoom:] if place else run.steps
            width = 1 if len(run.steps) < 200 else 20
            at, losses = [s["step"] for s in shown], [s["loss"] for s in shown]
            if not place:
                axis.plot(at, losses, color=f"C{colour}", alpha=0.2, linewidth=0.6)
                losses = smooth(losses, width)
            axis.plot(at, losses, color=f"C{colour}", label=f"{run.label}: training", linewidth=1.2)
            if run.valid and not place:
                axis.plot([v["step"] for v in run.valid], [v["loss"] for v in run.valid], "o--", color=f"C{colour}",
                          markersize=3, label=f"{run.label}: validation")
        axis.set_xlabel("step" if not place else f"step, the last {zoom}")
        axis.set_ylabel("loss, nats a token")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(title)
    save(figure, path)


def curves(options):
    runs = [Run(*one) for one in options.files]
    print("| run | chip | ranks | precision | tokens | training loss, last 100 steps | best validation loss | at step "
          "| last validation loss | minutes | commit |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for run in runs:
        about, best = run.about, min(run.valid, key=lambda v: v["loss"]) if run.valid else None
        last = statistics.fmean(step["loss"] for step in run.steps[-100:])
        print(f"| {run.label} | {about['machine'].split(',')[0]} | {about['ranks']} | {about['precision']} "
              f"| {show(run.steps[-1]['tokens'])} | {last:.4f} | {show(best and best['loss'], '{:.4f}')} "
              f"| {show(best and best['step'])} | {show(run.valid and run.valid[-1]['loss'], '{:.4f}')} "
              f"| {run.steps[-1]['seconds'] / 60:.1f} | {about['commit']} |")
    about = runs[0].about
    plot_losses(runs, options.png, f"{about['machine']}, commit {about['commit']}")


def compare(options):
    runs = [Run(*one) for one in options.files]
    if len(runs) != 2:
        sys.exit("compare takes two runs")
    counts = [len(run.steps) for run in runs]
    if counts[0] != counts[1] or counts[0] < options.last:
        sys.exit(f"the runs have {counts[0]} and {counts[1]} steps: as many must be in both, at least {options.last}")
    means = [statistics.fmean(step["loss"] for step in run.steps[-options.last:]) for run in runs]
    apart = abs(means[1] - means[0]) / means[0]
    largest = max(abs(b["loss"] - a["loss"]) / a["loss"] for a, b in zip(runs[0].steps, runs[1].steps))
    print(f"| run | precision | mean loss of the last {options.last} of {counts[0]} steps | last validation loss |")
    print("|---|---|---|---|")
    for run, mean in zip(runs, means):
        valid = f"{run.valid[-1]['loss']:.5f}" if run.valid else ""
        print(f"| {run.label} | {run.about['precision']} | {mean:.5f} | {valid} |")
    print(f"\nThe means differ by {100 * apart:.3f} %, single steps by {100 * largest:.2f} % at most.")
    about = runs[0].about
    plot_losses(runs, options.png, f"{about['machine']}, commit {about['commit']}: the means of the last "
                f"{options.last} steps differ by {100 * apart:.3f} %", zoom=options.last)
    sys.exit(0 if apart < options.limit else 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, run, kind in (("ops", operations, str), ("steps", steps, labelled), ("curves", curves, labelled),
                            ("compare", compare, labelled)):
        command = commands.add_parser(name)
        command.add_argument("files", nargs="+", type=kind)
        command.add_argument("--png")
        command.set_defaults(run=run)
        if name == "compare":
            command.add_argument("--last", type=int, default=100)
            command.add_argument("--limit", type=float, default=0.01)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
