"""What benchmarks share: where they ran, how much memory they took, and how a table is printed."""

import json
import platform
import resource
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from mtp_model.demo import BASE


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The checkout's commit, with "+changes" if files differ from it; None outside a checkout."""
    root = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=root, capture_output=True, text=True)
    except OSError:
        return None
    return head.stdout.strip() + ("+changes" if dirty.stdout.strip() else "") if head.returncode == 0 else None


def shown(value):
    """A setting as it is written down: what ships with the package is named relative to it, other files by their name alone."""
    if isinstance(value, Path):
        return value.relative_to(BASE.parents[2]).as_posix() if value.is_relative_to(BASE.parents[2]) else value.name
    return [shown(v) for v in value] if isinstance(value, (list, tuple)) else value


def environment(device: torch.device) -> dict:
    """Date, commit, hardware and versions."""
    versions = {}
    for package in ("torch", "triton", "transformers", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "cpu_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
    }


class PeakMemory:
    """Highest memory in use between `with` and its end, in MiB: allocated on a GPU, resident on a CPU. before_mib: what was in use at `with`.

    Where the system cannot reset the resident peak (not Linux) it is the process's peak so far.
    """

    def __init__(self, device: torch.device):
        self.device, self.mib, self.before_mib = device, 0.0, 0.0

    def __enter__(self):
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before_mib = torch.cuda.memory_allocated(self.device) / 2**20
        else:
            try:
                Path("/proc/self/clear_refs").write_text("5")
            except OSError:
                pass
            self.before_mib = self._resident("VmRSS")
        return self

    def __exit__(self, *_):
        if self.device.type == "cuda":
            self.mib = torch.cuda.max_memory_allocated(self.device) / 2**20
            return
        self.mib = self._resident("VmHWM")

    @staticmethod
    def _resident(entry: str) -> float:
        try:
            return int(Path("/proc/self/status").read_text().split(f"{entry}:")[1].split()[0]) / 1024
        except (OSError, IndexError):
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Median, 25th and 75th percentile."""
    q = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.5, 0.25, 0.75], dtype=torch.float64))
    return tuple(q.tolist())


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with aligned columns; the first column left, the others right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells):
        return "| " + " | ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))) + " |"

    rule = "|" + "|".join(("-" * (w + 2)) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])


def write_json(path: Path, values: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
