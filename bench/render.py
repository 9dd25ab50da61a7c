"""The results of `bench.kernels` as Markdown, CSV and a picture, made from its JSON alone."""

import csv
import json
from pathlib import Path

from bench.cases import BASE, EAGER, OURS
from bench.counts import DATASHEETS
from bench.measure import PEAK
from bench.report import quartiles, table
from bench.roofline import plot

NEEDED = ("environment", "settings", "measured", "notes", "roofs", "rows", "counts", "plans")


def read(path: Path) -> dict:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"--report {path}: {error}; accepted is a JSON file that this command wrote") from None
    missing = [name for name in NEEDED if name not in values]
    if missing:
        raise ValueError(f"--report {path} has no {', '.join(missing)}; accepted is a JSON file that this command wrote")
    return values


def _rows(r: dict) -> str:
    return f"{r['rows']} ({r['on']} on)" if r["rank"] else str(r["rows"])


def _where(r: dict) -> list[str]:
    layer = f"{r['model']} {r['layer']}" if r["layer"] != r["operation"] else r["model"]
    return [f"{r['operation']}: {layer}, {r['shape']}" + (", forward + backward" if r["backward"] else ""), _rows(r), str(r["rank"] or "-")]


def _number(value: float | None, form: str, factor: float = 1.0) -> str:
    return "-" if value is None else format(value * factor, form)


def counts_table(rows: list[dict]) -> str:
    header = ["operation", "rows", "rank", "MB", "GFLOP", "FLOP/byte", *(f"{gpu.name}, us" for gpu in DATASHEETS)]
    lines = []
    for r in rows:
        numbers = [f"{r['bytes'] / 1e6:.3g}", f"{r['operations'] / 1e9:.3g}", f"{r['operations'] / r['bytes']:.3g}"]
        lines.append(_where(r) + numbers + [f"{r[f'roof_us {gpu.name}']:.3g}" for gpu in DATASHEETS])
    return table(header, lines)


def plans_table(rows: list[dict]) -> str:
    header = ["operation", "rows", "rank", "plan", "programs", "steps of K", "requested, MB", "of the least", "left in between, MB", "GFLOP"]
    lines = []
    for r in rows:
        name = f"**{r['name']}**" if r["chosen"] else r["name"]
        moved = [f"{r['requested'] / 1e6:.3g}", f"{r['requested'] / r['bytes']:.2f}x", f"{r['intermediate'] / 1e6:.3g}"]
        lines.append([*_where(r), name, r["programs"], str(r["steps"]), *moved, f"{r['operations'] / 1e9:.3g}"])
    return table(header, lines)


def checks_summary(rows: list[dict]) -> str:
    groups = {}
    for r in rows:
        groups.setdefault((r["operation"], r["provider"]), []).append(r)
    lines = []
    for key, group in groups.items():
        errors = [r["error"] for r in group if r["error"] is not None]
        right = f"{sum(r['status'] == 'ok' for r in group)} of {len(group)}" if errors else group[0]["status"]
        lines.append([*key, right, f"{max(errors):.2f}" if errors else "-"])
    return table(["operation", "competitor", "right", "largest error / eager's"], lines)


def checks_table(rows: list[dict]) -> str:
    lines = [[*_where(r), r["provider"], r["status"], _number(r["error"], ".2f")] for r in rows]
    return table(["operation", "rows", "rank", "competitor", "check", "error / eager's"], lines)


def measured_table(rows: list[dict]) -> str:
    header = ["operation", "rows", "rank", "competitor", "us (20 to 80 %)", "graph", "MB", "GFLOP"]
    header += ["share of roof", "over eager", "of base", PEAK, "error / eager's"]
    lines = []
    for r in rows:
        spread = f"{r['seconds'] * 1e6:.1f} ({r['p20'] * 1e6:.1f} to {r['p80'] * 1e6:.1f})" if r["seconds"] else r["status"]
        share = f"{_number(r['share_of_roof'], '.0f', 100)} % {r['bound']}" + ("" if r["cold"] else ", in L2") if r["seconds"] else "-"
        lines.append([
            *_where(r), r["provider"], spread, "yes" if r["captured"] else "no", f"{r['bytes'] / 1e6:.3g}", f"{r['operations'] / 1e9:.3g}", share,
            _number(r["over_eager"], ".2f") + "x", _number(r["of_base"], ".2f") + "x", _number(r[PEAK], ".1f"), _number(r["error"], ".2f"),
        ])  # fmt: skip
    return table(header, [[cell.replace("-x", "-") for cell in line] for line in lines])


