#!/usr/bin/env python3
"""plot_lengths.py: time against the length of a sequence, as tables (Markdown, to standard output) and plots (PNG).

    python3 scripts/plot_lengths.py layers JSON...               layers beside the figures of
                                                                 docs/measurements/layer-figures.csv
    python3 scripts/plot_lengths.py rat JSON... [--png FILE]     training and generation through RAT and attention
                                                                 layers against T, beside what the paper shows
    python3 scripts/plot_lengths.py pararnn JSON... [--png FILE] nonlinear cells by solver, against T and against the
                                                                 number of channels, beside a loop over the tokens

JSON: what `riverrun bench layer` and `riverrun bench ops` print, a line a measurement; scripts/measure_gpu.sh (layers,
rat, pararnn) runs them. Lines of other measurements are passed over. Tables need nothing but Python 3.8; plots need
matplotlib.
"""

import argparse
import csv
import json
import math
import os
import sys

from plot_bench import pyplot, save

FIGURES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "docs", "measurements", "layer-figures.csv")

# Figure 3 of arXiv 2507.04416 (one layer of width 2048 on an H100, bf16): milliseconds by T, read off the plot to some
# 3 %. Training: forward and backward of 262,144 tokens in sequences of T; generation: a token of 512 sequences.
PAPER_TRAINING = {
    "attention": {4096: 122, 8192: 176, 16384: 279, 32768: 476, 65536: 885, 131072: 1705},
    "rat16": {4096: 150, 8192: 150, 16384: 158, 32768: 173, 65536: 201, 131072: 250},
}
PAPER_GENERATION = {
    "attention": {4096: 6.6, 8192: 13.0, 16384: 25.7},
    "rat16": {4096: 0.74, 8192: 1.21, 16384: 2.47, 32768: 3.49, 65536: 6.77, 131072: 13.0},
    "rat64": {8192: 0.58, 16384: 0.70, 32768: 1.12, 65536: 2.40, 131072: 3.40},
}
PAPER_TRAINING_CLAIM, PAPER_GENERATION_CLAIM = "7 times at 100K", "9 times at 4K"
PAPER_LOOP_CLAIM = "up to 665 times (forward, against a loop of a framework's operations)"
COLOURS = {"attention": "#d62728", "rat16": "#1f77b4", "rat64": "#2ca02c", "local": "#9467bd"}


def read(paths, bench):
    """The lines of one kind of measurement, in order."""
    rows = []
    for path in paths:
        with open(path) as lines:
            rows += [row for row in map(json.loads, filter(str.strip, lines)) if row.get("bench") == bench]
    if not rows:
        sys.exit(f"the files have no lines of bench {bench}")
    return rows


def about(row):
    return f"{row['machine']}, {row['precision']}, commit {row['commit']}"


def show(value, digits=3):
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def table(header, rows):
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def series(rows, key, **wanted):
    """{T: value} of the lines that have these fields."""
    return {row["seq"]: row[key] for row in rows
            if row.get(key) is not None and all(row.get(k) == v for k, v in wanted.items())}


# ---- layers beside figures -------------------------------------------------------------------------------------------

def verdict(ours, figure):
    for name in ("aim", "must"):
        wanted = [float(figure[f"{which}_{name}_ms"]) for which in ("forward", "both") if figure[f"{which}_{name}_ms"]]
        if wanted and all(value is not None and value <= limit for value, limit in zip(ours, wanted)):
            return name
    return "below must" if figure["forward_must_ms"] else ""


def layers(options):
    rows = read(options.files, "layer")
    figures = {(f["block"], f["batch"], f["seq"]): f for f in csv.DictReader(open(FIGURES, newline=""))}
    out = []
    for row in rows:
        figure = figures.get((row["block"], str(row["batch"]), str(row["seq"])))
        if "both_ms" not in row:
            continue
        ours = row["forward_ms"], row["both_ms"]
        wanted = [" / ".join(show(float(figure[f"{w}_{name}_ms"]) if figure[f"{w}_{name}_ms"] else None)
                             for w in ("forward", "both")) if figure else "" for name in ("theirs", "must", "aim")]
        out.append([row["block"], f"{row['batch']} x {row['seq']:,}", " / ".join(map(show, ours)),
                    f"{show(row['forward_floor_ms'])} / {show(row['both_floor_ms'])}", *wanted,
                    verdict(ours, figure) if figure else "", f"{row['difference']:.1e}" if row["right"] else "wrong"])
    print(f"{about(rows[0])}; milliseconds, forward / forward + backward\n")
    table(["layer", "batch", "riverrun", "floor", "theirs", "must", "aim", "reached", "difference"], out)


