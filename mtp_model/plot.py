"""The curves of one or several training runs, drawn from their log.jsonl; needs matplotlib, an optional extra.

A run may lack any field and may still be writing: what no run has gets no panel, and a last line cut short is passed over.
One run is shown in its parts (losses, masks) in one panel each; several are shown a panel per part, with a colour per run.
"""

import argparse
import json
import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mtp_model.train import LOG

X_LABELS = {"step": "step", "seconds": "training time, seconds", "mask_rows": "mask rows trained"}
# Okabe and Ito's colours, told apart by the colour-blind too; their yellow is too pale for a line.
BLACK, PALETTE = "#000000", ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
PARTS = {  # of the loss: field of a record, what it is, colour
    "loss": ("total loss", BLACK),
    "base": ("base: masks, model's own head", PALETTE[0]),
    "sampler": ("sampler: masks, sampler head", PALETTE[1]),
    "ntp": ("ntp: the frozen model itself", PALETTE[2]),
    "lcm": ("lcm: squared distance, no unit", PALETTE[3]),
}
NATS = "nats per token"


@dataclass(frozen=True)
class Run:
    """A log: its training records, and the records of its evaluations."""

    name: str
    training: list[dict]
    evaluations: list[dict]

    def x(self, records: list[dict], field: str) -> np.ndarray:
        """Where `records` stand on the x axis; one without the field stands where its step lies between the training records."""
        values, steps, known = numbers(records, field), numbers(self.training, "step"), numbers(self.training, field)
        there = np.isfinite(steps) & np.isfinite(known)
        if there.any():
            # Before the first step all three are zero.
            between = np.interp(numbers(records, "step"), np.append(0, steps[there]), np.append(0, known[there]))
            values = np.where(np.isfinite(values), values, between)
        return values

    def right(self) -> np.ndarray:
        """(records, k) share of right guesses of each mask: the sampler's, of a run without one the base head's."""
        field = "right_sampler" if self.has_sampler else "right_base"
        columns = max((len(r.get(field) or []) for r in self.training), default=0)
        shares = np.full((len(self.training), columns), np.nan)
        for row, record in zip(shares, self.training, strict=True):
            found = record.get(field) or []
            row[: len(found)] = [number(v) for v in found]
        return shares

    @property
    def has_sampler(self) -> bool:
        return any(r.get("right_sampler") for r in self.training)


