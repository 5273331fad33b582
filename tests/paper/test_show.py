"""What a user sees of a finished run: the terminal, the CSV, the picture. Every number comes from
the record."""

from __future__ import annotations

import csv
import io
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import binomtest

import synthetic
from gain_cl import cli
from gain_cl.errors import DataError
from gain_cl.measure import record
from gain_cl.paper import show
from gain_cl.paper.table import print_table
from gain_cl.paper.tables.matrix import in_terminal
from gain_cl.runs import finish, heatmap
from gain_cl.stats import format, matrix
from gain_cl.system.terminal import console

NOTE = "the base is an instruct model [4-bit]: part of any improvement is repair"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> record.Run:
    return synthetic.run(tmp_path_factory.mktemp("runs") / "r.json", notes=[NOTE])


def small(path: Path, **keys: object) -> record.Run:
    shape: dict[str, object] = {
        "bases": {"a": 20.0, "b": 30.0, "x": 10.0},
        "controls": ["x"],
        "count": 8,
        "with_items": False,
    }
    return synthetic.run(path / "r.json", **{**shape, **keys})  # type: ignore[arg-type]


def printed(
    run: record.Run, width: int = 120, files: dict[str, Path] | None = None, **options: object
) -> str:
    out = io.StringIO()
    show.render(run, files, Console(file=out, width=width, **options))  # type: ignore[arg-type]
    return out.getvalue()


def bare(text: str) -> str:
    """Text with its intervals as two numbers."""
    return re.sub("[()]", "", text).replace(" to ", " ")


def line(text: str, start: str) -> str:
    return next(x for x in text.splitlines() if x.startswith(start))


# --- the matrix -----------------------------------------------------------------------------------


def test_ten_domains_fit_in_120_columns(run: record.Run) -> None:
    text = printed(run)
    tables = text[: text.index("trainable parameters")]
    assert max(map(len, tables.splitlines())) <= 120 and "…" not in text
    assert line(text, "stage ").split() == ["stage", *synthetic.OFFLINE, *synthetic.CONTROLS]
    for stage, label in enumerate(run.matrix.index):
        shown = line(text, label)[len(label) :].split()
        values = [float(x.rstrip("*")) for x in shown]
        assert values == pytest.approx(run.matrix.iloc[stage].tolist(), abs=0.0051)
        assert [i for i, x in enumerate(shown) if x.endswith("*")] == (
            [stage - 1] if stage else []
        )  # learned in this stage


def test_changes_per_domain(run: record.Run) -> None:
    text, m = printed(run), np.log(run.matrix.to_numpy())
    percent = [
        [float(x) for x in line(text, row).split("%")[1].split() if x != "-"]
        for row in ("own step %", "backward %", "from base %")
    ]
    assert percent[0] == pytest.approx(
        [100 * math.expm1(m[k, k - 1] - m[k - 1, k - 1]) for k in range(1, 9)], abs=0.051
    )
    assert percent[1] == pytest.approx(
        [100 * math.expm1(m[8, k - 1] - m[k, k - 1]) for k in range(1, 8)], abs=0.051
    )
    assert percent[2] == pytest.approx((100 * np.expm1(m[8] - m[0])).tolist(), abs=0.051)


@pytest.mark.parametrize("width", [117, 100, 80, 60, 40])
def test_narrow_terminals_lose_no_number(run: record.Run, width: int) -> None:
    out = io.StringIO()
    print_table(in_terminal(run.record), Console(file=out, width=width))
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= width and "…" not in text
    shown = sorted(float(x) for x in re.findall(r"\d+\.\d\d", text))
    assert shown == pytest.approx(sorted(run.matrix.to_numpy().ravel()), abs=0.0051)
    for name in [*synthetic.OFFLINE, *synthetic.CONTROLS]:
        assert name in text  # in full in the head of one of the tables


@pytest.mark.parametrize("perplexity", [1.5, 455.6, 49_152.0, 3e9])
def test_perplexities_of_any_size(tmp_path: Path, perplexity: float) -> None:
    text = printed(small(tmp_path, bases={"a": perplexity, "b": 2.0}, controls=[]), width=60)
    assert len(format.perplexity(math.log(perplexity))) <= 7 and "…" not in text


# --- the rest of the page -------------------------------------------------------------------------


