"""Tables and the report of an experiment: what may enter them, what they say, and that they come
out the same."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_comparison import FOUR, a_study, an_experiment

from gain_cl import cli
from gain_cl.errors import DataError
from gain_cl.measure import record
from gain_cl.paper import build, gather, tables
from gain_cl.paper.gather import Book
from gain_cl.paper.table import Row, Table, Value, as_csv, latex, markdown
from gain_cl.stats import format
from gain_cl.studies import equal, verdicts
from gain_cl.studies.experiments import Experiment, Planned, load_experiment, planned_runs
from gain_cl.studies.study import Study, level
from gain_cl.system.sealed import seal_of

ROOT = Path(__file__).parents[2]
GRID = """question: Does it work?
blocks: 2
overrides: [debug=smoke, train.steps=1]
methods: {gain_ffn: {train.lr: [0.01]}, lora: {train.lr: [0.001]}}
reference: lora
endpoints: [{name: forgets, metric: backward, of: gain_ffn, minus: lora}]
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished grid of four smoke runs."""
    at = tmp_path_factory.mktemp("made")
    (at / "e.yaml").write_text(GRID)
    for cell in planned_runs(
        load_experiment(str(at / "e.yaml")), [f"results_dir={at}/results", f"output_dir={at}/runs"]
    ):
        assert (
            cli.main(
                [
                    "run",
                    *cell.overrides,
                    f"results_dir={at}/results",
                    f"output_dir={at}/runs",
                    "compute.threads=1",
                ]
            )
            == 0
        )
    return at


@pytest.fixture
def at(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "e", dirs_exist_ok=True)


def words(at: Path) -> list[str]:
    return [f"results_dir={at}/results", f"output_dir={at}/runs"]


def book(at: Path, partial: bool = False) -> Book:
    return gather.gather(load_experiment(str(at / "e.yaml")), words(at), partial)


def edited(at: Path, which: int, change: Callable[[dict[str, Any]], Any]) -> str:
    """A record changed by somebody who seals it again; its run id."""
    path = sorted((at / "results/runs").glob("*.json"))[which]
    data = json.loads(path.read_bytes())
    change(data)
    data["seal"] = seal_of(data)
    path.write_text(json.dumps(data))
    return path.stem


# --- what may enter -------------------------------------------------------------------------------


def test_a_missing_run_stops_the_build_and_is_named(at: Path) -> None:
    path = sorted((at / "results/runs").glob("*.json"))[0]
    path.unlink()
    with pytest.raises(
        DataError,
        match=r"1 of 4 runs may not enter a table: .* is (stopped|missing) .*partial=true",
    ):
        book(at)
    found = book(at, partial=True)
    assert len(found.gaps) == 1 and len(found.runs) == 3 and path.stem in found.gaps[0]
    assert any("GAP" in note for t in tables.build_tables(found) for note in t.notes)


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "tainted": (lambda r: r.update(tainted=["numerics"]), "tainted: numerics"),
    "limited": (lambda r: r["config"]["tasks"].update(limit=5), "limited"),
    "stale": (lambda r: r["provenance"].update(numerics=0), "stale: of numerics 0"),
    "another torch": (
        lambda r: r["provenance"]["packages"].update(torch="1.0"),
        "mixed packages: .*'torch': '1.0'",
    ),
    "another dtype": (lambda r: r["config"]["model"].update(dtype="bfloat16"), "mixed dtype"),
    "another device": (
        lambda r: r["provenance"].update(device="cuda:0"),
        "mixed device type: .* cuda",
    ),
    "another schema": (lambda r: r.update(schema_version=2), "schema_version is 2"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_may_not_enter_a_table_is_named(at: Path, what: str) -> None:
    change, message = REFUSED[what]
    run_id = edited(at, 1, change)
    with pytest.raises(DataError, match=message) as error:
        book(at)
    assert run_id in str(error.value)
    assert run_id not in book(at, partial=True).runs


def test_another_commit_may_enter(at: Path) -> None:
    for i in range(4):
        edited(at, i, lambda r: r["provenance"].update(commit=f"{len(r['run_id']):040x}"))
    assert not book(at).gaps


def test_one_digit_of_a_record_is_caught(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of every number in it, sums, seconds and settings alike."""
    path = sorted((at / "results/runs").glob("*.json"))[2]
    text = path.read_text()
    places = [m.start() for m in re.finditer(r"(?<=[ \[:])\d", text)]
    draw = np.random.default_rng(0)
    for place in draw.choice(places, 12, replace=False):
        path.write_text(text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :])
        assert cli.main(["tables", f"experiment={at}/e.yaml", *words(at)]) == 65
        assert path.name in capsys.readouterr().err
    path.write_text(text)
    assert cli.main(["tables", f"experiment={at}/e.yaml", *words(at)]) == 0


