"""A record on disk: what is read is what was written, a fault is one clear error, nothing
half-written is ever seen."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import synthetic
from conftest import HELPERS
from gain_cl.errors import DataError, StorageError
from gain_cl.measure import record
from gain_cl.system import files
from gain_cl.system.sealed import seal_of

SMALL = {"a": 20.0, "b": 30.0, "x": 10.0}


@pytest.fixture
def saved(tmp_path: Path) -> record.Run:
    return synthetic.run(tmp_path / "runs" / "r.json", bases=SMALL, controls=["x"], count=4)


def leftovers(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.endswith(".tmp")]


def test_round_trip(saved: record.Run, tmp_path: Path) -> None:
    again = record.load(saved.path)
    assert again.record == saved.record
    pd.testing.assert_frame_equal(again.documents, saved.documents)
    pd.testing.assert_frame_equal(again.items, saved.items)
    source = synthetic.documents(SMALL, ["a", "b"], count=4)
    pd.testing.assert_frame_equal(again.documents, source, check_dtype=False)
    assert (
        again.documents.nll_nats.to_numpy() == source.nll_nats.to_numpy()
    ).all()  # to the last bit
    assert again.documents.dtypes[["stage", "tokens", "bytes"]].map(str).tolist() == ["int64"] * 3
    assert again.items.gold.dtype == np.int64 and len(again.items.logprobs[0]) == 2
    assert leftovers(saved.path.parent) == []


def test_saving_twice_gives_the_same_bytes(saved: record.Run, tmp_path: Path) -> None:
    other = synthetic.run(tmp_path / "other" / "r.json", bases=SMALL, controls=["x"], count=4)
    assert other.path.read_bytes() == saved.path.read_bytes()
    assert record.items_path(other.path).read_bytes() == record.items_path(saved.path).read_bytes()


def test_without_task_items(tmp_path: Path) -> None:
    run = synthetic.run(tmp_path / "r.json", bases=SMALL, controls=["x"], count=4, with_items=False)
    assert (
        len(run.items) == 0
        and list(run.items.columns) == record.ITEM_COLUMNS
        and len(run.documents)
    )


def test_ratios_come_from_sums() -> None:
    score = record.DomainScore(nll_nats=200.0, tokens=100, bytes=400, documents=3)
    assert score.loss_nats == 2.0
    assert score.perplexity == pytest.approx(math.e**2)
    assert score.bits_per_byte == pytest.approx(200 / math.log(2) / 400)


def test_matrix_is_a_data_frame_of_perplexities(saved: record.Run) -> None:
    m = saved.matrix
    assert m.shape == (3, 3) and list(m.columns) == ["a", "b", "x"]
    assert list(m.index) == ["0 pretrained", "1 a", "2 b"] and m.index.name == "stage"
    assert m.loc["2 b", "x"] == saved.record.stages[2].domains["x"].perplexity


def test_a_domain_that_was_not_scored_is_nan(saved: record.Run) -> None:
    del saved.record.stages[1].domains["x"]
    assert math.isnan(saved.matrix.loc["1 a", "x"]) and saved.matrix.isna().to_numpy().sum() == 1


# --- faults ---------------------------------------------------------------------------------------


def test_no_record(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no record"):
        record.load(tmp_path / "r.json")


def test_a_folder_is_no_record(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot read"):
        record.load(tmp_path)


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"null", b'{"run_id": "r"}', b"\xff\xfe{}", b'{"run_id": NaN}'],
    ids=["empty", "cut", "list", "null", "fields missing", "not UTF-8", "NaN"],
)
def test_malformed_record(saved: record.Run, text: bytes) -> None:
    saved.path.write_bytes(text)
    with pytest.raises(DataError, match="not a run record") as caught:
        record.load(saved.path)
    assert str(saved.path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("change", ["extra", "type", "nan"])
def test_altered_record(saved: record.Run, change: str) -> None:
    raw = json.loads(saved.path.read_text())
    if change == "extra":
        raw["surprise"] = 1
    elif change == "type":
        raw["stages"][0]["domains"]["a"]["tokens"] = "many"
    else:
        raw["stages"][0]["domains"]["a"]["nll_nats"] = None
    saved.path.write_text(json.dumps(raw))
    with pytest.raises(DataError, match="not a run record"):
        record.load(saved.path)


def test_missing_items(saved: record.Run) -> None:
    record.items_path(saved.path).unlink()
    with pytest.raises(DataError, match="per-item values are missing"):
        record.load(saved.path)


@pytest.mark.parametrize("fault", ["flip", "truncate", "swap"])
def test_items_that_are_not_the_records(saved: record.Run, tmp_path: Path, fault: str) -> None:
    path = record.items_path(saved.path)
    data = bytearray(path.read_bytes())
    if fault == "flip":
        data[len(data) // 2] ^= 1
    elif fault == "truncate":
        del data[-10:]
    else:
        data = bytearray(
            record.items_path(
                synthetic.run(
                    tmp_path / "o" / "r.json", bases=SMALL, controls=["x"], count=4, seed=1
                ).path
            ).read_bytes()
        )
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match="not those the record was written with"):
        record.load(saved.path)


def test_nan_is_refused_and_nothing_is_written(saved: record.Run, tmp_path: Path) -> None:
    before = {p: p.read_bytes() for p in saved.path.parent.iterdir()}
    broken = saved.record.model_copy(deep=True)
    broken.stages[1].train.last_loss_nats = math.nan  # type: ignore[union-attr]
    with pytest.raises(DataError, match="not finite"):
        record.save(broken, saved.documents, saved.items, saved.path)
    with pytest.raises(DataError, match="not finite"):
        record.save(
            saved.record, saved.documents.assign(nll_nats=math.inf), saved.items, saved.path
        )
    with pytest.raises(DataError, match="not finite"):
        record.save(broken, saved.documents, saved.items, tmp_path / "new" / "r.json")
    assert {p: p.read_bytes() for p in saved.path.parent.iterdir()} == before
    assert not (tmp_path / "new").exists()


# --- the seal -------------------------------------------------------------------------------------


def seal_broken(path: Path) -> None:
    with pytest.raises(DataError, match="seal") as caught:
        record.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "before",
    ['"nll_nats": ', '"seconds": 41.', '"trainable_parameters": ', '"seconds": 7', '"lr": 0.00'],
    ids=["a sum", "train seconds", "parameters", "provenance", "config"],
)
def test_a_digit_edited_by_hand(saved: record.Run, before: str) -> None:
    text = saved.path.read_text()
    at = text.index(before) + len(before)
    assert text[at].isdigit()
    saved.path.write_text(text[:at] + ("2" if text[at] == "1" else "1") + text[at + 1 :])
    seal_broken(saved.path)


def test_digits_all_over_a_record(saved: record.Run) -> None:
    text = saved.path.read_text()
    for at in [i for i, c in enumerate(text) if c in "0123456789"][::4]:
        edited = text[:at] + ("2" if text[at] == "1" else "1") + text[at + 1 :]
        if json.loads(edited) != json.loads(text):  # the 17th digit of a number may say nothing
            saved.path.write_text(edited)
            with pytest.raises(DataError):
                record.load(saved.path)


@pytest.mark.parametrize(
    "style",
    [{}, {"indent": 4}, {"sort_keys": True, "separators": (",", ":")}],
    ids=["line", "indent", "order"],
)
def test_a_record_may_be_formatted_otherwise(saved: record.Run, style: dict[str, Any]) -> None:
    saved.path.write_text(json.dumps(json.loads(saved.path.read_text()), **style))
    assert record.load(saved.path).record == saved.record


def test_a_record_without_seal(saved: record.Run) -> None:
    raw = json.loads(saved.path.read_text())
    for unsealed in ({k: v for k, v in raw.items() if k != "seal"}, raw | {"seal": ""}):
        saved.path.write_text(json.dumps(unsealed))
        seal_broken(saved.path)


def test_save_seals(saved: record.Run) -> None:
    changed = saved.record.model_copy(update={"seed": 7, "seal": "0" * 64}, deep=True)
    for run in (
        saved,
        record.save(changed, saved.documents, saved.items, saved.path.with_name("s.json")),
    ):
        raw = json.loads(run.path.read_text())
        assert raw["seal"] == run.record.seal == seal_of(raw)
    assert changed.seal != saved.record.seal


# --- writing --------------------------------------------------------------------------------------


def test_write_replaces_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "f"
    files.write_bytes(path, b"old" * 1000)
    with open(path, "rb") as reader:
        files.write_bytes(path, b"new")
        assert reader.read() == b"old" * 1000  # who has it open still reads the old file
    assert path.read_bytes() == b"new" and leftovers(path.parent) == []


def test_a_failing_rename_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f"
    files.write_bytes(path, b"old")

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(StorageError, match="No space left") as caught:
        files.write_bytes(path, b"new")
    assert (
        caught.value.exit_code == 74 and path.read_bytes() == b"old" and leftovers(tmp_path) == []
    )


def test_an_interrupt_leaves_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.write_bytes(tmp_path / "f", b"new")
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        files.write_bytes(tmp_path / "runs" / "r.json", b"new")


def test_a_second_save_that_fails_keeps_both_old_files(
    saved: record.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The items fit on the disk, the record does not: the old record must still find the items it
    was written with."""
    calls, fsync = [], os.fsync

    def second_fails(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", second_fails)
    with pytest.raises(StorageError):
        record.save(
            saved.record.model_copy(deep=True),
            saved.documents.assign(nll_nats=1.0),
            saved.items,
            saved.path,
        )
    monkeypatch.undo()
    pd.testing.assert_frame_equal(record.load(saved.path).documents, saved.documents)
    assert leftovers(saved.path.parent) == []


@pytest.mark.skipif(os.name != "posix", reason="RLIMIT_FSIZE")
def test_disk_full(saved: record.Run) -> None:
    """The write of a second record stops at so many bytes: a StorageError, the first one still
    reads, no leftovers."""
    script = textwrap.dedent(f"""
        import resource, signal
        from pathlib import Path
        import synthetic
        from gain_cl import errors
        from gain_cl.measure import record
        path = Path({str(saved.path)!r})
        run = record.load(path)
        documents = synthetic.documents({SMALL!r}, ["a", "b"], count=400, seed=9)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        for room in (0, 1, 100, 5_000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
            try:
                record.save(run.record, documents, run.items, path)
            except errors.StorageError:
                print(room)
    """)
    env = {**os.environ, "PYTHONPATH": HELPERS}
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, stdout=subprocess.PIPE, text=True, timeout=60
    )
    assert done.stdout.split() == ["0", "1", "100", "5000"]
    assert record.load(saved.path).record == saved.record
    assert leftovers(saved.path.parent) == []
