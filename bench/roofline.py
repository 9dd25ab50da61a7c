"""The roofline picture: what each case reached, under what this GPU's memory and matrix units were measured to reach."""

from pathlib import Path

MARKS = {"ours": ("o", "tab:blue"), "eager": ("x", "tab:orange"), "base alone": ("+", "tab:green")}


def plot(values: dict, path: Path) -> bool:
    """Draw the measured rows; False if there are none, or no matplotlib."""
    measured = [r for r in values["rows"] if r["seconds"]]
    if not values["roofs"] or not measured:
        return False
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    operations = list(dict.fromkeys(r["operation"] for r in measured))
    columns = min(4, len(operations))
    lines = -(-len(operations) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.2 * columns, 4 * lines), sharey=True, squeeze=False)
    bandwidth, matmul = values["roofs"]["bandwidth"], values["roofs"]["matmul"]
    for axis, operation in zip(axes.flat, operations, strict=False):
        chosen = [r for r in measured if r["operation"] == operation]
        intensities = [r["operations"] / r["bytes"] for r in chosen]
        span = [min(intensities) / 2, max(*intensities, 1.2 * matmul / bandwidth)]
        ridge = sorted([*span, matmul / bandwidth])
        axis.plot(ridge, [min(x * bandwidth, matmul) / 1e12 for x in ridge], color="grey", linewidth=1)
        for provider, (mark, colour) in MARKS.items():
            points = [(r["operations"] / r["bytes"], r["operations"] / r["seconds"] / 1e12) for r in chosen if r["provider"] == provider]
            if points:
                axis.plot(*zip(*points, strict=True), mark, color=colour, label=provider, markersize=4, linestyle="none", alpha=0.7)
        axis.set(xscale="log", yscale="log", xlabel="FLOP per byte", title=operation)
        axis.grid(alpha=0.3)
        axis.legend()
    for axis in axes.flat[len(operations) :]:
        axis.set_axis_off()
    for line in axes:
        line[0].set_ylabel("TFLOP/s")
    figure.suptitle(f"{values['environment']['device']}, {values['settings']['dtype']}; line: measured roofs", fontsize=10)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True