def test_a_failed_run_is_named_with_its_state(at: Path) -> None:
    path = sorted((at / "results/runs").glob("*.json"))[0]
    path.unlink()
    shutil.rmtree(at / "runs" / path.stem)
    (at / "runs" / path.stem).mkdir()
    (at / "runs" / path.stem / "failure.json").write_text("{}")
    with pytest.raises(DataError, match=r"is failed"):
        book(at)


def test_a_run_of_other_data_does_not_count(at: Path) -> None:
    """The same settings, another id: data, model files or numerics changed since."""
    path = sorted((at / "results/runs").glob("*.json"))[0]
    other = path.stem[:-10] + "0123456789"
    data = json.loads(path.read_bytes()) | {"run_id": other}
    data["seal"] = seal_of(data)
    path.with_name(f"{other}.json").write_text(json.dumps(data))
    record.items_path(path).rename(record.items_path(path.with_name(f"{other}.json")))
    path.unlink()
    with pytest.raises(DataError, match=rf"is (stopped|missing) \({path.stem}\)"):
        book(at)


# --- what they say --------------------------------------------------------------------------------


def of_studies(e: Experiment, *studies: Study) -> Book:
    """A book of simulated studies, each of a model."""
    cells = [
        Planned(
            x.model, s.method, s.values, k, [], None, run.record.run_id, run.path, run.path.parent
        )  # type: ignore[arg-type]
        for x in studies
        for s in x.settings
        for k, run in enumerate(s.runs.values())
    ]
    runs = {run.record.run_id: run for x in studies for s in x.settings for run in s.runs.values()}
    return Book(e, cells, {x.model: x for x in studies}, runs, Path("results"))


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Book:
    """Two methods, two rates, four blocks, a task."""
    e = an_experiment(FOUR)  # type: ignore[arg-type]
    study = a_study(tmp_path_factory.mktemp("runs"), e, tasks=True)
    return of_studies(e, study)


def named(found: Book) -> dict[str, Table]:
    return {t.name: t for t in tables.build_tables(found)}


def test_without_fronts_there_is_no_table_of_equal_skill(simulated: Book) -> None:
    (study,) = simulated.studies.values()
    alone = dataclasses.replace(study, settings=list(study.chosen.values()))
    found = named(dataclasses.replace(simulated, studies={study.name: alone}))
    assert "skill" not in found and {"settings", "main", "published"} <= found.keys()


def test_every_table_is_there(simulated: Book) -> None:
    found = {name for name in named(simulated) if not name.startswith("matrix-")}
    there = {
        "main",
        "endpoints",
        "settings",
        "skill",
        "domains",
        "domains-change",
        "blocks",
        "tasks",
        "parameters",
        "published",
    }
    assert found == there
    assert (
        sum(name.startswith("matrix-") for name in named(simulated)) == 8
    )  # chosen settings in four blocks


def test_the_main_table_is_the_comparison(simulated: Book) -> None:
    (study,) = simulated.studies.values()
    t = named(simulated)["main"]
    j = t.columns.index("backward %")
    for row, s in zip(t.rows, study.chosen.values(), strict=True):
        e = level(s, "backward").estimate  # type: ignore[union-attr]
        cell = row.cells[j]
        assert isinstance(cell, Value)
        assert (cell.value, cell.low, cell.high) == pytest.approx(
            [format.change(x) for x in (e.value, e.low, e.high)]
        )
        assert len(row.runs) == 4 and all(r in simulated.runs for r in row.runs)