# ---- RAT and attention against T -------------------------------------------------------------------------------------

def training_table(rows, blocks):
    both = {b: series(rows, "both_ms", block=b) for b in blocks}
    ahead = {b: series(rows, "forward_ms", block=b) for b in blocks}
    lengths = sorted(set().union(*both.values()))
    batch = {row["seq"]: row["batch"] for row in rows if "both_ms" in row}
    attention, paper = both.get("attention", {}), PAPER_TRAINING

    def times(T, block):
        mine = both[block].get(T)
        return f"{attention[T] / mine:.2f}" if mine and T in attention else "–"

    def paper_times(T):
        return f"{paper['attention'][T] / paper['rat16'][T]:.2f}" if T in paper["rat16"] else "–"

    others = [b for b in blocks if b != "attention"]
    print(f"Training, forward / forward + backward, ms. The paper: {PAPER_TRAINING_CLAIM}.\n")
    table(["T", "batch"] + blocks + [f"attention / {b}" for b in others] + ["the paper's attention / RAT 16"],
          [[f"{T:,}", str(batch[T])] + [f"{show(ahead[b].get(T))} / {show(both[b].get(T))}" for b in blocks] +
           [times(T, b) for b in others] + [paper_times(T)] for T in lengths])


def generation_table(rows, blocks, batch):
    steps = {b: series(rows, "step_ms", block=b, batch=batch) for b in blocks}
    reads = {b: series(rows, "prefill_ms", block=b, batch=batch) for b in blocks}
    lengths = sorted(set().union(*steps.values()))
    attention, others = steps.get("attention", {}), [b for b in blocks if b != "attention"]
    print(f"Generation, {batch} sequences: reading T tokens of one / a token of all, ms. "
          f"The paper, 512 sequences: {PAPER_GENERATION_CLAIM}.\n")
    table(["T"] + blocks + [f"attention / {b}" for b in others],
          [[f"{T:,}"] + [f"{show(reads[b].get(T))} / {show(steps[b].get(T))}" for b in blocks] +
           [f"{attention[T] / steps[b][T]:.2f}" if T in attention and T in steps[b] else "–" for b in others]
           for T in lengths])


def plot_series(axis, ours, paper, key_label):
    for block, values in ours.items():
        if values:
            axis.plot(list(values), list(values.values()), "o-", color=COLOURS.get(block), label=f"{block}, riverrun")
        if block in paper:
            axis.plot(list(paper[block]), list(paper[block].values()), "s--", color=COLOURS.get(block), alpha=0.4,
                      label=f"{block}, the paper (H100)")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("T, tokens")
    axis.set_ylabel(key_label)
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)


def speedups(ours):
    """Attention's time over each other block's, by T."""
    attention = ours.get("attention", {})
    return {b: {T: attention[T] / v for T, v in values.items() if T in attention}
            for b, values in ours.items() if b != "attention"}


def plot_speedups(axis, ours, paper, claim, at, times):
    for block, values in speedups(ours).items():
        if values:
            axis.plot(list(values), list(values.values()), "o-", color=COLOURS.get(block), label=f"{block}, riverrun")
    for block, values in speedups(paper).items():
        if values:
            axis.plot(list(values), list(values.values()), "s--", color=COLOURS.get(block), alpha=0.4,
                      label=f"{block}, the paper")
    if paper:
        axis.plot([at], [times], "*", color="black", markersize=12, label=f"the paper's claim: {claim}")
    axis.axhline(1, color="black", linewidth=0.6)
    axis.set_xscale("log", base=2)
    axis.set_xlabel("T, tokens")
    axis.set_ylabel("times as fast as attention")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)