def summary_table(rows: list[dict]) -> str:
    """Ours, by operation and rows: over all layers and ranks the median and the worst case."""
    groups = {}
    for r in rows:
        if r["provider"] == OURS and r["seconds"]:
            groups.setdefault((r["operation"], _rows(r), "forward + backward" if r["backward"] else "forward"), []).append(r)
    lines = []
    for key, group in groups.items():
        cells = []
        for name, worst in (("share_of_roof", min), ("over_eager", min), ("of_base", max), (PEAK, max), ("error", max)):
            values = [r[name] for r in group if r[name] is not None]
            cells.append(f"{quartiles(values)[0]:.2f} ({worst(values):.2f})" if values else "-")
        lines.append([*key, str(len(group)), *cells])
    return table(["ours: median (worst)", "rows", "pass", "cases", "share of roof", "speed over eager", "time of base alone", PEAK, "error / eager's"], lines)


COUNTS_NOTE = """Counts, not measurements. MB: every input read once, every output written once. Times: the longer of these bytes and
operations at the vendors' datasheet rates ({rates}), which no program reaches.""".format(
    rates=", ".join(f"{g.name} {g.bandwidth / 1e12:g} TB/s, {g.matmul / 1e12:g} TFLOP/s" for g in DATASHEETS)
)
PLANS_NOTE = """Counts, not measurements. Requested: what programs load and store, before any cache, and its ratio to the least. Left in
between: what one launch writes for the next. Programs: of each launch in turn. Steps of K: tiles along K that the launches take one after
the other. In bold: what the package launches."""
MEASURED_NOTE = """Medians over rounds of one CUDA graph per competitor, all in turn, each call on another copy of its inputs; "in L2": all copies
together fit there. Where a graph cannot hold a competitor (the boolean gather waits for the GPU) its launches from Python are part of its time.
Over eager and of base: medians of ratios within a round. {eager}: base product, adapter on all rows, times the gate. {base}: no adapter,
SwiGLU behind it where there is one; its error is against itself. Backward: gradients of the input, A and B, or of the hidden states.
{peak}: what a call allocates at its height beyond its inputs, in a run that is not timed. Where any of several tokens is right, the error is
what the chosen one's logit lacks of the largest."""


def markdown(values: dict, short: bool = False) -> str:
    """short: without the tables that have a line per case."""
    where, settings, rows = values["environment"], values["settings"], values["rows"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items() if version and name in ("torch", "triton"))
    driver = f", driver {where['driver']}" if where.get("driver") else ""
    parts = [f"# Kernel benchmarks\n\n{where['device']}{driver}, {settings['dtype']}, {versions}, commit {where['commit']}, {where['date']}."]
    parts += values["notes"]
    if values["measured"]:
        roofs = values["roofs"]
        reached = f"copy {roofs['bandwidth'] / 1e12:.2f} TB/s, matrix product {roofs['matmul'] / 1e12:.0f} TFLOP/s"
        parts += [f"## Measured\n\nThis GPU's roofs, measured: {reached}.", summary_table(rows)]
        if not short:
            parts += [MEASURED_NOTE.format(eager=EAGER, base=BASE, peak=PEAK), measured_table(rows)]
    if not (short and values["measured"]):
        parts += [f"## Counted\n\n{COUNTS_NOTE}", counts_table(values["counts"])]
        if values["plans"]:
            parts += [f"## The plans of gated LoRA\n\n{PLANS_NOTE}", plans_table(values["plans"])]
    if not values["measured"]:
        parts += ["## Checked at toy size\n\nAgainst float64; right: at most twice eager's error and a rounding step.", checks_summary(rows)]
    bad = [r for r in rows if r["status"] not in ("ok", "skipped")]
    if bad:
        parts += ["## Not counted\n\nThese rows are wrong, failed, or were not reached.", checks_table(bad)]
    good = sum(r["status"] == "ok" for r in rows)
    parts.append(f"{good} of {len(rows)} rows right, {len(bad)} not, {len(rows) - good - len(bad)} skipped.")
    return "\n\n".join(parts)


def write(values: dict, out: Path) -> list[Path]:
    """kernels.md, kernels.csv, counts.csv, plans.csv, and kernels.png where there is something measured and matplotlib."""
    written = [out / "kernels.md"]
    written[0].write_text(markdown(values) + "\n", encoding="utf-8")
    for name, rows in (("kernels", values["rows"]), ("counts", values["counts"]), ("plans", values["plans"])):
        if rows:
            written.append(out / f"{name}.csv")
            with written[-1].open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
    if plot(values, out / "kernels.png"):
        written.append(out / "kernels.png")
    return written