def test_bold_only_where_a_declared_test_says_so(simulated: Book) -> None:
    (study,) = simulated.studies.values()
    said = {j.endpoint.name: j.verdict for j in verdicts.judge(study)}
    bold = {
        (row.cells[0], t.columns[j])
        for t in [named(simulated)["main"]]
        for row in t.rows
        for j, c in enumerate(row.cells)
        if getattr(c, "bold", 0)
    }
    expected = set()
    if said["boolq"] in ("better", "worse"):
        expected.add(
            (
                "gain lr=0.01" if said["boolq"] == "better" else "lora lr=0.001",
                "boolq@50 margin, nats",
            )
        )
    assert bold == expected and said["boolq"] == "better"
    notes = [note for note in named(simulated)["main"].notes if note.startswith("Bold")]
    assert notes == ["Bold: gain is better in margin:boolq@50 than lora, by the test of boolq."]
    assert all(
        not getattr(c, "bold", False)
        for name, t in named(simulated).items()
        if name != "main"
        for row in t.rows
        for c in row.cells
    )


def test_the_winner_is_bold_also_where_it_is_the_reference(tmp_path: Path) -> None:
    line = {
        "gain": {1e-2: (0.1, 0.3), 3e-2: (0.3, 0.4)},
        "lora": {1e-3: (0.1, 0.0), 3e-3: (0.3, 0.1)},
    }
    worse = {"name": "forgets", "metric": "backward", "of": "gain", "minus": "lora"}
    e = an_experiment([worse])
    (t,) = (x for x in tables.main.build(a_study(tmp_path, e, line)))
    column = t.columns.index("backward %")
    assert [getattr(row.cells[column], "bold", False) for row in t.rows] == [False, True]
    assert "Bold: lora is better in backward than gain, by the test of forgets." in t.notes


def test_published_replay_is_compared_at_equal_own_step() -> None:
    """Chosen settings learn unequally: replay's less forgetting at more learning would be
    GAIN's."""
    e = load_experiment("pilot")
    found = gather.gather(e, [f"results_dir={Path(__file__).parents[2]}/results"])
    (study,) = found.studies.values()
    (t,) = tables.published.build(study)
    row = next(r for r in t.rows if "replay" in str(r.cells[0]))
    expected = equal.interval_of(equal.match_skill(study, "gain_ffn", "lora_replay"))
    assert (
        isinstance(row.cells[4], Value)
        and row.cells[4].value == pytest.approx(format.change(expected.value))
        and row.cells[4].value > 0
    )
    assert len(row.runs) == 6 and any(note.startswith("backward % minus EWC") for note in t.notes)


def test_a_hand_made_table_in_every_format() -> None:
    t = Table(
        "t",
        "A title, 5% of A_B",
        ["method", "value", "n"],
        [
            Row(
                [
                    "gain_ffn",
                    Value(-1.25, lambda x: f"{x:+.1f}", -2.5, 0.0, bold=True),
                    Value(63360, write=lambda x: f"{x:,.0f}"),
                ],
                ["run-1"],
            ),
            Row(["a|b <c>", None, Value(math.nan)], ["run-2", "run-3"], rule=True),
        ],
        ["A note: 100%."],
    )
    md = markdown(t)
    assert (
        "| gain\\_ffn " in md
        and "**-1.2 (-2.5 to +0.0)**" in md
        and "a\\|b \\<c\\>" in md
        and "`run-2`, `run-3`" in md
    )
    tex = latex(t)
    number = (
        r"\begin{tabular}[t]{@{}r@{}}$\mathbf{-1.2}$\\\scriptsize $-2.5$ to $+0.0$\end{tabular}"
    )
    assert rf"gain\_ffn & {number} & $63{{,}}360$ \\ % run-1" in tex and "PARTIAL" not in tex
    assert r"\multicolumn{3}{l}{\textbf{PARTIAL: 1 gap}} \\" in latex(
        dataclasses.replace(t, notes=["GAP: a is missing"])
    )
    assert r"a|b $<$c$>$ & -- & -- \\ % run-2, run-3" in tex and tex.count(r"\midrule") == 2
    rows = list(csv.reader(io.StringIO(as_csv(t))))
    assert rows == [
        ["method", "value", "value low", "value high", "n", "runs"],
        ["gain_ffn", "-1.25", "-2.5", "0", "63360", "run-1"],
        ["a|b <c>", "", "", "", "", "run-2 run-3"],
    ]


