"""What is drawn from which logs, value for value; and what is said of logs that cannot be drawn."""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from mtp_model import plot
from mtp_model.plot import number, read_records, read_runs, smoothed, unique_names


def training(step, sampler=True, k=3, **changes):
    """A record of which every value is another function of the step."""
    record = {"step": step, "loss": 9 - step / 10, "ntp": 1.5, "base": 4 - step / 20, "sampler": 5 - step / 20 if sampler else math.nan, "lcm": 1 / step}
    record |= {"right_base": [step / 100 / j for j in range(1, k + 1)], "right_sampler": [step / 50 / j for j in range(1, k + 1)] if sampler else []}
    return record | {"lr": 1e-4 * step, "grad_norm": 2.0 + step, "mask_rows": 100 * step, "seconds": 0.5 * step, "unheard_of": {"a": 1}} | changes


def evaluation(step, tokens):
    return {"step": step, "seconds": 0.5 * step, "evaluation": {"tokens_per_step": tokens, "mean_tokens_per_step": tokens + 1, "prompts": 4}}


@pytest.fixture
def log(tmp_path):
    """log(name, records) -> the directory of a run."""

    def write(name, records):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        return tmp_path / name

    return write


@pytest.fixture
def whole(log):
    return log("whole", [training(2), training(4), evaluation(5, 1.5), training(6), training(8), evaluation(8, 1.75), training(10)])


def arguments(*words):
    parser = argparse.ArgumentParser()
    plot.add_arguments(parser)
    return parser.parse_args([str(w) for w in words])


def drawn(*logs, **options):
    """{panel: {label: (x, y)}} and the figure."""
    pytest.importorskip("matplotlib")
    figure = plot.draw(read_runs(list(logs)), **options)
    panels = {a.get_label(): {line.get_label(): line.get_data() for line in a.lines} for a in figure.axes if a.get_label() != "<colorbar>"}
    return panels, figure


def axis(figure, name):
    return next(a for a in figure.axes if a.get_label() == name)


def test_one_run_is_drawn_in_its_parts(whole):
    panels, figure = drawn(whole)
    assert list(panels) == ["loss", "right", "tokens", "lr", "grad_norm"] and figure.get_suptitle() == "whole"
    steps = np.array([2, 4, 6, 8, 10])
    parts = {label.split(":")[0]: data for label, data in panels["loss"].items()}
    expected = {"total loss": 9 - steps / 10, "base": 4 - steps / 20, "sampler": 5 - steps / 20, "ntp": np.full(5, 1.5), "lcm": 1 / steps}
    assert parts.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(parts[name][0], steps)
        np.testing.assert_allclose(parts[name][1], values)
    assert list(panels["right"]) == ["mask 1", "mask 2", "mask 3"]
    for j, (_, shares) in enumerate(panels["right"].values(), 1):
        np.testing.assert_allclose(shares, steps / 50 / j)
    assert [v.tolist() for v in panels["tokens"]["whole"]] == [[5, 8], [1.5, 1.75]]
    np.testing.assert_allclose(panels["lr"]["whole"][1], 1e-4 * steps)
    np.testing.assert_allclose(panels["grad_norm"]["whole"][1], 2 + steps)


def test_labels_colours_and_marks(whole):
    panels, figure = drawn(whole)
    units = {a.get_label(): a.get_ylabel() for a in figure.axes}
    assert (units["loss"], units["right"], units["tokens"]) == ("nats per token", "share of right guesses", "tokens per step")
    assert {a.get_xlabel() for a in figure.axes if a.get_label() in panels} == {"step"}
    assert "sampler" in axis(figure, "right").get_title(loc="left")
    assert [t.get_text() for t in axis(figure, "loss").get_legend().get_texts()] == list(panels["loss"])
    for name in ("loss", "right"):
        assert len({tuple(np.atleast_1d(line.get_color())) for line in axis(figure, name).lines}) == len(panels[name])
    points = next(line for line in axis(figure, "tokens").lines if line.get_label() == "whole")
    assert points.get_marker() == "o"
    bar = next(a for a in figure.axes if a.get_label() == "<colorbar>")
    assert bar.get_yticks().tolist() == [1, 2, 3] and bar.get_ylabel() == "mask"


