"""A base that repairs itself looks as if it learned, transferred and did not forget; the controls
expose it (shared/numerics.md)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import gain_cl
from gain_cl import cli
from gain_cl.domains.generate import generate
from gain_cl.measure import record
from gain_cl.stats import matrix
from gain_cl.stats.matrix import LossMatrix

# --- by hand --------------------------------------------------------------------------------------


def summary(loss: np.ndarray) -> dict[str, float]:
    """Metrics of a matrix whose last column is the control."""
    names = [*"abc"[: loss.shape[1] - 1], "x"]
    nll = {d: 100 * loss[:, [j]] for j, d in enumerate(names)}
    found = matrix.summary(
        LossMatrix(nll, dict.fromkeys(names, np.array([100.0])), names[:-1], ["x"])
    )
    return {name: e.value for name, e in found.items()}


# A sound base: 0.30 learned in the own stage, 0.04 forgotten in each later one.
#                  a     b     c     x
SOUND = np.array(
    [
        [3.00, 2.00, 4.00, 2.50],
        [2.70, 2.00, 4.00, 2.50],
        [2.74, 1.70, 4.00, 2.50],
        [2.78, 1.74, 3.70, 2.50],
    ]
)
STAGE = np.arange(4)[:, None]


def test_repair_hides_forgetting_and_the_controls_show_it() -> None:
    """The same run on a base where everything, the control too, falls by another 0.10 in every
    stage."""
    sound, damaged = summary(SOUND), summary(SOUND - 0.10 * STAGE)
    assert sound["backward"] == pytest.approx((0.08 + 0.04) / 2)
    assert (
        damaged["backward"] == pytest.approx(0.06 - (0.20 + 0.10) / 2) and damaged["backward"] < 0
    )  # a 2.70 - 0.10 > 2.78 - 0.30
    assert damaged["backward_net"] == pytest.approx(0.06) == pytest.approx(sound["backward_net"])
    assert sound["zero_shot"] == 0 and damaged["zero_shot"] == pytest.approx(
        -(0.10 + 0.20) / 2
    )  # looks like transfer
    assert damaged["own_step"] == pytest.approx(-0.30 - 0.10)  # and like learning
    assert sound["controls_from_base"] == 0 and damaged["controls_from_base"] == pytest.approx(
        -0.30
    )  # what says so


def test_net_of_controls_is_right_for_drift_that_domain_and_control_share() -> None:
    """A limit: a domain that its own stage repairs in full has nothing left to repair later. Raw
    backward change is then right, and the control's further repair, subtracted, makes it look
    forgotten."""
    repaired = 0.10 * STAGE * np.ones(4)
    for k in (1, 2, 3):  # domain k-1 has all of its repair, 0.30, from its own stage on
        repaired[k:, k - 1] = 0.30
    found = summary(SOUND - repaired)
    assert found["backward"] == pytest.approx(0.06)
    assert found["backward_net"] == pytest.approx(0.06 + (0.20 + 0.10) / 2)


# --- a real one -----------------------------------------------------------------------------------

RUN = [
    "debug=smoke",
    "compute.threads=1",
    "method=full",
    "output_dir=runs",
    "results_dir=results",
    "eval.documents=30",
    "eval.window=256",
]
NOISE = 0.8  # standard deviation of the noise, of that of each weight matrix


def dialects(names: list[str], folder: Path, documents: int = 200) -> None:
    """Domains whose sentences are in turn of one common language and of one of their own, as texts
    of all subjects share English."""
    (folder / "domain").mkdir(parents=True)
    common = list(generate(99, documents * len(names)))
    for i, name in enumerate(names):
        pairs = zip(common[i * documents :], generate(i + 1, documents), strict=False)
        texts = [
            ". ".join(s for both in zip(a.split(". "), b.split(". "), strict=False) for s in both)
            for a, b in pairs
        ]
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        source = f"source: {{kind: files, path: {file}}}\nsplit: {{test: 0.25, dev: 0.1}}\n"
        (folder / "domain" / f"{name}.yaml").write_text(f"name: {name}\n{source}")


def damage(base: Path, folder: Path, seed: int) -> None:
    """A copy of a checkpoint with Gaussian noise on the weight matrices of its blocks."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, folder)
    (file,) = folder.glob("model*.safetensors")
    generator, tensors = torch.Generator().manual_seed(seed), load_file(file)
    for name in sorted(tensors):
        w = tensors[name]
        if w.ndim == 2 and "embed" not in name:
            tensors[name] = w + NOISE * w.std() * torch.randn(w.shape, generator=generator)
    save_file(tensors, file, {"format": "pt"})