def test_numbers_are_those_of_the_tables(simulated: Book) -> None:
    quoted = build.numbers(simulated)
    (study,) = simulated.studies.values()
    j = {x.endpoint.name: x for x in verdicts.judge(study)}
    assert quoted["endpoint forgets verdict"] == j["forgets"].verdict and quoted["blocks"] == "4"
    assert quoted["gain backward"] == format.percent(
        level(study.chosen["gain"], "backward").estimate.value
    )  # type: ignore[union-attr]
    commands = re.findall(r"\\newcommand\{\\([A-Za-z]+)\}", build.macros("study", quoted))
    assert len(commands) == len(set(commands)) == len(quoted)
    assert "studyGainMinusLoraBackward" in commands and "studyGainBackwardBlockTwo" in commands


def test_csv_has_the_values_that_are_shown(simulated: Book) -> None:
    """In the same unit: what stands in Markdown, read back, is the CSV's number, rounded."""
    for t in tables.build_tables(simulated):
        rows = list(csv.DictReader(io.StringIO(as_csv(t))))
        for row, out in zip(t.rows, rows, strict=True):
            for column, c in zip(t.columns, row.cells, strict=True):
                if isinstance(c, Value) and not math.isnan(c.value) and "<" not in c.shown:
                    assert float(c.shown.replace(",", "")) == pytest.approx(
                        float(out[column]), abs=0.0501 if "." in c.shown else 0.5
                    ), column


def test_a_task_of_one_block_has_no_interval_over_blocks(tmp_path: Path) -> None:
    """main shows the change alone; the tasks table has its interval, over items."""
    e = an_experiment([], blocks=3)
    study = a_study(tmp_path, e, tasks=True)
    for s in study.settings:
        for block, run in list(s.runs.items())[1:]:
            run.items = run.items[:0]
            for stage in run.record.stages:
                stage.tasks = {}
            assert block[0] > 0
    found = named(of_studies(e, study))
    value = found["main"].rows[0].cells[found["main"].columns.index("boolq@50 margin, nats")]
    assert isinstance(value, Value) and not math.isnan(value.value) and not value.between
    assert any("in 1 of 3 blocks" in note for note in found["main"].notes)
    change = found["tasks"].rows[0].cells[-1]
    assert isinstance(change, Value) and change.between and len(found["tasks"].rows) == 2


def test_two_models_stay_apart(tmp_path: Path) -> None:
    """A table of each, one of both; numbers and macros begin with the model; the page has both
    verdicts."""
    from gain_cl.paper import report

    e = an_experiment(FOUR[:3], blocks=2)  # type: ignore[arg-type]
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    one, two = a_study(tmp_path / "a", e), a_study(tmp_path / "b", e, seed=1)
    for s in two.settings:
        for run in s.runs.values():
            run.record = run.record.model_copy(
                update={
                    "model": "larger",
                    "run_id": f"larger-{run.record.run_id}",
                    "total_parameters": 10**8,
                }
            )
    found = of_studies(e, one, two)
    made = named(found)
    assert {
        "main-smollm2",
        "main-larger",
        "models",
        "blocks-larger",
        "endpoints-smollm2",
    } <= made.keys()
    rows = made["models"].rows
    assert [row.cells[0] for row in rows] == ["smollm2", "smollm2", "larger", "larger"] and all(
        len(row.runs) == 2 for row in rows
    )
    quoted = build.numbers(found)
    assert quoted["smollm2 gain backward"] != quoted[
        "larger gain backward"
    ] and "\\eLargerGainBackward" in build.macros("e", quoted)
    text = report.page(found).decode()
    assert text.count('<ul class="verdicts">') == 2 and "<h3>larger</h3>" in text


