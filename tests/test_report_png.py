"""The report's pictures: what is drawn, and where the legend stands."""

import pytest
from test_report import made_run

from grpo_core.report import png
from grpo_core.report.panels import choose_panels
from grpo_core.report.report import write_report
from grpo_core.report.run_reader import read_run

pytest.importorskip("matplotlib")


def test_pictures(tmp_path):
    first, second = made_run(tmp_path / "a"), made_run(tmp_path / "$b")
    written = write_report([first, second], tmp_path / "r.html", png=True)
    pictures = [path for path in written if path.suffix == ".png"]
    assert {"r-accuracy.png", "r-reward.png", "r-time-0.png", "r-time-1.png"} <= {path.name for path in pictures}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    assert "![Reward](r-reward.png)" in (tmp_path / "r.md").read_text()


def figures(*runs):
    """Each panel's figure, laid out."""
    read = [read_run(run) for run in runs]
    for panel, metrics in choose_panels(read):
        figure = png._draw_figure(panel, metrics, read[:1] if panel.kind == "stack" else read, panel.title)
        figure.draw_without_rendering()
        yield panel, figure


def test_a_legend_covers_nothing_and_is_inside(tmp_path):
    runs = [made_run(tmp_path / f"a-run-with-a-name-of-some-length-and-then-some-more-of-it-{i}") for i in range(3)]
    for some in (runs[:1], runs):
        legends = []
        for panel, figure in figures(*some):
            for legend in figure.legends:
                legends.append(panel.id)
                inner, box = figure.axes[0].get_tightbbox(), legend.get_window_extent()
                assert not inner.overlaps(box), panel.id
                assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1, panel.id
            assert figure.axes[0].get_legend() is None
            assert figure.axes[0].bbox.height > 0.5 * png.FIGURE_SIZE[1] * figure.dpi, panel.id
        assert {"time", "length"} <= set(legends) and ("reward" in legends) == (len(some) > 1)


def test_pictures_show_a_run_of_one_step(tmp_path):
    one, long = made_run(tmp_path / "one", steps=1), made_run(tmp_path / "long")
    for panel, figure in figures(one, long):
        (axes,) = figure.axes
        if panel.kind == "stack":
            heights = [bar.get_height() for bar in axes.patches]
            assert heights == [1.0, 1.5, 0.5] and axes.get_legend_handles_labels()[1] == ["sample", "update", "other"]
            assert axes.patches[2].get_y() == 2.5
        elif panel.kind == "line":
            short = [line for line in axes.lines if len(line.get_xdata()) == 1]
            assert short and all(line.get_marker() == "o" and line.get_markevery() == [0] for line in short), panel.id
            dotted = [line.get_markevery() for line in axes.lines if line not in short and line.get_marker() == "o"]
            assert dotted == [], panel.id


def test_points_without_a_neighbour():
    assert png._isolated_points([1, None, 2, 3, None, 4]) == [0, 5] and png._isolated_points([None]) == []


def test_attack_3_no_two_runs_look_the_same(tmp_path):
    runs = [made_run(tmp_path / f"r{i}", steps=2) for i in range(12)]
    looks = {panel.id: [(x.get_color(), x.get_linestyle()) for x in figure.axes[0].lines] for panel, figure in figures(*runs)}
    assert len(looks["entropy"]) == len(set(looks["entropy"])) == 12