def measured(run: record.Run) -> dict[str, matrix.Estimate]:
    return matrix.summary(
        LossMatrix.from_documents(run.documents, run.record.trained, run.record.controls)
    )


@pytest.mark.slow
def test_the_controls_expose_a_deliberately_damaged_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tiny model that knows eight dialects of a language (perplexity of a byte 264 > 4) learns
    two more, as it is and damaged.

    Measured, nats per token, seeds 0 and 1:
                         sound            damaged
        controls        -0.18  -0.18     -1.01  -0.80    the damage is seen where nothing was trained
        zero-shot part  -0.03  -0.04     -0.79  -0.61    repair looks like transfer
        backward        +0.05  +0.06     -0.12  -0.08    repair hides forgetting, and looks like its opposite
        backward_net    +0.14  +0.13     +0.10  +0.09    net of controls it does not
    Net of controls is right because the control is as familiar to the base as the domains. Not so
    elsewhere (4 or 5 settings of lora and full, noise 0.5 and 0.8, 2 seeds): where the base had
    learned the control's dialect too, damage moved net of controls by 0.04-0.20 and raw by
    0.03-0.24; where it had learned the domains and the control, languages with nothing in common,
    net by 0.07-0.74 and raw by 0.00-0.58, less in all 16 comparisons: the limit above. There, too,
    the controls fell by 0.3-1.2 nats. Six runs like the two here (full with seeds 0-3, lora at 1e-3
    with 0 and 1): net moved by 0.03-0.07, raw by 0.12-0.21.
    """
    monkeypatch.chdir(tmp_path)
    known = [f"known_{i}" for i in range(8)]
    dialects(["one", "two", "control", *known], tmp_path / "mine")
    teach = [
        *RUN,
        "regime=joint",
        f"domain=[{','.join(known)}]",
        "sequence.controls=[]",
        "train.steps=100",
        "train.lr=3e-3",
    ]
    base = gain_cl.run(*teach, "train.block=128", "train.batch_tokens=1024", config_dirs="mine")
    assert base.matrix.iloc[-1].max() < 5 < 200 < base.matrix.iloc[0].min()
    assert cli.main(["export", str(base.path), "to=merged", "dir=sound"]) == 0
    words = [
        *RUN,
        "domain=[one,two]",
        "sequence.controls=[control]",
        "train.steps=20",
        "train.lr=3e-4",
        "train.block=128",
    ]
    for seed in (0, 1):
        damage(Path("sound"), Path(f"damaged{seed}"), seed)
        sound, damaged = (
            measured(
                gain_cl.run(
                    *words,
                    "train.batch_tokens=512",
                    f"model.path={model}",
                    f"seed={seed}",
                    config_dirs="mine",
                )
            )
            for model in ("sound", f"damaged{seed}")
        )
        for name in sound:
            print(
                seed,
                name,
                *(
                    f"{e.value:+.3f} ({e.low:+.3f} to {e.high:+.3f})"
                    for e in (sound[name], damaged[name])
                ),
            )
        assert damaged["controls_from_base"].value < 3 * sound["controls_from_base"].value < 0
        assert damaged["zero_shot"].value < 3 * sound["zero_shot"].value < 0
        assert sound["backward"].low > 0 > damaged["backward"].high
        assert sound["backward_net"].low > 0 and damaged["backward_net"].low > 0
        off = {
            name: abs(damaged[name].value - sound[name].value)
            for name in ("backward", "backward_net")
        }
        assert off["backward_net"] < off["backward"] / 2