def test_several_runs_have_a_panel_per_part_and_a_colour_each(whole, log):
    other = log("other", [training(s, sampler=False, k=2) for s in (4, 12)])
    panels, figure = drawn(whole, other)
    assert list(panels) == ["loss", "right", "base", "sampler", "ntp", "lcm", "tokens", "lr", "grad_norm"]
    assert list(panels["base"]) == ["whole", "other"]
    assert list(panels["sampler"]) == ["whole"] and list(panels["tokens"]) == ["whole", "_one"]
    np.testing.assert_allclose(panels["loss"]["other"], [[4, 12], [8.6, 7.8]])
    # the one without a sampler by its base head: the mean of two masks, and the first
    np.testing.assert_allclose(panels["right"]["other"][1], np.array([4, 12]) / 100 * (1 + 1 / 2) / 2)
    np.testing.assert_allclose(panels["right"]["other, mask 1"][1], [0.04, 0.12])
    np.testing.assert_allclose(panels["right"]["whole"][1], np.array([2, 4, 6, 8, 10]) / 50 * (1 + 1 / 2 + 1 / 3) / 3)
    assert "base head" in axis(figure, "right").get_title(loc="left")
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["whole", "other"]
    keys = [line.get_color() for line in figure.legends[0].get_lines()]
    assert len(set(keys)) == 2
    for a in figure.axes:
        for line in a.lines:
            if line.get_label() != "_one":
                assert line.get_color() == keys[line.get_label().startswith("other")]


def test_many_runs_still_have_a_colour_each(log):
    _, figure = drawn(*(log(f"run{i}", [training(1), training(2)]) for i in range(9)))
    assert len({tuple(np.atleast_1d(line.get_color())) for line in axis(figure, "base").lines}) == 9


def test_what_no_run_has_gets_no_panel(log):
    bare = {"step": 1, "loss": 3.0, "sampler": math.nan, "base": "?", "grad_norm": math.inf, "right_sampler": []}
    panels, figure = drawn(log("bare", [bare, {"step": 2, "loss": None}]))
    assert list(panels) == ["loss"] and list(panels["loss"]) == ["total loss"]
    assert [v.tolist() for v in panels["loss"]["total loss"]] == [[1], [3.0]]
    assert axis(figure, "loss").lines[0].get_marker() == "o"  # a line of one point is not seen
    panels, _ = drawn(log("evaluated", [evaluation(3, 2.0)]))
    assert list(panels) == ["tokens"]


def test_a_mask_without_rows_leaves_the_others(log):
    """The share of a mask that no row had is nan in the log."""
    records = [training(10, right_sampler=[0.5, math.nan, 0.1]), training(20)]
    panels, _ = drawn(log("one", records))
    assert panels["right"]["mask 2"][0].tolist() == [20] and panels["right"]["mask 3"][0].tolist() == [10, 20]
    panels, _ = drawn(log("one", records), log("two", records))
    assert panels["right"]["two"][1][0] == pytest.approx(0.3)


@pytest.mark.parametrize("field, scale", [("step", 1), ("seconds", 0.5), ("mask_rows", 100)])
def test_x(whole, field, scale):
    panels, figure = drawn(whole, x=field)
    np.testing.assert_allclose(panels["loss"]["total loss"][0], scale * np.array([2, 4, 6, 8, 10]))
    np.testing.assert_allclose(panels["tokens"]["whole"][0], scale * np.array([5, 8]))  # mask rows: by the step, between those of 4 and 6
    assert axis(figure, "loss").get_xlabel() == plot.X_LABELS[field]
    assert len({a.get_xlim() for a in figure.axes if a.get_label() in panels}) == 1


def test_an_evaluation_before_the_first_training_record(log):
    panels, _ = drawn(log("run", [evaluation(0, 1.25), evaluation(1, 1.5), training(4)]), x="mask_rows")
    assert [v.tolist() for v in panels["tokens"]["run"]] == [[0, 100], [1.25, 1.5]]


def test_smoothing_is_a_centred_mean():
    values = np.array([1.0, 5.0, 3.0, 7.0, 2.0])
    np.testing.assert_allclose(smoothed(values, 1), values)
    np.testing.assert_allclose(smoothed(values, 3), [3, 3, 5, 4, 4.5])
    np.testing.assert_allclose(smoothed(values, 2), smoothed(values, 3))
    np.testing.assert_allclose(smoothed(values, 99), [3.6] * 5)
    assert smoothed(np.array([]), 3).size == 0


def test_the_raw_curve_lies_pale_beneath_the_smoothed_one(log):
    values = [1.0, 5.0, math.nan, 3.0, 7.0]  # a record without a value is not in the mean
    _, figure = drawn(log("run", [{"step": s, "loss": v, "lr": v} for s, v in enumerate(values)]), smooth=3)
    raw, smooth = axis(figure, "loss").lines
    assert raw.get_ydata().tolist() == [1, 5, 3, 7] and raw.get_alpha() < 0.5 and raw.get_zorder() < smooth.get_zorder()
    assert smooth.get_ydata().tolist() == [3, 3, 5, 5] and smooth.get_xdata().tolist() == [0, 1, 3, 4]
    assert [t.get_text() for t in axis(figure, "loss").get_legend().get_texts()] == ["total loss"]
    assert [line.get_ydata().tolist() for line in axis(figure, "lr").lines] == [[1, 5, 3, 7]]  # known exactly, and never smoothed