def test_the_page_survives_hostile_words(tmp_path: Path) -> None:
    from gain_cl.paper import report

    e = an_experiment(
        [], blocks=1, question="<script>alert(1)</script> & {{ x }}", expect="</style><b>"
    )
    text = report.page(of_studies(e, a_study(tmp_path, e))).decode()
    assert (
        "<script>alert" not in text
        and "&lt;script&gt;alert(1)&lt;/script&gt; &amp; {{ x }}" in text
        and "&lt;/style&gt;" in text
    )


def test_names_that_would_be_one_macro_are_refused() -> None:
    with pytest.raises(DataError, match="two numbers would be"):
        build.macros("e", {"a_b c": "1", "a b_c": "2"})


def test_a_record_under_another_name_is_refused(at: Path) -> None:
    one, two = sorted((at / "results/runs").glob("*lora*.json"))
    two.write_bytes(one.read_bytes())
    record.items_path(two).write_bytes(record.items_path(one).read_bytes())
    with pytest.raises(DataError, match=f"the record of {one.stem} under another name"):
        book(at)


def test_tidy_holds_every_score(made: Path) -> None:
    found = book(made)
    rows = list(csv.DictReader(io.StringIO(build.made_tables(found)["tidy.csv"].decode())))
    for run in found.runs.values():
        for stage in run.record.stages:
            for domain, score in stage.domains.items():
                mine = {
                    r["metric"]: float(r["value"])
                    for r in rows
                    if (r["run"], r["stage"], r["name"])
                    == (run.record.run_id, str(stage.index), domain)
                    and r["kind"] in ("domain", "control")
                }
                assert (
                    mine["nll_nats"] == pytest.approx(score.nll_nats, rel=1e-11)
                    and mine["tokens"] == score.tokens
                )
                assert mine["perplexity"] == pytest.approx(score.perplexity, rel=1e-11)