def rat(options):
    rows = read(options.files, "layer")
    blocks = [b for b in ("attention", "rat16", "rat64") if any(row["block"] == b for row in rows)]
    batches = sorted({row["batch"] for row in rows if row.get("step_ms") is not None}, reverse=True)
    print(f"{about(rows[0])}; layers of width {rows[0]['width']} with norm and projections\n")
    trained = any(row.get("both_ms") is not None for row in rows)
    if trained:
        training_table(rows, blocks)
    for batch in batches:
        generation_table(rows, blocks, batch)
    plt = pyplot() if options.png else None
    if not plt:
        return
    figure, axes = plt.subplots(2, trained + len(batches), figsize=(6 * (trained + len(batches)), 10), squeeze=False)
    if trained:
        ours = {b: series(rows, "both_ms", block=b) for b in blocks}
        plot_series(axes[0][0], ours, PAPER_TRAINING, "ms, forward + backward of a layer")
        plot_speedups(axes[1][0], ours, PAPER_TRAINING, PAPER_TRAINING_CLAIM, 100e3, 7)
        tokens = {row["batch"] * row["seq"] for row in rows if row.get("both_ms") is not None}
        axes[0][0].set_title("training" + (f", {tokens.pop():,} tokens in sequences of T" if len(tokens) == 1 else ""))
    for place, batch in enumerate(batches, int(trained)):
        ours = {b: series(rows, "step_ms", block=b, batch=batch) for b in blocks}
        paper = PAPER_GENERATION if batch == 512 else {}
        plot_series(axes[0][place], ours, paper, f"ms, a token of {batch} sequences")
        plot_speedups(axes[1][place], ours, paper, PAPER_GENERATION_CLAIM, 4096, 9)
        axes[0][place].set_title(f"generation behind T tokens, {batch} sequences")
    figure.suptitle(about(rows[0]))
    save(figure, options.png)


# ---- nonlinear cells -------------------------------------------------------------------------------------------------

SOLVERS = {0: "as chosen", 1: "sequential", 2: "Newton", 3: "shooting", 4: "a call a token"}
SHOWN = (0, 1, 2, 3)
HEADER = ["as chosen", "sequential", "Newton, 3 iterations", "shooting, 3 iterations"]
CELLS = ("ParaGRU", "ParaLSTM")


def sizes(row):
    return {part.split("=")[0]: int(part.split("=")[1]) for part in row["shape"].split()}


class Cells:
    """Times of the cells alone: of (cell, solver, B, T), with N channels."""

    def __init__(self, rows):
        self.forward, self.both, self.solver = {}, {}, {}
        for row in rows:
            if row["operation"] != "cell" or row["forward_ms"] is None:
                continue
            s = sizes(row)
            self.N = s["H"] * s["J"]
            key = s["e"], s["m"], s["B"], s["T"]
            self.forward[key] = row["forward_ms"]
            self.both[key] = row["both_ms"]
            self.solver[key] = row.get("solver")

    def against_length(self, times, cell, solver, batch):
        return {T: ms for (e, m, B, T), ms in sorted(times.items()) if (e, m, B) == (cell, solver, batch)}

    def against_batch(self, times, cell, solver, length):
        return {B * self.N: ms for (e, m, B, T), ms in sorted(times.items()) if (e, m, T) == (cell, solver, length)}

    def loop(self, cell, batch):
        """Of the loop over tokens, milliseconds a token: of its longest sequence."""
        loops = self.against_length(self.forward, cell, 4, batch)
        return loops[max(loops)] / max(loops) if loops else None

    def crossing(self, cell, length):
        """The B N from which the sequential solver is the fastest forward, between two that were measured."""
        one = self.against_batch(self.forward, cell, 1, length)
        parallel = {key: ms for key, ms in self.forward.items() if self.solver[key] != "sequential"}
        others = [self.against_batch(parallel, cell, m, length) for m in (0, 2, 3)]
        before = None
        for BN, ms in one.items():
            best = min((o[BN] for o in others if BN in o), default=None)
            if best is None:
                continue
            ratio = math.log(ms / best)
            if ratio <= 0:
                if before is None:
                    return BN
                share = before[1] / (before[1] - ratio)
                return math.exp(math.log(before[0]) + share * (math.log(BN) - math.log(before[0])))
            before = BN, ratio
        return None