def number(value) -> float:
    """The value as a float; nan for what is missing or cannot be drawn."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan


def numbers(records: list[dict], field: str) -> np.ndarray:
    return np.array([number(r.get(field)) for r in records], dtype=float)


def tokens_per_step(run: Run) -> np.ndarray:
    return numbers([r["evaluation"] for r in run.evaluations], "tokens_per_step")


def read_records(path: Path) -> list[dict]:
    """The records of a log. Raises ValueError if there is no such file, no record in it, or a broken line that is not the last."""
    if not path.is_file():
        raise ValueError(f"log is {path}, no such file; accepted is a {LOG}, or the directory of a run that holds one")
    records, lines = [], path.read_text(encoding="utf-8", errors="replace").rstrip().split("\n")
    for index, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if isinstance(record, dict):
            records.append(record)
        elif index + 1 < len(lines):  # the last one may be in the middle of being written
            raise ValueError(f"{path}, line {index + 1} is {line[:60]!r}; accepted is a JSON object per line")
    if not records:
        raise ValueError(f"log is {path}, with no records; accepted is a log with at least one")
    return records


def unique_names(paths: list[Path]) -> list[str]:
    """Of each path as many of its last parts as tell it from the others. The paths differ."""
    depth = max(len(p.parts) for p in paths)
    tails = [[Path(*p.parts[-n:]).as_posix() for n in range(1, depth + 1)] for p in paths]
    counts = [Counter(column) for column in zip(*tails, strict=True)]
    return [next(t for t, c in zip(tail, counts, strict=True) if c[t] == 1) for tail in tails]


def read_runs(logs: list[Path]) -> list[Run]:
    """A run per log or directory, one named twice only once. Raises ValueError as `read_records`."""
    paths = list(dict.fromkeys(Path(os.path.abspath(p / LOG if p.is_dir() else p)) for p in logs))
    names = unique_names([p.parent if p.name == LOG else p for p in paths])
    runs = []
    for name, path in zip(names, paths, strict=True):
        records = read_records(path)
        evaluations = [r for r in records if isinstance(r.get("evaluation"), dict)]
        runs.append(Run(name, [r for r in records if "evaluation" not in r], evaluations))
    return runs


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over the `window` values around each one (an even window counts as one more); at the ends over those that there are."""
    sums, index = np.append(0, np.cumsum(values)), np.arange(len(values))
    first, end = np.maximum(index - window // 2, 0), np.minimum(index + window // 2 + 1, len(values))
    return (sums[end] - sums[first]) / (end - first)


def curve(axis, x: np.ndarray, y: np.ndarray, smooth: int, **style) -> None:
    """One line through the points that have both values, smoothed, with the raw one pale beneath."""
    there = np.isfinite(x) & np.isfinite(y)
    x, y = x[there], y[there]
    if len(x) == 1:
        style = {"marker": "o", "markersize": 4} | style
    if smooth > 1 and len(x) > 1:
        axis.plot(x, y, color=style["color"], alpha=0.25, linewidth=0.7, label="_raw", zorder=1)
    if len(x):
        axis.plot(x, smoothed(y, smooth), **{"linewidth": 1.4} | style)


def panels(runs: list[Run]) -> tuple[list[list[str]], list[int]]:
    """Rows of panels on twelve columns, and the rows' heights. What no run has is left out."""

    def drawn(name):
        if name == "right":
            return any(np.isfinite(run.right()).any() for run in runs)
        if name == "tokens":
            return any(np.isfinite(tokens_per_step(run)).any() for run in runs)
        fields = PARTS if name == "loss" and len(runs) == 1 else (name,)
        return any(np.isfinite(numbers(run.training, field)).any() for run in runs for field in fields)

    rows = [(3, ["loss", "right"]), (2, ["base", "sampler", "ntp", "lcm"]), (2, ["tokens", "lr", "grad_norm"])]
    if len(runs) == 1:
        del rows[1]
    mosaic, heights = [], []
    for height, names in rows:
        widths = {name: 2 if name == "tokens" else 1 for name in names if drawn(name)}
        if widths:
            unit = 12 // sum(widths.values())
            mosaic.append([name for name, width in widths.items() for _ in range(unit * width)])
            heights.append(height)
    return mosaic, heights


def draw(runs: list[Run], x: str = "step", smooth: int = 1):
    """The figure (matplotlib's). Its axes are labelled loss, base, sampler, ntp, lcm, right, tokens, lr and grad_norm, as far
    as there is something in them. Raises ValueError if a log has no `x`, or none has anything to draw."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    def shades(count):
        return list(colormaps["viridis"](np.linspace(0, 0.92, count)))

    single = len(runs) == 1
    mosaic, heights = panels(runs)
    for run in runs:
        if not mosaic or not np.isfinite(run.x(run.training + run.evaluations, x)).any():
            lacking = f"{x} in any record" if mosaic else "a value to draw"
            raise ValueError(f"log is that of {run.name}, without {lacking}; accepted is a log of `python -m mtp_model train`")
    figure = Figure(figsize=(11, 0.6 + 1.3 * sum(heights)), layout="constrained")  # without pyplot nobody's backend changes
    axes = figure.subplot_mosaic(mosaic, height_ratios=heights)
    colours = PALETTE[: len(runs)] if len(runs) <= len(PALETTE) else shades(len(runs))
    for run, colour in zip(runs, colours, strict=True):
        at, style, shares = run.x(run.training, x), {"color": colour, "label": run.name}, run.right()
        for field in (*PARTS, "lr", "grad_norm"):
            together = single and field in PARTS
            axis = axes.get("loss" if together else field)
            if axis is not None:
                own = dict(zip(("label", "color"), PARTS[field], strict=True)) if together else style
                curve(axis, at, numbers(run.training, field), 1 if field == "lr" else smooth, **own)
        if "right" in axes and single:
            masks = shades(shares.shape[1])
            for j, share in enumerate(shares.T, 1):
                curve(axes["right"], at, share, smooth, color=masks[j - 1], label=f"mask {j}")
            colour_bar(axes["right"], masks)
        elif "right" in axes and shares.size:
            curve(axes["right"], at, np.ma.masked_invalid(shares).mean(1).filled(np.nan), smooth, **style)
            curve(axes["right"], at, shares[:, 0], smooth, **style | {"linestyle": "--", "label": f"{run.name}, mask 1"})
        if "tokens" in axes:
            points = tokens_per_step(run)
            curve(axes["tokens"], run.x(run.evaluations, x), points, 1, marker="o", markersize=4, **style)
    finish(figure, axes, runs, colours, x)
    return figure


def colour_bar(axis, colours: list) -> None:
    """The masks' colours beside the axis; a legend of up to 16 lines would cover them."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    k = len(colours)
    scale = ScalarMappable(BoundaryNorm(np.arange(k + 1) + 0.5, k), ListedColormap(colours))
    bar = axis.figure.colorbar(scale, ax=axis, ticks=range(1, k + 1), aspect=30, pad=0.02)
    bar.set_label("mask", fontsize=9)
    bar.ax.tick_params(length=0, labelsize=8)
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)


