"""What `bench.decode --shape` measures, as rows, and how they are written down: JSON and Markdown."""

from dataclasses import asdict, dataclass, field

from bench.prescribed import PARTS
from bench.report import table
from bench.timing import percentiles


@dataclass
class Row:
    """One way of writing the text. k 0: no masks; wrong: the prescribed chance that a draft is wrong; an entry of seconds for each repeat."""

    name: str
    k: int = 0
    wrong: float | None = None
    ours: bool = True
    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    passes: int = 0
    same: int = 0
    compared: int = 0
    peak_mib: float = 0.0


@dataclass
class Step:
    """A step's time by part and in all, an entry for each round, and the bytes that it must read."""

    name: str
    k: int
    bytes: dict[str, int]
    peak_mib: float = 0.0
    seconds: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in (*PARTS, "step")})


@dataclass
class Setting:
    """What was measured of one shape, batch and context. left_out: what was not, and why. distinct: tokens of a recorded text that differ."""

    shape: str
    batch: int
    context: int
    steps: list[Step] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    distinct: int = 0


def speedup(base: Row, row: Row) -> tuple[float, float, float] | None:
    """Median and 20th and 80th percentile of the ratio of tokens per second in the same repeat; every row writes as many tokens."""
    ratios = [a / b for a, b in zip(base.seconds, row.seconds, strict=False)]  # an interrupted repeat has not all of them
    return percentiles(ratios) if ratios else None


def spread(values: tuple[float, float, float] | None, unit: str = "") -> str:
    return "{:.3g}{u} ({:.3g} to {:.3g})".format(*values, u=unit) if values else "-"


def label(name: str, k: int) -> str:
    return f"{name}, k = {k}" if k else name


def record(setting: Setting, bandwidth: float | None) -> dict:
    """A setting as it is written down: what was measured, and medians, shares and ratios of it."""
    values = asdict(setting)
    for step, kept in zip(setting.steps, values["steps"], strict=True):
        medians = {part: percentiles(seconds) for part, seconds in step.seconds.items() if seconds}
        least = sum(step.bytes.values()) / bandwidth if bandwidth else None
        kept |= {"medians": medians, "share_of_memory_roof": least / medians["step"][0] if least and "step" in medians else None}
    for row, kept in zip(setting.rows, values["rows"], strict=True):
        kept["prescribed_wrong"] = kept.pop("wrong")
        kept["tokens_per_step"] = row.tokens / row.passes if row.passes else None
        kept["tokens_per_second"] = row.tokens / sum(row.seconds) if row.seconds else None
        kept["speedup"] = speedup(setting.rows[0], row)
    return values


def report(setting: dict) -> str:
    """Two tables in Markdown, and what was left out."""
    steps, texts = [], []
    for step in setting["steps"]:
        medians = {part: [1e3 * s for s in seconds] for part, seconds in step["medians"].items()}
        cells = [label(step["name"], step["k"]), spread(medians.get("step"))]
        cells += [spread(medians.get(part)) if part != "draft" or step["k"] else "-" for part in PARTS]
        share = step["share_of_memory_roof"]
        steps.append([*cells, f"{sum(step['bytes'].values()) / 1e9:.3g}", f"{share:.0%}" if share else "-", f"{step['peak_mib']:.0f}"])
    for row in setting["rows"]:
        wrong = f"{row['prescribed_wrong']:.0%}" if row["k"] else "-"
        each, rate = (f"{row[name]:{digits}}" if row[name] else "-" for name, digits in (("tokens_per_step", ".2f"), ("tokens_per_second", ".0f")))
        same = f"{row['same']} of {row['compared']}"
        texts.append([label(row["name"], row["k"]), wrong, each, rate, spread(row["speedup"], "x"), same, f"{row['peak_mib']:.0f}"])
    out = [f"### {setting['shape']}, random weights, batch {setting['batch']}, context {setting['context']}"]
    out.append(table(["ms (20 to 80 %)", "step", *PARTS, "GB to read", "share of memory roof", "peak MiB"], steps))
    header = ["text", "drafts wrong, prescribed", "tokens per step", "tokens/s", "speedup over autoregressive", "same text", "peak MiB"]
    out.append(table(header, texts))
    out += [f"Left out: {what}: {reason}." for what, reason in setting["left_out"].items()]
    return "\n\n".join(out)


LEGEND = """Acceptance is prescribed, not the model's: a draft is the recorded text's token, or with the given chance another one.
Speedup: of tokens per second, over the first row (ours, captured on a GPU), measured; 20 to 80 % of the repeats' ratios.
GB to read: matrices and the context's keys and values; share: of a large copy's bytes per second on this GPU.
Texts are timed from their first token on. Peak: of the whole process, with the other rows' cache and, on a GPU, when a step is captured."""
