"""Records altered at random and sealed again: what reads them answers with a number or with one
line, never a traceback or a hang.

Each mutation is a function of its number, so a failure names it: ``damaged(data, 1234)`` makes it
again.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import random
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

import synthetic
from gain_cl.errors import GainError
from gain_cl.measure import record
from gain_cl.paper import show
from gain_cl.runs import finish, heatmap
from gain_cl.stats import answers
from gain_cl.system.sealed import seal_of

EXAMPLE = Path(__file__).parents[2] / "docs/example"
MUTATIONS, SHARDS = 10_000, 10
HANG_SECONDS = 20  # of one mutation; it takes milliseconds
PICTURE_EVERY = 250  # heat maps cost half a second

VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**30, 0.5, -0.0, 1e-320, 1e308, -1e308, "", "0", "1e9", "nan", "../../x",
    "\x1b[2J\x07", "[bold]x[/]", "[/]", "=cmd()", "\u202e", "a\nb", "\0", "x" * 3000, [], {}, [[]], [None], [{}],
    {"": None}, {"a": {"b": []}},
]  # fmt: skip
TOKENS = [
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "-1e999",
    "9" * 5000,
    "1" + "0" * 400,
    "-0",
    "1e-999",
    '"\\ud800"',
    '"\\u001b[31m"',
    "tru",
    "0x1",
]
SLOT = "@slot@"  # where a token that json.dumps would not write goes


# --- mutations ------------------------------------------------------------------------------------


def damaged(data: bytes, number: int) -> bytes:
    """The record's bytes after mutation ``number``, before it is sealed again."""
    r = random.Random(number)
    kind = r.choice([_bytes, _bytes, _text, _tree, _tree, _tree, _tree, _tree, _token])
    return kind(data, r)


def sealed(data: bytes, seal: str) -> bytes:
    """Altered bytes with the seal that fits them in the place of the old one, where they are JSON
    data and still have it."""
    try:
        plain = json.loads(data)
        return (
            data.replace(seal.encode(), seal_of(plain).encode())
            if isinstance(plain, dict)
            else data
        )
    except (ValueError, RecursionError):
        return data


