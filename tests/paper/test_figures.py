"""Figures of experiments: their numbers are comparison's, their bytes depend on the study alone,
nothing is cut off or hidden."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import test_comparison

from gain_cl.measure import diagnosis, record
from gain_cl.paper.figures import ages, curves, forest, fronts, gains, margins, style
from gain_cl.stats.matrix import Estimate
from gain_cl.studies.experiments import Experiment, load_experiment, planned_runs
from gain_cl.studies.study import (
    Study,
    difference,
    level,
    studies_of,
    study_of_runs,
)
from gain_cl.system.files import sha256

EVERY = [curves, fronts, forest, ages, margins]
EIGHT = ["medicine", "law", "code", "maths", "news", "science", "politics", "scripture"]
METHODS = [
    "gain_ffn",
    "gain_attn",
    "ia3",
    "lora",
    "lora_same_modules",
    "multiplicative_lora",
    "full_small_lr",
    "ewc",
]


def drawn(module: ModuleType, study: Study) -> Any:
    figure = module.build(study)
    assert figure is not None
    return figure


@pytest.fixture(scope="module")
def pilot() -> Study:
    experiment = load_experiment("pilot")
    return next(iter(studies_of(experiment, planned_runs(experiment, [])).values()))


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Three blocks of two methods with two settings; a task; gains of the method gain."""
    results = tmp_path_factory.mktemp("results")
    study = test_comparison.a_study(
        results / "runs", test_comparison.an_experiment(test_comparison.FOUR, blocks=3), tasks=True
    )
    for k, run in enumerate(study.chosen["gain"].runs.values()):
        diagnosis.save_diagnosis(diagnosed(run, 0.01 * (k + 1)), results)
    return study


def results_of(study: Study) -> Path:
    return next(iter(study.settings[0].runs.values())).path.parents[1]