def cells_table(cells, cell, batch):
    loop = cells.loop(cell, batch)
    ahead = {m: cells.against_length(cells.forward, cell, m, batch) for m in SHOWN}
    both = {m: cells.against_length(cells.both, cell, m, batch) for m in SHOWN}
    measured = cells.against_length(cells.forward, cell, 4, batch)
    lengths = sorted(set().union(*ahead.values()))
    rows = []
    for T in lengths:
        best = min((ahead[m][T] for m in ahead if T in ahead[m]), default=None)
        of_loop = measured.get(T, loop * T if loop else None)
        rows.append([f"{T:,}"] + [f"{show(ahead[m].get(T))} / {show(both[m].get(T))}" for m in SHOWN] +
                    [show(of_loop) + ("" if T in measured or not loop else " *")] +
                    [f"{of_loop / best:,.0f}" if of_loop and best else "–"])
    print(f"{CELLS[cell]}, {batch} x {cells.N} channels, forward / forward + backward, ms. "
          f"The paper: {PAPER_LOOP_CLAIM}.\n")
    table(["T"] + HEADER + ["a call a token, forward", "the fastest: times as fast as that"], rows)
    if loop:
        print(f"\\* from the {1e3 * loop:.2f} us a token of its longest sequence that was measured.\n")


def crossing_table(cells, cell, length):
    lines = {m: cells.against_batch(cells.forward, cell, m, length) for m in SHOWN}
    counts = sorted(lines[1])
    if len(counts) < 2:
        return
    crossing = cells.crossing(cell, length)
    print(f"{CELLS[cell]}, T = {length:,}, forward, ms" +
          (f"; the sequential solver is the fastest from B N = {crossing:,.0f} on.\n" if crossing else
           "; one of the parallel solvers is the fastest at all of them.\n"))
    table(["B N"] + HEADER, [[f"{BN:,}"] + [show(lines[m].get(BN)) for m in SHOWN] for BN in counts])


def pararnn_axis(axis, xlabel):
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel(xlabel)
    axis.set_ylabel("ms, forward")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)


def plot_pararnn(cells, batch, length, path, title):
    plt = pyplot()
    if not plt:
        return
    figure, axes = plt.subplots(2, 3, figsize=(18, 10), squeeze=False)
    for cell, name in enumerate(CELLS):
        lines = {m: cells.against_length(cells.forward, cell, m, batch) for m in (*SHOWN, 4)}
        loop, T_max = cells.loop(cell, batch), max((max(v) for v in lines.values() if v), default=1)
        by_length, speed, by_batch = axes[cell]
        for m, values in lines.items():
            if values:
                by_length.plot(list(values), list(values.values()), "o-", label=SOLVERS[m], color=f"C{m}")
        if loop:
            start = max(lines[4])
            by_length.plot([start, T_max], [loop * start, loop * T_max], ":", color="C4", label="the same, continued")
            for m in SHOWN:
                values = {T: lines[4].get(T, loop * T) / ms for T, ms in lines[m].items()}
                speed.plot(list(values), list(values.values()), "o-", label=SOLVERS[m], color=f"C{m}")
            speed.axhline(665, color="black", linestyle="--", label="the paper's 665, against a framework's loop")
        by_length.set_title(f"{name}, {batch} x {cells.N} channels")
        pararnn_axis(by_length, "T, tokens")
        speed.set_title(f"{name}: times as fast as a call a token")
        pararnn_axis(speed, "T, tokens")
        speed.set_ylabel("times")
        for m in SHOWN:
            values = cells.against_batch(cells.forward, cell, m, length)
            by_batch.plot(list(values), list(values.values()), "o-", label=SOLVERS[m], color=f"C{m}")
        crossing = cells.crossing(cell, length)
        if crossing:
            by_batch.axvline(crossing, color="black", linestyle="--", label=f"B N = {crossing:,.0f}")
        by_batch.set_title(f"{name}, T = {length:,}")
        pararnn_axis(by_batch, "B N, channels of all sequences")
    figure.suptitle(title)
    save(figure, path)


def pararnn(options):
    rows = read(options.files, "ops")
    cells = Cells(rows)
    if not cells.forward:
        sys.exit("the files have no measurements of cells")
    lengths = [T for (_, m, _, T) in cells.forward if m == 1]
    length = max(set(lengths), key=lengths.count)
    batch = min(B for (_, _, B, _) in cells.forward)
    print(f"{about(rows[0])}; the cells alone, without the projection of their input\n")
    for cell in range(len(CELLS)):
        cells_table(cells, cell, batch)
    for cell in range(len(CELLS)):
        crossing_table(cells, cell, length)
    if options.png:
        plot_pararnn(cells, batch, length, options.png, about(rows[0]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, run in (("layers", layers), ("rat", rat), ("pararnn", pararnn)):
        command = commands.add_parser(name)
        command.add_argument("files", nargs="+")
        if name != "layers":
            command.add_argument("--png")
        command.set_defaults(run=run)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