def test_summary_in_percent_and_nats(run: record.Run) -> None:
    text = printed(run).split("Change of perplexity")[1]
    m = matrix.LossMatrix.from_documents(run.documents, run.record.trained, run.record.controls)
    found = matrix.summary(m)
    assert set(found) == set(show.ROWS)  # every metric has a name
    for name, e in found.items():
        shown = bare(line(text, show.ROWS[name][0] + "  ")[17:]).split()
        wanted = [100 * math.expm1(x) for x in (e.value, e.low, e.high)]
        assert [float(x) for x in shown[:3]] == pytest.approx(wanted, abs=0.051)
        assert [float(x) for x in shown[3:6]] == pytest.approx(
            [e.value, e.low, e.high], abs=0.000051
        )
        assert int(shown[6]) == e.n
    assert "over test documents and task items of this one run" in text


def test_forgetting_by_stages_since_learned(run: record.Run, tmp_path: Path) -> None:
    m = matrix.LossMatrix.from_documents(run.documents, run.record.trained, run.record.controls)
    text = printed(run).split("by stages since a domain was learned")[1]
    rows = [bare(x).split() for x in text.splitlines()[4:11]]
    for age, row in enumerate(rows, start=1):
        e = m.estimate(matrix.forgetting_by_age(m)[age])
        assert [int(x) for x in row[:3]] == [age, 8 - age, 32 * (8 - age)]
        assert [float(x) for x in row[3:6]] == pytest.approx(
            [100 * math.expm1(x) for x in (e.value, e.low, e.high)], abs=0.051
        )
    assert "stages since" not in printed(small(tmp_path))  # of two stages it is the backward change


def test_bits_per_byte(run: record.Run, tmp_path: Path) -> None:
    """Mean over trained domains of sum NLL / (ln 2 * bytes): synthetic documents have 4 bytes a
    token."""
    d = run.documents[~run.documents.domain.isin(list(synthetic.CONTROLS))]
    sums = d.groupby(["stage", "domain"])[["nll_nats", "bytes"]].sum()
    mean = (sums.nll_nats / math.log(2) / sums.bytes).groupby("stage").mean()
    assert (
        f"bits per byte, mean over trained domains: {mean[0]:.4f} pretrained, {mean[8]:.4f} "
        "after stage 8\n" in printed(run)
    )
    one = printed(small(tmp_path, bases={"a": 20.0}, controls=[]))
    assert line(one, "bits per byte").endswith(" after stage 1")


def test_task_block(run: record.Run) -> None:
    from gain_cl.stats import answers

    text = printed(run)
    before, after = (answers.level(run.items, "boolq@100", s)["accuracy"].value for s in (0, 8))
    change = answers.change(run.items, "boolq@100", 0, 8)["accuracy"]
    shown = bare(line(text, "accuracy")).split()[1:]
    assert [float(x) for x in shown] == pytest.approx(
        [before, after, change.value, change.low, change.high], abs=0.00051
    )
    lost, gained, _ = answers.flips(run.items, "boolq@100", 0, 8)
    p = binomtest(lost, lost + gained).pvalue
    assert (
        p > 0.01
        and f"flips: {lost} right to wrong, {gained} wrong to right, of 100 (McNemar p {p:.3f})\n"
        in text
    )
    for row in ("margin (nats)", "AUC", "balanced accuracy"):
        assert line(text, row)
    assert "limited" not in text


@pytest.mark.parametrize(
    ("lost", "gained", "p"), [(4, 3, "1.000"), (0, 0, "1.000"), (9, 1, "0.021"), (20, 2, "<0.001")]
)
def test_flips_with_their_chance(
    run: record.Run, monkeypatch: pytest.MonkeyPatch, lost: int, gained: int, p: str
) -> None:
    from gain_cl.stats import answers

    monkeypatch.setattr(answers, "flips", lambda *_: answers.Flips(lost, gained, 100))
    assert (
        f"flips: {lost} right to wrong, {gained} wrong to right, of 100 (McNemar p {p})\n"
        in printed(run)
    )


def test_a_limited_task_says_so(tmp_path: Path) -> None:
    run = synthetic.run(tmp_path / "r.json")
    run.record.stages[0].tasks["boolq@100"].limited = True
    assert "not for a table" in printed(run)


def test_truncated_items_are_told(tmp_path: Path, run: record.Run) -> None:
    assert "did not fit" not in printed(run)
    cut = synthetic.run(tmp_path / "r.json")
    for stage in (0, 8):
        cut.record.stages[stage].tasks["boolq@100"].truncated = 3
    assert "3 of 100 items did not fit the model's context: their beginning was cut\n" in printed(
        cut
    )