def diagnosed(run: record.Run, drift: float, layers: int = 30) -> diagnosis.Diagnostics:
    """Gains of two roles, of which one half lies just above 1 and the other far below."""
    bins = len(diagnosis.EDGES) + 1
    found = []
    for role, block in itertools.product(("self_attn.o_proj", "mlp.down_proj"), range(layers)):
        counts = [0] * bins
        counts[bins // 2 + block % 5], counts[4] = 32, 32
        of = diagnosis.Gains(
            side="input",
            drift=drift * (1 + block),
            rms=0.1,
            least=0.9,
            largest=1.1,
            counts=counts,
            heads=None,
        )
        shape: dict[str, Any] = {
            "name": f"{block}.{role}",
            "role": role,
            "block": block,
            "shape": (64, 64),
            "norm": 1.0,
            "relative": 0.1,
        }
        nothing: dict[str, Any] = dict.fromkeys(
            ("residual", "own", "intruders", "cosines", "heads")
        )
        found.append(diagnosis.Layer(**shape, **nothing, gains=of))
    last = len(run.record.stages) - 1
    rest: dict[str, Any] = {
        "others": [],
        "residual": {},
        "chance": {},
        "own": {},
        "intruders": None,
        "analysed": 0,
        "seconds": 1.0,
    }
    rest |= {
        "kl": None,
        "kl_new": None,
        "kl_controls": None,
        "layers": found,
        "total_norm": 1.0,
        "total_relative": 0.1,
    }
    settings: dict[str, Any] = {
        "directions": [8],
        "top": 10,
        "threshold": 0.5,
        "edges": list(diagnosis.EDGES),
        "not_kept": [],
    }
    return diagnosis.Diagnostics(
        run_id=run.record.run_id,
        record_sha256=sha256(run.path),
        method=run.record.method,
        model=run.record.model,
        dtype="float32",
        protocol=run.record.protocol,
        last=last,
        stages=[diagnosis.Stage(index=last, domain=run.record.trained[-1], **rest)],
        **settings,
        estimate_seconds=1.0,
        seconds=1.0,
        peak_bytes=1,
        device="cpu",
        threads=1,
    )


# --- nothing is cut off or hidden -----------------------------------------------------------------


def texts(figure: Any) -> Iterator[Any]:
    """What is written on a figure; of tick labels those in view."""
    yield from figure.texts
    for legend in figure.legends:
        yield from legend.get_texts()
    for axes in figure.axes:
        yield from (axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label, *axes.texts)
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            yield from (
                tick.label1
                for tick in axis.get_major_ticks(len(axis.get_ticklocs()))
                if low <= tick.get_loc() <= high
            )


def legible(figure: Any) -> None:
    """No text outside the figure, none over another, none smaller than 6 points."""
    with style.rules():
        figure.draw_without_rendering()
    shown = [t for t in texts(figure) if t.get_visible() and t.get_text().strip()]
    boxes = [t.get_window_extent() for t in shown]
    for text, box in zip(shown, boxes, strict=True):
        inside = (
            box.x0 > -0.5
            and box.y0 > -0.5
            and box.x1 < figure.bbox.x1 + 0.5
            and box.y1 < figure.bbox.y1 + 0.5
        )
        assert inside, f"{text.get_text()!r} is cut off"
        assert text.get_fontsize() >= 6
    for (a, one), (b, two) in itertools.combinations(zip(shown, boxes, strict=True), 2):
        apart = (
            one.x1 <= two.x0 + 1
            or two.x1 <= one.x0 + 1
            or one.y1 <= two.y0 + 1
            or two.y1 <= one.y0 + 1
        )
        assert apart, f"{a.get_text()!r} and {b.get_text()!r} overlap"


def of_size(
    path: Path, domains: list[str], methods: list[str], monkeypatch: pytest.MonkeyPatch
) -> Study:
    monkeypatch.setattr(test_comparison, "DOMAINS", domains)
    grid = {m: {"train.lr": [1e-3]} for m in methods}
    plain = {"name": "e", "question": "?", "methods": grid, "reference": methods[-1]}
    line = {m: {1e-3: (0.1 + 0.02 * i, 0.03 * i)} for i, m in enumerate(methods)}
    return test_comparison.a_study(path, Experiment.model_validate(plain), line, tasks=True)


@pytest.mark.parametrize(
    ("domains", "methods"), [(EIGHT, METHODS), (["a", "b"], ["gain", "lora"])], ids=["8x8", "2x2"]
)
def test_nothing_is_cut_off_whatever_the_size(
    domains: list[str], methods: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = of_size(tmp_path, domains, methods, monkeypatch)
    for module in EVERY:
        legible(drawn(module, study))


def test_the_pilot_is_legible(pilot: Study) -> None:
    for module in (curves, fronts, forest, ages):
        figure = drawn(module, pilot)
        assert figure.get_figwidth() in (style.SINGLE, style.DOUBLE)
        legible(figure)
    assert margins.build(pilot) is None and gains.build(pilot) is None


def test_several_blocks_are_legible(three: Study) -> None:
    for module in EVERY:
        legible(drawn(module, three))
    figure = gains.build(three)
    assert figure is not None
    legible(figure)


def test_captions_are_a_line() -> None:
    for module in [*EVERY, gains]:
        assert (
            "\n" not in module.CAPTION
            and "interval" in module.CAPTION
            and ("%" in module.CAPTION or "nats" in module.CAPTION)
        )


def test_names_are_broken_and_not_read_as_formulas() -> None:
    assert style.name("lora_same_modules lr=0.001", 22) == "lora_same_modules\nlr=0.001"
    assert style.name("a_very_long_name_of_a_method", 10) == "a_very_\nlong_name_\nof_a_\nmethod"
    assert style.name("x" * 25, 10) == "x" * 10 + "\n" + "x" * 10 + "\n" + "x" * 5
    with style.rules():
        assert not style.panels([""], 2)[0].text(0, 0, "$x$").get_parse_math()


def test_ticks_are_round_and_apart() -> None:
    assert style.ticks_percent((-22.0, 13.0)) == [-20, -10, 0, 10]
    assert style.ticks_percent((-22.0, 13.0), most=8) == [-20, -15, -10, -5, 0, 5, 10]
    for low, high in ((-99.5, 3000.0), (-40.0, 39.0), (-1.0, 1e6), (-0.03, 0.02)):
        ticks = style.ticks_percent((low, high))
        assert 2 < len(ticks) <= 9 and 0 in ticks and low <= ticks[0] and ticks[-1] <= high
    assert [style.signed(x) for x in (-2.5, 0.0, 10.0, 3e6)] == ["−2.5", "0", "+10", "+3e6"]


def test_methods_look_different(pilot: Study) -> None:
    looks = [style.look(pilot, m) for m in pilot.methods]
    assert len({look["marker"] for look in looks}) == len(looks) == 9
    assert len({(look["color"], str(look["linestyle"])) for look in looks}) == 9


# --- numbers --------------------------------------------------------------------------------------


def line_of(axes: Any, label: str) -> dict[float, float]:
    lines = [x for x in axes.lines if x.get_label() == label]
    return {x: y for line in lines for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)}


def bars(container: Any, axis: int) -> list[tuple[float, float]]:
    """Low and high of each interval; nothing where there is none."""
    return [
        tuple(sorted(segment[:, axis]))
        for segment in container.lines[2][0].get_segments()
        if len(segment)
    ]


@pytest.mark.parametrize("name", ["pilot", "three"])
def test_curves_are_means_of_losses_by_stages_since_learned(
    name: str, request: pytest.FixtureRequest
) -> None:
    study = request.getfixturevalue(name)
    figure = drawn(curves, study)
    for axes, domain in zip(figure.axes, study.blocks[0][1], strict=False):
        assert axes.get_title() == domain
        for s in study.chosen.values():
            by_hand: dict[int, list[float]] = {}
            for run in s.runs.values():
                j = run.record.trained.index(domain)
                for t, row in enumerate(run.record.losses()):
                    by_hand.setdefault(t - j - 1, []).append(row[j] - run.record.losses()[0, j])
            line = line_of(axes, s.label)
            everywhere = {x: y for x, y in by_hand.items() if len(y) == len(s.runs)}
            assert line == pytest.approx({x: np.mean(y) for x, y in everywhere.items()}, abs=1e-9)
    controls = [
        np.mean(run.record.losses()[:, len(run.record.trained) :], axis=1)
        for run in s.runs.values()
    ]
    expected = np.mean([c - c[0] for c in controls], axis=0)
    assert list(line_of(figure.axes[-1], s.label).values()) == pytest.approx(expected, abs=1e-9)
    pale = [x for x in figure.axes[-1].lines if x.get_alpha() == 0.25]
    assert len(pale) == (len(study.blocks) * len(study.chosen) if len(study.blocks) > 1 else 0)


def test_a_mean_is_of_all_blocks() -> None:
    """Three blocks that never rise: their mean, over whoever is there, would."""
    falling = [{-1: -0.1, 0: -0.2, 1: -0.3}, {0: -0.5, 1: -0.6}, {1: 0.0, 2: -0.1}]
    assert curves.mean(falling) == {1: pytest.approx(-0.3)}
    assert curves.mean(falling[:1]) == falling[0] and curves.mean([]) == {}


def test_a_partial_figure_says_so(three: Study) -> None:
    figure = drawn(forest, three)
    before = style.written(figure, "png")
    style.partial(figure, 2)
    assert [t.get_text() for t in figure.texts if t.get_gid() == "partial"] == [
        "PARTIAL: 2 gaps"
    ] and style.written(figure, "png") != before


@pytest.mark.parametrize("name", ["pilot", "three"])
def test_fronts_are_levels(name: str, request: pytest.FixtureRequest) -> None:
    study = request.getfixturevalue(name)
    (axes,) = drawn(fronts, study).axes
    marks = {x.get_gid(): x for x in axes.lines if x.get_gid() not in (None, "skill")}
    upright, lying = ([c for c in axes.containers if getattr(c, f"has_{k}err")] for k in "yx")
    assert set(marks) == {s.label for s in study.settings} and len(upright) == len(lying) == len(
        marks
    )
    for s in study.settings:
        own, back = level(s, "own_step"), level(s, "backward")
        assert own is not None and back is not None
        at = (marks[s.label].get_xdata()[0], marks[s.label].get_ydata()[0])
        assert at == pytest.approx((own.estimate.value, back.estimate.value))
        assert (marks[s.label].get_markerfacecolor() != style.PAPER) == (
            study.chosen[s.method] is s
        )
        expected = [(c.estimate.low, c.estimate.high) for c in (own, back)]
        assert any(bars(c, 0) == [pytest.approx(expected[0])] for c in lying)
        assert any(bars(c, 1) == [pytest.approx(expected[1])] for c in upright)
    for method in study.methods:
        assert list(line_of(axes, method)) == sorted(line_of(axes, method))
    skills = [x.get_xdata()[0] for x in axes.lines if x.get_gid() == "skill"]
    assert skills == ([] if study.skill is None else [pytest.approx(study.skill)])


@pytest.mark.parametrize("name", ["pilot", "three"])
def test_forests_are_paired_differences(name: str, request: pytest.FixtureRequest) -> None:
    study = request.getfixturevalue(name)
    figure, reference = drawn(forest, study), study.chosen[study.reference]
    others = [study.chosen[m] for m in study.methods if m != study.reference]
    assert len(figure.axes) == len(others)
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    for axes, s in zip(figure.axes, others, strict=True):
        found = difference(s, reference, "backward")
        assert found is not None
        mean = axes.containers[-1]
        assert mean.lines[0].get_xdata()[0] == pytest.approx(found.estimate.value)
        assert bars(mean, 0) == [pytest.approx((found.estimate.low, found.estimate.high))]
        for container in axes.containers[:-1]:
            domain = names[int(container.lines[0].get_ydata()[0])]
            values = []
            for block in s.runs:
                k = block[1].index(domain) + 1
                if k < len(block[1]):
                    a, b = (x.runs[block].record.losses()[:, k - 1] for x in (s, reference))
                    values.append((a[-1] - a[k]) - (b[-1] - b[k]))
            assert container.lines[0].get_xdata()[0] == pytest.approx(float(np.mean(values)))
            (low, high), at = bars(container, 0)[0], float(np.mean(values))
            assert low < at < high


def test_a_single_block_of_several_has_no_interval(tmp_path: Path) -> None:
    study = test_comparison.a_study(tmp_path, test_comparison.an_experiment([], blocks=2))
    rows = forest.rows(study, study.chosen["gain"], study.chosen["lora"])
    found = [c.blocks for name, c in rows.items() if name != forest.MEAN]
    assert set(found) == {1, 2}  # a domain is last in one of the two
    assert all(math.isnan(c.estimate.low) == (c.blocks == 1) for c in rows.values())
    legible(drawn(forest, study))


@pytest.mark.parametrize("name", ["pilot", "three"])
def test_ages_are_forgetting_by_age(name: str, request: pytest.FixtureRequest) -> None:
    study = request.getfixturevalue(name)
    (axes,) = drawn(ages, study).axes
    for s, container in zip(study.chosen.values(), axes.containers, strict=True):
        last = len(study.blocks[0][1])
        losses = [run.record.losses() for run in s.runs.values()]
        for age, shown in zip(range(1, last), container.lines[0].get_ydata(), strict=True):
            by_hand = np.mean(
                [
                    np.mean([x[k + age, k - 1] - x[k, k - 1] for k in range(1, last + 1 - age)])
                    for x in losses
                ]
            )
            assert shown == pytest.approx(float(by_hand))
        assert len(bars(container, 1)) == last - 1


def test_margins_are_levels_and_leave_out_blocks_without_the_task(
    three: Study, tmp_path: Path
) -> None:
    (axes,) = drawn(margins, three).axes
    for s, container in zip(three.chosen.values(), axes.containers, strict=True):
        found = level(s, "margin:boolq@50")
        assert found is not None
        base, end = container.lines[0].get_ydata()
        assert end - base == pytest.approx(found.estimate.value)
        assert bars(container, 1) == [
            pytest.approx((base + found.estimate.low, base + found.estimate.high))
        ]
    assert axes.get_title() == "boolq@50, 50 items, 3 of 3 blocks"

    runs = [
        test_comparison.simulated(tmp_path, "gain", 1e-2, k, learn=0.1, forget=0.1, tasks=k == 0)
        for k in range(3)
    ]
    one = study_of_runs(runs)
    assert drawn(margins, one).axes[0].get_title() == "boolq@50, 50 items, 1 of 3 blocks"
    assert forest.build(one) is None  # nothing beside the reference


def test_gains_are_means_over_blocks(three: Study) -> None:
    found = gains.maps(three)
    assert [m.role for m in found] == ["self_attn.o_proj", "mlp.down_proj"]
    assert found[0].drift == pytest.approx(0.02 * (1 + np.arange(30)))  # mean of 0.01, 0.02, 0.03
    assert found[0].share.sum(0) == pytest.approx(np.ones(30)) and found[0].share[
        4
    ] == pytest.approx(np.full(30, 0.5))
    figure: Any = gains.build(three)
    assert figure.axes[0].lines[0].get_ydata() == pytest.approx(100 * found[0].drift)
    shown = figure.axes[2].images[0].get_array()
    assert np.nansum(np.ma.filled(shown, 0), axis=0) == pytest.approx(np.full(30, 100.0))


# --- bytes ----------------------------------------------------------------------------------------

AGAIN = """
import hashlib, sys
from pathlib import Path
from gain_cl.measure import record
from gain_cl.paper.figures import curves, forest, gains, style
from gain_cl.studies.study import study_of_runs
study = study_of_runs(record.load(p) for p in sorted(Path(sys.argv[1], "runs").glob("*.json")))
for figure in (curves.build(study), forest.build(study), gains.build(study)):
    for kind in ("pdf", "svg", "png"):
        print(hashlib.sha256(style.written(figure, kind)).hexdigest())
assert "torch" not in sys.modules
"""


def test_the_same_study_gives_the_same_bytes_in_another_process(three: Study) -> None:
    results = results_of(three)
    study = study_of_runs(record.load(p) for p in sorted((results / "runs").glob("*.json")))
    here = []
    for figure in (curves.build(study), forest.build(study), gains.build(study)):
        assert figure is not None
        written = {k: style.written(figure, k) for k in ("png", "svg", "pdf")}  # another order
        here += [hashlib.sha256(written[k]).hexdigest() for k in ("pdf", "svg", "png")]
        assert (
            written["pdf"].startswith(b"%PDF")
            and b"CreationDate" not in written["pdf"]
            and b"/Type3" not in written["pdf"]
        )
        assert (
            b"<text" not in written["svg"]
            and b"dc:date" not in written["svg"]
            and b"Software" not in written["png"]
        )
    env = {**os.environ, "PYTHONHASHSEED": "7", "MPLCONFIGDIR": str(results / "mpl")}
    (results / "mpl").mkdir()
    (results / "mpl/matplotlibrc").write_text(
        "font.size: 20\nlines.linewidth: 9\npdf.fonttype: 3\nsavefig.bbox: tight\n"
    )
    there = subprocess.run(
        [sys.executable, "-c", AGAIN, str(results)],
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert there.stdout.split() == here


def test_an_interval_that_allows_anything_is_cut() -> None:
    """Two blocks give a t of one degree of freedom: from almost -100% to beyond float64. The axis
    stays readable, the ends have no caps."""
    with style.rules():
        figure, (axes,) = style.panels([""], 1.7)
        wide, narrow = Estimate(-0.6, -14.0, 16.0, 2), Estimate(0.1, 0.05, 0.18, 2)
        style.points(
            axes,
            [0, 1, 2],
            [wide, narrow, Estimate(0.03, math.nan, math.nan, 1)],
            color="k",
            marker="o",
            linestyle="",
        )
        style.percent_axis(axes, "y")
    low, high = axes.get_ylim()
    assert -2.5 < low < -0.6 - style.CUT and high < 1.5
    (drawn,) = axes.containers
    assert [list(caps.get_xdata()) for caps in drawn.lines[1]] == [[1, 2]] * 2  # not of the first
    assert style.written(figure, "png")