def test_tables_need_no_torch(made: Path) -> None:
    code = (
        "import sys; from gain_cl import cli; "
        f"code = cli.main(['tables', 'experiment={made}/e.yaml', "
        f"'results_dir={made}/results', 'output_dir={made}/runs', 'force=true']); "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules; sys.exit(code)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_built_again_the_bytes_are_the_same(at: Path) -> None:
    """In another process, with another hash seed, locale and working folder."""
    line = ["tables", f"experiment={at}/e.yaml", *words(at)]
    assert cli.main(line) == 0
    first = {p.name: p.read_bytes() for p in (at / "results/tables/e").iterdir()}
    shutil.rmtree(at / "results/tables")
    about = {**os.environ, "PYTHONHASHSEED": "7", "LC_ALL": "C", "TZ": "Asia/Tokyo"}
    subprocess.run([sys.executable, "-m", "gain_cl", *line], check=True, env=about, cwd=at)
    assert {p.name: p.read_bytes() for p in (at / "results/tables/e").iterdir()} == first


def test_what_is_stale_is_made_again(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["tables", f"experiment={at}/e.yaml", *words(at)]
    of_a_run_that_went = at / "results/tables/e/matrix-tiny-lora-custom-s0-0123456789.md"
    of_a_run_that_went.parent.mkdir(parents=True, exist_ok=True)
    of_a_run_that_went.write_text("of a run that is no longer chosen")
    (of_a_run_that_went.parent / "matrix-notes.md").write_text("a reader's")
    assert (
        cli.main(line) == 0
        and not of_a_run_that_went.exists()
        and (of_a_run_that_went.parent / "matrix-notes.md").exists()
    )
    (at / "results/tables/e/main.md").write_text("by hand")
    (at / "results/tables/e/skill-tiny.md").write_text("from before")
    (at / "results/tables/e/own.md").write_text("a reader's")
    assert cli.main(line) == 0 and "made:" in capsys.readouterr().out
    assert (
        "by hand" not in (at / "results/tables/e/main.md").read_text()
        and not (at / "results/tables/e/skill-tiny.md").exists()
    )
    assert (at / "results/tables/e/own.md").exists()


LATEX = r"""\documentclass{article}
\usepackage{booktabs}
\input{numbers.tex}
\begin{document}
Own step \eGainFfnOwnStep\ (\eGainFfnOwnStepLow\ to \eGainFfnOwnStepHigh).
%s
\end{document}
"""


@pytest.mark.skipif(
    shutil.which("pdflatex") is None, reason="needs pdflatex (Debian: texlive-latex-recommended)"
)
def test_the_latex_compiles(at: Path) -> None:
    assert cli.main(["tables", f"experiment={at}/e.yaml", *words(at)]) == 0
    folder = at / "results/tables/e"
    names = [p.stem for p in sorted(folder.glob("*.tex")) if p.stem != "numbers"]
    body = "\n\n".join(rf"\resizebox{{\textwidth}}{{!}}{{\input{{{name}.tex}}}}" for name in names)
    preamble = LATEX.replace(
        r"\usepackage{booktabs}", "\\usepackage{booktabs}\n\\usepackage{graphicx}"
    )
    (folder / "all.tex").write_text(preamble % body)
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.tex"],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert (folder / "all.pdf").stat().st_size > 10_000


# --- the page -------------------------------------------------------------------------------------

BROWSER = next(
    (
        path
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (path := shutil.which(name))
    ),
    None,
)


@pytest.fixture(scope="module")
def page(made: Path) -> Path:
    assert cli.main(["report", f"experiment={made}/e.yaml", *words(made)]) == 0
    return made / "results/reports/e/index.html"


def test_the_page_says_what_the_records_say(page: Path, made: Path) -> None:
    text = page.read_text()
    found = book(made)
    assert "Does it work?" in text and "inconclusive" in text
    for run_id, run in found.runs.items():
        assert run_id in text and run.record.seal in text
    assert (
        f"python -m gain_cl sweep experiment={made}/e.yaml" in text
    )  # as it was given: by its path
    assert not re.search(r"(?:src|href)=[\"'](?:https?:)?//", text)


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium (Debian: chromium)")
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_page_in_a_browser(page: Path, width: int, scheme: str) -> None:
    """Sorting, hover, choosing a matrix; nothing on the console, no request beyond the file,
    nothing wider than the window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        tab = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme
        ).new_page()  # type: ignore[arg-type]
        said: list[str] = []
        asked: list[str] = []
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(page.as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")

        def column(j: int) -> list[str]:
            return [
                cell.inner_text()
                for cell in tab.query_selector_all(
                    f"#table-main + .scroll tbody tr td:nth-child({j})"
                )
            ]

        before = column(3)
        head = tab.locator("#table-main + .scroll th:nth-child(3) button")
        numbers = [int(x.replace(",", "")) for x in before]
        assert len(set(numbers)) == 2
        head.click()
        assert [int(x.replace(",", "")) for x in column(3)] == sorted(numbers)
        head.press("Enter")  # a keyboard does as well
        assert [int(x.replace(",", "")) for x in column(3)] == sorted(numbers, reverse=True)
        head.click()
        assert column(3) == before

        cell = tab.locator("[data-matrix='0'] tbody tr:nth-child(3) td:nth-child(2)")
        cell.hover()
        tip = tab.locator("#tip")
        assert (
            tip.is_visible()
            and "after stage 2" in tip.inner_text()
            and "since it was learned" in tip.inner_text()
        )
        box = tip.bounding_box()
        assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= width
        tab.mouse.move(5, 5)
        assert not tip.is_visible()
        cell.focus()
        assert tip.is_visible()

        tab.select_option("#which", "2")
        assert (
            tab.locator("[data-matrix='2']").is_visible()
            and not tab.locator("[data-matrix='0']").is_visible()
        )
        tab.locator("#runs summary").first.click()
        assert tab.locator("#runs dl").first.is_visible()
        pictures = "[...document.images].map(i => i.complete && i.naturalWidth > 50)"
        assert all(tab.evaluate(pictures)) and tab.evaluate("document.images.length") >= 3
        assert not said and [url for url in asked if not url.startswith(("file:", "data:"))] == []
        browser.close()
