"""The documents are true: code in docs/extending.md runs, the README's commands and names exist."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest

from gain_cl import cli
from gain_cl.config import presets
from gain_cl.measure import record
from gain_cl.paper import build, gather
from gain_cl.studies.experiments import load_experiment, planned_runs

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language ("" for none), without their first line."""
    fenced = [part.split("\n", 1) for part in text.split("```")[1::2]]
    return [body for name, body in fenced if name == language]


@pytest.fixture
def documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files of docs/extending.md, as a reader would save them."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/extending.md").read_text()
    for code in blocks(text, "python"):
        Path(code.splitlines()[0].split()[1].rstrip(":")).write_text(code)
    Path("mine/method").mkdir(parents=True)
    Path("mine/method/layer_gain.yaml").write_text(blocks(text, "yaml")[0])
    return tmp_path


def test_the_commands_of_extending_run(
    documented: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = [
        c
        for block in blocks((ROOT / "docs/extending.md").read_text(), "")
        for c in block.strip().splitlines()
    ]
    assert len(commands) == 2
    for command in commands:
        assert cli.main([*command.split()[3:], "compute.threads=1"]) == 0, capsys.readouterr().err
    line = (
        "run debug=smoke --plugin layer_gain.py --config-dir mine method=layer_gain "
        "compute.threads=1"
    )
    assert cli.main(line.split()) == 0
    path = Path(capsys.readouterr().out.splitlines()[-1].removeprefix("record: "))
    made = record.load(path).record
    assert made.method == "layer_gain" and made.trainable_parameters == 2
    assert made.stages[-1].domains["smoke_c"].nll_nats < made.stages[0].domains["smoke_c"].nll_nats
    assert cli.main(["export", str(path), "to=merged", "dir=merged"]) == 0
    assert float(re.findall(r"fp32: (\S+) of", capsys.readouterr().out)[0]) < 1e-5
    # as transformers loads it
    line = "score merged domain=[smoke_c] sequence.controls=[] debug=smoke compute.threads=1"
    assert cli.main(line.split()) == 0
    again = record.load(capsys.readouterr().out.splitlines()[-1].removeprefix("record: ")).record
    assert again.stages[1].domains["smoke_c"].nll_nats == pytest.approx(
        made.stages[-1].domains["smoke_c"].nll_nats, rel=1e-6
    )
    assert (
        again.stages[1].domains["smoke_c"].nll_nats != again.stages[0].domains["smoke_c"].nll_nats
    )


def test_the_plugins_of_extending_are_short() -> None:
    sizes = [
        len(code.strip().splitlines())
        for code in blocks((ROOT / "docs/extending.md").read_text(), "python")
    ]
    assert len(sizes) == 2 and max(sizes) <= 30, sizes


def test_a_domain_as_in_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import json

    monkeypatch.chdir(tmp_path)
    Path("texts").mkdir()
    rows = [
        {"body": f"Report {i}. " + "The pump was inspected and found in order. " * 5}
        for i in range(60)
    ]
    Path("texts/reports.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    Path("mine/domain").mkdir(parents=True)
    Path("mine/domain/reports.yaml").write_text(
        next(b for b in blocks(README, "yaml") if "reports" in b)
    )
    line = (
        "run debug=smoke compute.threads=1 --config-dir mine domain=[reports] "
        "sequence.controls=[] train.block=32 train.batch_tokens=64"
    )
    assert cli.main([*line.split(), "eval.documents=4"]) == 0


def test_readme_names_every_preset() -> None:
    for group in ("model", "method"):
        text = README[README.index(f"**{group.capitalize()}s**") :]
        named = set(
            re.findall(
                r"`([\w.]+)`",
                text[: text.index("\n\n**Methods" if group == "model" else "\n\n**Domains")],
            )
        )
        assert set(presets.names(group)) - {"custom", "tiny", "given"} <= named


def test_readme_shows_a_record_that_is_there() -> None:
    """Compare docs/example, to which the README points, with what `show` prints of its record."""
    from rich.console import Console

    from gain_cl.paper import show

    (path,) = (ROOT / "docs/example").glob("*.json")
    console = Console(
        width=120, record=True, force_terminal=False, color_system=None, file=io.StringIO()
    )
    show.render(record.load(path), {}, console)
    printed = [line.rstrip() for line in console.export_text().splitlines()]
    page = (ROOT / "docs/example/README.md").read_text()
    shown = [line.rstrip() for line in blocks(page, "")[0].strip("\n").splitlines()]
    assert shown[: shown.index("")] == printed[: printed.index("")]
    numbers = [line for line in printed if re.search(r"\d\.\d", line)]
    assert [line for line in numbers if line in shown] == numbers


def test_files_of_the_map_exist() -> None:
    chart = README[README.index("## Where everything is") :]
    places = [
        ROOT,
        ROOT / "src/gain_cl",
        *(p for p in (ROOT / "src/gain_cl").iterdir() if p.is_dir()),
    ]
    for name in re.findall(r"(?<![\w/])([\w/]+\.py|[\w]+/)", blocks(chart, "")[0]):
        assert any((place / name).exists() for place in places), name


def test_the_pilot_in_the_lab_book_is_its_records(capsys: pytest.CaptureFixture[str]) -> None:
    """Every figure of the pilot's two tables, from the committed records, by the command the lab
    book names."""
    import json

    assert cli.main(["compare", "experiment=pilot", f"results_dir={ROOT}/results", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    text = (ROOT / "experiments/LOG.md").read_text()
    pilot = text[text.index("## 2026-11-26: the pilot") :]

    def percent(cell: list[float], interval: bool = True) -> str:
        value, low, high = (f"{x:+.1f}" for x in (cell if interval else cell[:1] * 3))
        return f"{value} ({low} to {high})" if interval else value

    assert not found["absent"] and len(found["settings"]) == 25
    for s in found["settings"]:
        cells = [percent(s["own step %"]), percent(s["backward %"])]
        cells += [percent(s[f"{m} %"], False) for m in ("backward net of controls", "from base")]
        cells.append(percent(s["controls %"], False))
        assert f"| {s['setting']} | {s['trains'][0]:,.0f} | {' | '.join(cells)} |" in pilot
    for e in (e for e in found["skill"] if e["difference %"] and e["difference %"][1] is not None):
        names = ("at own step %", "backward %", "backward of lora %")
        cells = [*(percent(e[name], False) for name in names), percent(e["difference %"])]
        assert f"| {e['method']} | {' | '.join(cells)} |" in pilot


@pytest.mark.parametrize("folder", sorted(p.name for p in (ROOT / "results/tables").glob("*")))
def test_committed_tables_are_made_of_the_committed_records(folder: str) -> None:
    """To the byte: a record or a table that was touched shows here."""
    book = gather.gather(load_experiment(folder), [f"results_dir={ROOT}/results"])
    made = build.made_tables(book)
    there = {p.name: p.read_bytes() for p in (ROOT / "results/tables" / folder).iterdir()}
    assert there.keys() == made.keys()
    assert [name for name in there if there[name] != made[name]] == []


@pytest.mark.parametrize("place", ["results/runs", "docs/example"])
def test_no_record_holds_a_path_of_the_machine_it_was_made_on(place: str) -> None:
    for path in sorted((ROOT / place).glob("*.json")):
        assert not re.findall(r'"/[^"]*/[^"]*"|file://', path.read_text()), path.name


def quoted(text: str) -> list[tuple[str, str]]:
    """(number, its name) of each number in a text that is followed by <!--its name-->."""
    return re.findall(r"([-+]?[\d,]*\.?\d+|<0\.001|[a-z]+)%?(?: nats| points)?<!--([^>]+)-->", text)


@pytest.mark.parametrize("name", [n for n in ("study",) if (ROOT / f"docs/{n}.md").exists()])
def test_every_number_of_a_study_is_of_its_records(name: str) -> None:
    """Numbers in the text carry the name that results/tables/NAME/numbers.csv gives them; tables
    are those of results/tables/NAME."""
    text = (ROOT / f"docs/{name}.md").read_text()
    known = build.numbers(gather.gather(load_experiment(name), [f"results_dir={ROOT}/results"]))
    found = quoted(text)
    assert len(found) >= 20
    for number, called in found:
        assert known[called] == number, called
    for table, body in re.findall(r"<!-- table (\S+) -->\n(.*?)\n<!-- end -->", text, re.S):
        made = (ROOT / f"results/tables/{name}/{table}.md").read_text()
        assert body.strip() == made.partition("<details>")[0].strip(), table
    prose = re.sub(r"<!-- table .*?<!-- end -->|```.*?```", "", text, flags=re.S)
    assert (
        re.findall(
            r"[-+]\d+\.\d+", re.sub(r"[-+]?[\d,.]+%?(?: nats| points)?<!--[^>]+-->", "", prose)
        )
        == []
    )


def test_the_rates_in_the_lab_book_are_their_records() -> None:
    text = (ROOT / "experiments/LOG.md").read_text()
    log = text[text.index("## 2026-11-26: rates on the healed model") :]
    done = [
        c
        for c in planned_runs(load_experiment("lr"), [f"results_dir={ROOT}/results"])
        if c.state == "done"
    ]
    assert len(done) >= 11
    for cell in done:
        r = record.load(cell.record).record
        loss, (first, second) = r.losses(), r.trained
        learned = [
            loss[r.trained.index(d) + 1, r.trained.index(d)] - loss[0, r.trained.index(d)]
            for d in (first, second)
        ]
        rate = f"{r.config['train']['lr']:.0e}".replace("e-0", "e-")
        words = [f"{x:+.3f}" for x in learned] + [
            f"**{sum(learned) / 2:+.3f}**",
            f"{loss[2, 1] - loss[1, 1]:+.3f}",
        ]
        assert (
            f"| {cell.method} | {rate} | {' | '.join(words)} | {loss[2, 0] - loss[1, 0]:+.3f} |"
            in log
        )


def test_the_guard_of_extending_keeps_its_past(documented: Path) -> None:
    """What it remembers is in its state, as a resumed run gives it back."""
    import importlib.util

    import torch

    from conftest import tiny
    from gain_cl import adapters
    from gain_cl.config import schema

    spec = importlib.util.spec_from_file_location("pull_back", documented / "pull_back.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    loaded = tiny("llama")
    adapter = adapters.build_adapter(schema.Gain(kind="gain", roles=["attn_out"], side="input"))
    adapter.attach(loaded)
    guards = [module.PullBack(), module.PullBack()]
    for guard in guards:
        guard.attach(loaded, adapter, 0)
    assert guards[0].state() == {} and guards[1].penalty() is None
    guards[0].after_stage(1, "a", None)
    guards[1].load_state(guards[0].state())
    with torch.no_grad():
        for p in adapter.parameters().values():
            p.add_(1)
    one, two = (guard.penalty() for guard in guards)
    assert one is not None and two is not None and one > 0 and torch.equal(one, two)