@pytest.mark.parametrize("paths, names", [
    (["/r/a", "/r/b"], ["a", "b"]), (["/x/a", "/y/a", "/y/b"], ["x/a", "y/a", "b"]),
    (["/a", "/a/a"], ["/a", "a/a"]), (["/x/1/a", "/y/1/a", "/x/2/a"], ["x/1/a", "y/1/a", "2/a"]),
])  # fmt: skip
def test_names_are_as_short_as_they_can_be(paths, names):
    assert unique_names([Path(p) for p in paths]) == names


def test_a_log_is_named_by_its_directory_and_read_once(whole, monkeypatch):
    monkeypatch.chdir(whole)
    (whole / "older.jsonl").write_text('{"step": 1, "loss": 2}\n')
    runs = read_runs([Path("."), whole / "log.jsonl", Path("older.jsonl"), whole])
    assert [(r.name, len(r.training), len(r.evaluations)) for r in runs] == [("whole", 5, 2), ("older.jsonl", 1, 0)]


@pytest.mark.parametrize("end", ['{"step": 9', '{"step": 9\n', "12", ""])
def test_the_last_line_may_be_cut_off(tmp_path, end):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n\n{"step": 2}\n' + end)
    assert [r["step"] for r in read_records(tmp_path / "log.jsonl")] == [1, 2]


@pytest.mark.parametrize("text, message", [
    ('{"step": 1}\n{"step": 2\n{"step": 3}\n', r"log\.jsonl, line 2 is '\{\"step\": 2'; accepted is a JSON object per line"),
    ('{"step": 1}\n\n[3]\n{"step": 3}\n', r"line 3 is '\[3\]'"),
    ("", "with no records; accepted is"), ("\n \n", "with no records"), ('{"step": ', "with no records"),
])  # fmt: skip
def test_a_log_that_cannot_be_read(tmp_path, text, message):
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_runs([tmp_path])


@pytest.mark.parametrize("name", ["absent", "absent.jsonl", "."])
def test_no_such_file(tmp_path, name):
    with pytest.raises(ValueError, match=r"no such file; accepted is a log\.jsonl, or the directory"):
        read_runs([tmp_path / name])


def test_nothing_to_draw(whole, log):
    pytest.importorskip("matplotlib")
    untimed = log("untimed", [{"step": 1, "loss": 2.0}])
    with pytest.raises(ValueError, match="log is that of untimed, without seconds in any record; accepted is"):
        plot.draw(read_runs([whole, untimed]), "seconds")
    with pytest.raises(ValueError, match="log is that of empty, without a value to draw; accepted is"):
        plot.draw(read_runs([log("empty", [{"step": 1}])]))


def test_numbers():
    assert (number(3), number(2.5)) == (3, 2.5)
    assert all(math.isnan(number(v)) for v in (None, "1", math.inf, math.nan, [1]))


def test_the_command(whole, log, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert plot.run(arguments(whole)) == 0
    assert capsys.readouterr().out == f"{whole / 'curves.png'}\n" and (whole / "curves.png").read_bytes().startswith(b"\x89PNG")
    other = log("other", [training(s) for s in range(1, 30)])
    out = tmp_path / "new" / "two.svg"
    assert plot.run(arguments(other / "log.jsonl", whole, "--out", out, "--smooth", 5, "--x", "seconds")) == 0
    assert "<svg" in out.read_text() and not (other / "curves.png").exists()
    small = log("small", [{"step": 1, "loss": 2.0}])
    assert plot.run(arguments(small / "log.jsonl")) == 0 and (small / "curves.png").exists()


@pytest.mark.parametrize("name", ["curves.txt", "curves"])
def test_out_of_an_unknown_kind(whole, tmp_path, name):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match=rf"out is .*{name}; accepted are the suffixes .*\.pdf.*\.png"):
        plot.run(arguments(whole, "--out", tmp_path / name))
    assert not (tmp_path / name).exists()


def test_wrong_smoothing(whole):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="smooth is 0; accepted is 1 or more"):
        plot.run(arguments(whole, "--smooth", 0))


def test_without_matplotlib(whole, monkeypatch):
    for name in {"matplotlib", *(m for m in sys.modules if m.startswith("matplotlib."))}:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError) as error:
        plot.run(arguments(whole))
    assert str(error.value) == "python -m mtp_model plot needs matplotlib: pip install matplotlib"
    assert not (whole / "curves.png").exists()