def test_a_task_scored_once_has_no_change(tmp_path: Path) -> None:
    run = synthetic.run(tmp_path / "r.json")
    run.record.stages[8].tasks.clear()
    text = printed(run)
    assert "boolq@100: 100 items, stage 0\n" in text and "flips" not in text


def test_cost_notes_and_files(run: record.Run) -> None:
    deep = Path("/somewhere") / ("long" * 40) / "[r].items.parquet"
    text = printed(run, width=80, files={"per-item values": deep})
    assert "trainable parameters: 63,360 of 134,515,008 (0.0471%)" in text
    assert "training tokens: 65,536 in 8 stages, 197 tokens/s" in text
    assert "time: 11 min 40 s (learning 5 min 32 s, scoring 4 min 57 s, tasks 24.0 s)" in text
    assert "peak memory: 2.90 GB" in text
    assert f"note: {NOTE}\n" in text  # brackets are no markup
    assert text.endswith(f"per-item values: {deep}\n")  # on one line, to be copied


def test_the_items_are_named_when_no_files_are_given(
    run: record.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert [x.split(":")[0] for x in printed(run).splitlines()[-1:]] == ["per-item values"]


def test_demonstration(run: record.Run, tmp_path: Path) -> None:
    assert f"\n{show.DEMONSTRATION}\n" in printed(run)
    assert show.DEMONSTRATION == "demonstration: too small to decide between methods"
    assert len(show.demonstration([run.record])) == 2
    big = small(tmp_path, tokens=2**19)
    assert (
        show.demonstration([big.record]) == ["one run of one seed"]
        and show.demonstration([big.record] * 5) == []
    )
    assert show.demonstration([run.record] * 5)  # five small runs are still small
    stages = [s.model_copy(update={"train": None}) for s in big.record.stages]  # score trains none
    scored = big.record.model_copy(update={"stages": stages})
    assert show.demonstration([scored]) == ["one run of one seed"]


def test_one_domain_and_nothing_else(tmp_path: Path) -> None:
    text = printed(small(tmp_path, bases={"a": 20.0}, controls=[]))
    assert (
        "|" not in text
        and "backward" not in text
        and line(text, "own step ")
        and "control" not in text
    )


def test_output_that_knows_only_ascii(run: record.Run) -> None:
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
    show.render(run, {}, Console(file=out, width=120))
    assert b"24.78" in raw.getvalue()


def test_plain_output_is_wide_enough_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert console().width == 120
    monkeypatch.setenv("COLUMNS", "70")
    assert console().width == 70


@pytest.mark.parametrize("fault", ["sum", "cell"])
def test_a_record_that_disagrees_with_its_documents(tmp_path: Path, fault: str) -> None:
    run = small(tmp_path)

    def change(data: dict[str, Any]) -> None:
        scores = data["stages"][1]["domains"]
        if fault == "sum":
            scores["a"]["nll_nats"] *= 1.01
        else:
            del scores["a"]

    synthetic.edit(run.path, change)
    with pytest.raises(DataError, match="sums in the record"):
        printed(record.load(run.path))


def test_no_heavy_import() -> None:
    code = (
        "import sys, gain_cl.paper.show, gain_cl.runs.finish; print({'torch', "
        "'transformers', 'matplotlib', 'wandb'} & set(sys.modules))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        == "set()\n"
    )


# --- as shipped -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> record.Run:
    """A run on the same text, with the losses of another model."""
    made = synthetic.run(tmp_path_factory.mktemp("shipped") / "s.json", seed=0, learn=0.3)
    made.documents.nll_nats *= 1.1
    for stage in made.record.stages:
        stage.domains = {
            d: s.model_copy(update={"nll_nats": s.nll_nats * 1.1}) for d, s in stage.domains.items()
        }
    made.record.run_id, made.record.model = "asmade-gain_ffn-offline-s0-0123456789", "asmade"
    return record.save(
        made.record, made.documents, made.items, made.path.with_name(f"{made.record.run_id}.json")
    )


def beside(run: record.Run, shipped: record.Run, width: int = 120) -> str:
    out = io.StringIO()
    show.render(run, {}, Console(file=out, width=width), shipped=shipped)
    return out.getvalue()


def test_the_model_as_shipped_stands_above_stage_0(run: record.Run, shipped: record.Run) -> None:
    text = beside(run, shipped)
    lines = text.splitlines()
    at = lines.index(line(text, "as shipped"))
    assert lines[at + 1].startswith("0 pretrained")
    values = [float(x) for x in lines[at].removeprefix("as shipped").split()]
    assert values == pytest.approx(shipped.matrix.iloc[0].tolist(), abs=0.0051)
    assert f"as shipped: asmade, stage 0 of {shipped.record.run_id}" in text
    del lines[at]
    others = [x for x in lines if "as shipped" not in x]
    assert re.findall(r"\S*\d\S*", "\n".join(others)) == re.findall(
        r"\S*\d\S*", printed(run, files={})
    )  # the run's own, as ever


@pytest.mark.parametrize("width", [100, 60, 40])
def test_as_shipped_in_narrow_terminals(run: record.Run, shipped: record.Run, width: int) -> None:
    text = beside(run, shipped, width)
    table = text.split("Perplexity after each stage")[1].split("Change of perplexity")[0]
    tables = table[: table.index("* learned")]
    assert max(map(len, tables.splitlines())) <= width and "…" not in tables
    rows = [x for x in tables.splitlines() if x.startswith("as shipped")]
    numbers = [float(x) for row in rows for x in re.findall(r"\d+\.\d\d", row)]
    assert numbers == pytest.approx(shipped.matrix.iloc[0].tolist(), abs=0.0051)


def test_as_shipped_on_other_text_is_refused(
    run: record.Run, shipped: record.Run, tmp_path: Path
) -> None:
    names = f"{shipped.record.run_id} and {run.record.run_id}"
    for what, change in {
        "protocol": {"protocol": "ppl-test-first64x32-prefix0-ctx1024"},
        "domains": {"controls": ["geography"]},
        "test documents": {"pins": {"validation": {"law": "0"}}},
    }.items():
        other = record.Run(
            shipped.record.model_copy(update=change), shipped.documents, shipped.items, shipped.path
        )
        with pytest.raises(DataError, match=rf"different {what}: .* \({names}\)"):
            beside(run, other)
    reordered = shipped.record.model_copy(
        update={"trained": shipped.record.trained[::-1]}
    )  # nothing to stage 0
    assert beside(
        run, record.Run(reordered, shipped.documents, shipped.items, shipped.path)
    ) == beside(run, shipped)
    other = synthetic.run(tmp_path / "r.json", seed=1)  # as many documents, of other lengths
    with pytest.raises(DataError, match="different scored text"):
        beside(run, other)


def test_show_shipped(
    run: record.Run, shipped: record.Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["show", "--results-dir", str(tmp_path), str(run.path), "--shipped"]
    assert cli.main([*words, str(shipped.path)]) == 0
    out = capsys.readouterr().out
    assert line(out, "as shipped") and out.splitlines()[-1] == f"record: {run.path}"
    (tmp_path / "runs").mkdir()
    for path in (shipped.path, record.items_path(shipped.path)):
        (tmp_path / "runs" / path.name).write_bytes(path.read_bytes())
    assert cli.main([*words, "asmade"]) == 0 and line(capsys.readouterr().out, "as shipped")
    assert cli.main([*words, "nosuch"]) == 64
    other = synthetic.run(tmp_path / "r.json", bases={"a": 20.0}, controls=[])
    capsys.readouterr()
    assert cli.main([*words, str(other.path)]) == 65
    out, err = capsys.readouterr()
    assert (
        out == "" and err.startswith("gain_cl: error: different domains") and err.count("\n") == 1
    )


# --- CSV ------------------------------------------------------------------------------------------


def test_csv_keeps_every_bit(run: record.Run) -> None:
    rows = list(csv.reader(io.StringIO(finish.matrix_csv(run))))
    assert rows[0] == ["stage", "trained", *synthetic.OFFLINE, *synthetic.CONTROLS]
    assert [r[0] for r in rows[1:]] == [str(i) for i in range(9)]
    assert [r[1] for r in rows[1:]] == ["", *synthetic.OFFLINE]
    assert (np.array([[float(x) for x in r[2:]] for r in rows[1:]]) == run.matrix.to_numpy()).all()


def test_csv_leaves_unscored_cells_empty(tmp_path: Path) -> None:
    run = small(tmp_path)
    del run.record.stages[1].domains["x"]
    assert finish.matrix_csv(run).splitlines()[2].endswith(",")
    assert "nan" not in finish.matrix_csv(run)


# --- heat map -------------------------------------------------------------------------------------

SHAPES: dict[str, dict[str, object]] = {
    "offline": {
        "bases": {**synthetic.OFFLINE, **synthetic.CONTROLS},
        "controls": list(synthetic.CONTROLS),
    },
    "long names": {
        "bases": {"financial-news-articles-v2": 33.0, "pubmed_abstracts_unlabelled": 28.0},
        "controls": [],
    },
    "one domain": {"bases": {"a": 20.0}, "controls": []},
    "huge": {
        "bases": {"smoke_a": 420.0, "smoke_b": 49_000.0, "smoke_control": 3e9},
        "controls": ["smoke_control"],
        "learn": 1.2,
    },
}


@pytest.mark.parametrize("shape", SHAPES)
def test_no_text_of_the_picture_is_cut_or_crosses_another(tmp_path: Path, shape: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    figure = heatmap.draw_matrix(small(tmp_path, **SHAPES[shape]), "method lr=0.01")
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    boxes = {}
    for text in figure.findobj(Text):
        if text.get_text() and text.get_visible():
            box = text.get_window_extent(renderer)
            assert (
                box.x0 >= 0
                and box.y0 >= 0
                and box.x1 <= figure.bbox.x1
                and box.y1 <= figure.bbox.y1
            ), text.get_text()
            if not text.get_rotation():
                boxes[text] = box
    for a, one in boxes.items():
        for b, two in boxes.items():
            assert (
                a is b
                or one.x1 <= two.x0
                or two.x1 <= one.x0
                or one.y1 <= two.y0
                or two.y1 <= one.y0
            ), (a.get_text(), b.get_text())


def test_picture_shows_the_matrix(run: record.Run) -> None:
    from matplotlib.colors import to_rgb

    figure = heatmap.draw_matrix(run)
    axes = figure.axes[0]
    texts = [t.get_text() for t in axes.texts]
    for value in run.matrix.to_numpy().ravel():
        assert f"{value:.2f}" in texts
    assert [t.get_text() for t in axes.get_xticklabels()] == list(run.matrix.columns)
    cells = [p for p in axes.patches if p.get_fill()]
    outlined = [p for p in axes.patches if not p.get_fill()]
    assert len(cells) == 90 and len(outlined) == 8
    red, _, blue = to_rgb(cells[0].get_facecolor())
    assert red == pytest.approx(blue, abs=0.01)  # stage 0: no change, no colour
    red, _, blue = to_rgb(cells[10].get_facecolor())
    assert blue > red  # medicine fell in its own stage
    gap = cells[8].get_x() - cells[7].get_x()
    assert gap > 1.2  # controls stand apart
    assert run.record.run_id in "".join(t.get_text() for t in figure.texts)


def test_colour_scale_is_symmetric_and_says_when_it_is_cut() -> None:
    assert heatmap.scale(np.array([[0.0, -0.4, 0.3]])) == (5.0, "neither")  # noise stays pale
    assert heatmap.scale(np.array([[0.0, -12.0, np.nan]])) == (20.0, "neither")
    assert heatmap.scale(np.array([[0.0, -80.0, 10.0]])) == (50.0, "min")
    assert heatmap.scale(np.array([[0.0, 900.0, np.inf]])) == (50.0, "max")


def test_unscored_cell_is_grey(tmp_path: Path) -> None:
    run = small(tmp_path)
    del run.record.stages[1].domains["x"]
    axes = heatmap.draw_matrix(run).axes[0]
    assert "-" in [t.get_text() for t in axes.texts]
    assert len([p for p in axes.patches if p.get_fill()]) == 9


def test_picture_bytes_depend_on_the_run_alone(tmp_path: Path) -> None:
    run = small(tmp_path)
    first = heatmap.matrix_png(run)
    (tmp_path / "matplotlibrc").write_text(
        "figure.facecolor: black\nfont.size: 20\nsavefig.bbox: tight\naxes.facecolor: red\n"
    )
    code = (
        "import sys; from gain_cl.measure import record; from gain_cl.runs import heatmap; "
        f"sys.stdout.buffer.write(heatmap.matrix_png(record.load({str(run.path)!r}))); assert "
        "'matplotlib.pyplot' not in sys.modules"
    )
    second = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, check=True
    ).stdout
    assert first[:8] == b"\x89PNG\r\n\x1a\n" and first == second
    assert b"tEXt" not in first and b"tIME" not in first


def test_other_definitions_are_shown_when_asked_for(
    run: record.Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["show", "--definitions", str(run.path)]) == 0
    out = capsys.readouterr().out
    for name, value in matrix.published(
        matrix.LossMatrix.from_documents(run.documents, run.record.trained, run.record.controls)
    ).items():
        assert re.search(rf"{name} +{re.escape(f'{value:+.4f}')}", out), name
    assert cli.main(["show", str(run.path)]) == 0
    assert "gem_bwt" not in capsys.readouterr().out