def finish(figure, axes: dict, runs: list[Run], colours: list, x: str) -> None:
    """Titles, labels, limits and legends."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter, MaxNLocator

    samplers = {run.has_sampler for run in runs}
    head = "sampler's, or base head's without one" if len(samplers) == 2 else "sampler's" if True in samplers else "base head's"
    titles = {name: (label, NATS) for name, (label, _) in PARTS.items()} | {
        "lcm": ("lcm: distance of states", "squared distance"),
        "right": (f"right guesses per mask ({head})", "share of right guesses"),
        "tokens": ("held-out text", "tokens per step"),
        "lr": ("", "learning rate"),
        "grad_norm": ("", "gradient norm before clipping"),
    }
    if len(runs) == 1:
        titles["loss"] = ("loss and its parts", NATS)
    left, right = min(a.get_xlim()[0] for a in axes.values()), max(a.get_xlim()[1] for a in axes.values())
    for name, axis in axes.items():
        title, unit = titles[name]
        axis.set_title(title, fontsize=9, loc="left")
        axis.set_xlabel(X_LABELS[x], fontsize=9)
        axis.set_ylabel(unit, fontsize=9)
        axis.set_xlim(left, right)
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.xaxis.set_major_locator(MaxNLocator("auto", integer=x == "step", steps=[1, 2, 2.5, 5, 10]))
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        if name in ("right", "lr"):
            axis.set_ylim(bottom=0)
    if "lr" in axes:
        axes["lr"].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        axes["lr"].yaxis.get_offset_text().set_fontsize(8)
    if "tokens" in axes:
        axes["tokens"].axhline(1, color="grey", linewidth=0.8, label="_one", zorder=1)
        axes["tokens"].annotate("plain decoding: 1", (1, 1), xycoords=("axes fraction", "data"), xytext=(0, 3),
                                textcoords="offset points", ha="right", fontsize=7, color="dimgrey")  # fmt: skip
    if len(runs) > 1:
        keys = [Line2D([], [], color=colour, label=run.name) for run, colour in zip(runs, colours, strict=True)]
        figure.legend(handles=keys, loc="outside upper center", ncols=min(4, len(runs)), frameon=False, fontsize=9)
        if "right" in axes:
            keys = [Line2D([], [], color="dimgrey", linestyle=s, label=t) for s, t in (("-", "mean over the masks"), ("--", "mask 1"))]
            axes["right"].legend(handles=keys, fontsize=8, frameon=False)
    else:
        figure.suptitle(runs[0].name, fontsize=10)
        if "loss" in axes:
            axes["loss"].legend(fontsize=8, frameon=False, loc="upper right")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("logs", type=Path, nargs="+", metavar="LOG", help=f"a {LOG}, or the directory of a run that holds one")
    parser.add_argument("--out", type=Path, help="picture to write; its suffix says of what kind (default: curves.png beside the first log)")
    parser.add_argument("--smooth", type=int, default=1, metavar="N", help="running mean over N records, the raw curve pale beneath (default 1)")
    parser.add_argument("--x", choices=X_LABELS, default="step", help="what to draw against (default %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Draw `args.logs`, write the picture and print its path. Raises ValueError for arguments or logs that cannot be drawn, and
    without matplotlib."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise ValueError("python -m mtp_model plot needs matplotlib: pip install matplotlib") from None
    if args.smooth < 1:
        raise ValueError(f"smooth is {args.smooth}; accepted is 1 or more")
    first = args.logs[0]
    out = args.out or (first if first.is_dir() else first.parent) / "curves.png"
    suffixes = sorted("." + kind for kind in FigureCanvasBase.get_supported_filetypes())
    if out.suffix.lower() not in suffixes:
        raise ValueError(f"out is {out}; accepted are the suffixes {', '.join(suffixes)}")
    figure = draw(read_runs(args.logs), args.x, args.smooth)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)
    print(out)
    return 0