def _bytes(data: bytes, r: random.Random) -> bytes:
    """Flipped bits, lost or doubled stretches, an early end, bytes that are no UTF-8."""
    out = bytearray(data)
    for _ in range(r.choice([1, 1, 1, 2, 8])):
        at = r.randrange(len(out))
        match r.randrange(6):
            case 0 | 1:
                out[at] ^= 1 << r.randrange(8)
            case 2:
                del out[at : at + r.choice([1, 2, 50, 5000])]
            case 3:
                out[at:at] = out[at : at + r.choice([1, 10, 1000])]
            case 4:
                del out[at:]
            case 5:
                out[at:at] = r.choice(
                    [b"\xff", b"\xfe\xff", b"\x00", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\x1b[2J"]
                )
        if not out:
            break
    return bytes(out)


def _text(data: bytes, r: random.Random) -> bytes:
    """Another document altogether, deep nesting, a number written otherwise, a key twice."""
    text = data.decode()
    match r.randrange(4):
        case 0:
            deep = r.choice([50, 990, 1_100, 100_000])
            opening, closing = r.choice([("[", "]"), ('{"a":', "}")])
            whole = opening * deep + "1" + closing * r.choice([0, deep])
            return (
                whole
                if r.random() < 0.5
                else text.replace('"pins": {', f'"pins": {{"x": {whole},', 1)
            ).encode()
        case 1:
            return r.choice(
                [
                    b"",
                    b"null",
                    b"[]",
                    b"{}",
                    b"0",
                    b'""',
                    b"\xef\xbb\xbf" + data,
                    data + data,
                    b" " * 1000,
                    data.decode().encode("utf-16"),
                ]
            )
        case 2:
            numbers = list(re.finditer(r"-?\d+(\.\d+)?", text))
            at = r.choice(numbers)
            new = r.choice(
                [
                    f'"{at[0]}"',
                    f"-{at[0]}",
                    at[0] + "0" * r.randrange(1, 40),
                    at[0] + "e400",
                    f"[{at[0]}]",
                    "0",
                    at[0] + ".5",
                ]
            )
            return (text[: at.start()] + new + text[at.end() :]).encode()
        case _:
            lines = text.split("\n")
            at = r.randrange(len(lines))
            return "\n".join([*lines[:at], lines[at], *lines[at:]]).encode()


def _tree(data: bytes, r: random.Random) -> bytes:
    """One to three values replaced, removed, renamed, doubled or swapped."""
    tree = json.loads(data)
    for _ in range(r.choice([1, 1, 2, 3])):
        parent, key = _somewhere(tree, r)
        if parent is None:
            break
        match r.randrange(6):
            case 0 | 1 | 2:
                parent[key] = _like(parent[key], r) if r.random() < 0.5 else r.choice(VALUES)
            case 3:
                del parent[key]
            case 4:
                other, place = _somewhere(tree, r)
                if other is not None:
                    with contextlib.suppress(
                        KeyError, IndexError
                    ):  # one of the two may lie within the other
                        parent[key], other[place] = (
                            json.loads(json.dumps(other[place])),
                            json.loads(json.dumps(parent[key])),
                        )
            case 5 if isinstance(parent, list):
                parent.insert(key, parent[key])
            case 5:
                parent[r.choice(["x", "", "../x", "\x1b[1m", key.upper(), f"{key} "])] = parent.pop(
                    key
                )
    return json.dumps(tree).encode()


def _like(value: Any, r: random.Random) -> Any:
    """Another value of the same type: what types alone do not catch."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int):
        return r.choice([0, -value, value + 1, value - 1, value * 1000, 2**62])
    if isinstance(value, float):
        return r.choice([0.0, -value, value * 1e6, value * 1e-6, 1e300, 1e-300])
    if isinstance(value, str):
        return r.choice(
            [
                "",
                value + "x",
                value[:-1],
                value.upper(),
                f"{value}\x1b[31m",
                f"{value}\n",
                value * 50,
            ]
        )
    return list(reversed(value)) if isinstance(value, list) else dict(list(value.items())[1:])


def _token(data: bytes, r: random.Random) -> bytes:
    tree = json.loads(data)
    parent, key = _somewhere(tree, r)
    if parent is not None:
        parent[key] = SLOT
    return json.dumps(tree).replace(f'"{SLOT}"', r.choice(TOKENS)).encode()


def _somewhere(tree: Any, r: random.Random) -> tuple[Any, Any]:
    """(container, key) of a value, by a random walk from the root: a shallow value is as likely as
    a deep one."""
    parent, key, node = None, None, tree
    while isinstance(node, dict | list) and node and (parent is None or r.random() < 0.8):
        parent, key = (
            node,
            r.choice(list(node)) if isinstance(node, dict) else r.randrange(len(node)),
        )
        node = node[key]
    return parent, key


# --- reading what came of it ----------------------------------------------------------------------


@contextlib.contextmanager
def no_hang(what: str) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"{what} hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(HANG_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def consume(path: Path, picture: bool) -> bool:
    """Everything that reads a record; True when it was loaded. Errors other than GainError pass."""
    try:
        run = record.load(path)
    except GainError as error:
        assert "\n" not in str(error) and "\x1b" not in str(error)
        return False
    uses: list[Callable[[], object]] = [
        lambda: finish.matrix_csv(run),
        lambda: repr(run),
        lambda: _shown(run),
    ]
    uses += [lambda: heatmap.matrix_png(run)] * picture
    for use in uses:
        with contextlib.suppress(GainError):
            use()
    for stage in run.record.stages:
        for task in stage.tasks:
            with contextlib.suppress(GainError):
                answers.answers(run.items, task, stage.index)
    return True


def _shown(run: record.Run) -> None:
    out = io.StringIO()
    try:
        show.render(run, out=Console(file=out, width=120))
    finally:
        said = out.getvalue()
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", said), (
            "a control character of a record reaches the terminal"
        )


def campaign(source: Path, folder: Path, numbers: range) -> float:
    """Share of the mutations that were loaded."""
    data, path = source.read_bytes(), folder / "r.json"
    record.items_path(path).write_bytes(record.items_path(source).read_bytes())
    loaded, seal = 0, json.loads(data)["seal"]
    for number in numbers:
        path.write_bytes(sealed(damaged(data, number), seal))
        try:
            with no_hang(f"mutation {number}"):
                loaded += consume(path, picture=number % PICTURE_EVERY == 0)
        except Exception as error:
            raise AssertionError(
                f"mutation {number} of {source.name}: {type(error).__name__}: {error}"
            ) from error
    return loaded / len(numbers)


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bootstrap is most of the time."""
    monkeypatch.setattr(answers, "RESAMPLES", 20)


def small(folder: Path, tasks: bool) -> record.Run:
    """A record with everything in it, and few values."""
    bases = {"a": 20.0, "b": 10.0, "x": 30.0}
    return synthetic.run(
        folder / "s" / "r.json",
        bases=bases,
        controls=["x"],
        count=4,
        with_items=tasks,
        notes=["a note"],
    )


@pytest.mark.parametrize(
    "shard", [k if k < 2 else pytest.param(k, marks=pytest.mark.slow) for k in range(SHARDS)]
)
def test_altered_records(shard: int, tmp_path: Path) -> None:
    size = MUTATIONS // SHARDS
    share = campaign(
        small(tmp_path, tasks=shard == 0).path, tmp_path, range(shard * size, (shard + 1) * size)
    )
    assert 0.05 < share < 0.5, "both what is refused and what is read must be tried"


def test_what_is_not_sealed_again_is_refused(tmp_path: Path) -> None:
    path = small(tmp_path, tasks=True).path
    data = path.read_bytes()
    for number in range(500):
        path.write_bytes(altered := damaged(data, number))
        with contextlib.suppress(GainError):
            record.load(path)
            assert json.loads(altered) == json.loads(data), f"mutation {number} is read"


def test_altered_example(tmp_path: Path) -> None:
    (source,) = EXAMPLE.glob("*.json")
    assert 0.05 < campaign(source, tmp_path, range(100)) < 0.5


# --- values that are wrong and yet those the record was written with ------------------------------

WRONG: dict[str, Any] = {
    "stage": [-1, 0, 7, 2**40],
    "domain": ["", "b", "\x1b[2J", "nowhere"],
    "split": ["dev", "", None],
    "document": ["", "same", None],
    "nll_nats": [float("nan"), float("inf"), -1.0, 0.0, 1e300, None],
    "tokens": [0, -1, 2**62, None],
    "bytes": [0, -5, None],
    "kind": ["", "item", "document", None],
    "task": ["", "other", None],
    "item": ["", "same", None],
    "gold": [-1, 9, None],
    "logprobs": [[], [0.0], [float("nan"), 0.0], [float("-inf")] * 2, [1e308, -1e308, 0.0], None],
    "choice_bytes": [[], [0, 0], None],
    "choice_chars": [[], [0, 0], [1], None],
}


def rewritten(path: Path, values: bytes) -> None:
    """Another values file beside the record, with its hash in the record."""
    record.items_path(path).write_bytes(values)
    synthetic.edit(path, lambda tree: tree.update(items_sha256=hashlib.sha256(values).hexdigest()))


@pytest.mark.parametrize("column", WRONG)
def test_altered_values(column: str, tmp_path: Path) -> None:
    """One cell, half of the rows or all of them; the column in another type, twice the rows, no
    column at all."""
    path = small(tmp_path, tasks=True).path
    good = pd.read_parquet(record.items_path(path))
    r = random.Random(column)
    for value in WRONG[column]:
        for share in (0.0, 0.5, 1.0):
            changed = good.copy()
            chosen = {r.randrange(len(good))} | {i for i in range(len(good)) if r.random() < share}
            changed[column] = pd.Series(
                [value if i in chosen else v for i, v in enumerate(good[column])], dtype=object
            ).infer_objects()
            _try(path, changed)
    for changed in (
        good.drop(columns=column),
        good.assign(**{column: good[column].astype(str)}),
        good.assign(**{column: None}),
        good.iloc[:0],
    ):
        _try(path, changed)
    _try(path, pd.concat([good, good]))


def _try(path: Path, values: pd.DataFrame) -> None:
    buffer = io.BytesIO()
    values.to_parquet(buffer, index=False)
    rewritten(path, buffer.getvalue())
    with no_hang(f"{path}"):
        consume(path, picture=False)


@pytest.mark.parametrize(
    "values",
    [b"", b"PAR1", b"x" * 1000, b"PAR1" + bytes(1000) + b"PAR1"],
    ids=["empty", "head", "text", "zeros"],
)
def test_values_that_are_no_table(values: bytes, tmp_path: Path) -> None:
    path = small(tmp_path, tasks=True).path
    rewritten(path, values)
    with pytest.raises(GainError, match="per-item values cannot be read"):
        record.load(path)
