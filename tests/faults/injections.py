"""Faults, planted in the process of a trial before its run begins (tests/campaign.py:
``patch="injections:NAME,ARGUMENT"``).

Arguments are text, for they come through a pipe. ``at`` counts the calls of a place from 1, over
the whole attempt. Functions called ``twin_...`` break the program itself: a campaign that does not
notice them proves nothing.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import importlib
import itertools
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gain_cl.errors import DataError

_parameters: list[Any] = []
"""The trainable parameters of the run, once ``_watch`` has seen a stage begin."""


def _watch() -> None:
    from gain_cl.runs import train

    real = train.stage

    def stage(loaded: Any, adapter: Any, *a: Any, **k: Any) -> Any:
        _parameters[:] = adapter.parameters().values()
        return real(loaded, adapter, *a, **k)

    train.stage = stage


def _at(place: str, at: int, change: Callable[..., Any]) -> None:
    """Call number ``at`` of MODULE.NAME becomes change(original, ...)."""
    module, _, name = place.rpartition(".")
    owner = importlib.import_module(module)
    real, calls = getattr(owner, name), itertools.count(1)
    setattr(
        owner, name, lambda *a, **k: change(real, *a, **k) if next(calls) == at else real(*a, **k)
    )


# --- numbers that are none ------------------------------------------------------------------------


def not_finite(where: str, value: str, at: str) -> None:
    """nan or inf in the loss, gradient, gain or hidden state of forward pass ``at`` of training, or
    in a scored token."""
    import torch

    number = float(value)

    def loss(real: Any, *a: Any) -> Any:
        return real(*a) * number

    def gradient(real: Any, *a: Any) -> Any:
        total = real(*a)
        total.register_hook(lambda g: g * number)
        return total

    def gain(real: Any, loaded: Any, *a: Any) -> Any:
        with torch.no_grad():
            _parameters[0].view(-1)[0] = number
        return real(loaded, *a)

    def hidden(real: Any, states: Any, *a: Any) -> Any:
        planted = torch.zeros_like(states)
        planted[0, 0] = number
        return real(states + planted, *a)

    def score(real: Any, *a: Any) -> Any:
        nll = real(*a)
        nll[len(nll) // 2] = number
        return nll

    places: dict[str, tuple[str, Callable[..., Any]]] = {
        "loss": ("gain_cl.runs.train.loss_sum", loss),
        "gradient": ("gain_cl.runs.train.loss_sum", gradient),
        "gain": ("gain_cl.runs.train.loss_sum", gain),
        "hidden": ("gain_cl.models.forward.sum_cross_entropy", hidden),
        "score": ("gain_cl.measure.perplexity.token_nll", score),
    }
    _watch()
    _at(places[where][0], int(at), places[where][1])


def parameters_untouched(file: str) -> None:
    """Tells in ``file`` whether the trained parameters are, after the error, the bytes they were
    when the gradient was known."""
    from gain_cl.runs import train

    stage, gradient = train.stage, train._gradient
    before: list[bytes] = []

    def held() -> list[bytes]:
        return [p.detach().numpy().tobytes() for p in _parameters]

    def gradient_and_copy(*a: Any) -> float | None:
        found = gradient(*a)
        before[:] = held()
        return found

    def watched(*a: Any, **k: Any) -> Any:
        try:
            yield from stage(*a, **k)
        except DataError:
            Path(file).write_text("untouched" if held() == before else "changed")
            raise

    train.stage, train._gradient = watched, gradient_and_copy


def in_task(fault: str, at: str) -> None:
    """From batch ``at`` of the tasks on: log-likelihoods that are nan, or no memory (cuda)."""
    import torch

    from gain_cl.measure import asking

    real, calls = asking.token_answers, itertools.count(1)

    def call(*a: Any) -> Any:
        logp, best = real(*a)
        if next(calls) < int(at):
            return logp, best
        if fault == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return logp * float(fault), best

    asking.token_answers = call


def twin_nan_is_zero() -> None:
    """NaN filtered: a token whose loss is not a number counts as nothing."""
    from gain_cl.measure import perplexity

    real = perplexity.token_nll
    perplexity.token_nll = lambda *a: real(*a).nan_to_num(0, 0, 0)  # type: ignore[assignment]


def twin_step_skipped() -> None:
    """NaN filtered: a step whose loss is not a number is passed over, as some trainers do."""
    from gain_cl.runs import train

    real = train._gradient

    def gradient(*a: Any) -> Any:
        found = real(*a)
        gradients = [p.grad for p in _parameters if p.grad is not None]
        if found is not None and not all(t.isfinite().all() for t in [*found, *gradients]):
            for g in gradients:
                g.zero_()
            return [t.new_zeros(()) for t in found]
        return found

    train._gradient = gradient


def spike(at: str, jump: str) -> None:
    """The loss of one forward pass is ``jump`` nats higher a token; its gradient is as it was."""
    _at(
        "gain_cl.runs.train.loss_sum",
        int(at),
        lambda real, loaded, tokens, *a: real(loaded, tokens, *a) + float(jump) * tokens.size,
    )


def keep_checkpoints() -> None:
    """Every checkpoint stays, also after the end."""
    from gain_cl.runs import finish
    from gain_cl.system import checkpoint

    checkpoint.prune = lambda *_: None  # type: ignore[assignment]
    finish.sweep = lambda _: None


# --- memory ---------------------------------------------------------------------------------------


def out_of_memory(where: str, kind: str, *at: str) -> None:
    """No memory in the named calls: forward and backward passes of training, updates, scored
    batches. kind: cuda, cpu or python."""
    import torch

    cpu = (
        "[enforce fail at alloc_cpu.cpp:119] . DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 4096 bytes."
    )
    errors = {
        "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
        "cpu": RuntimeError(cpu),
        "python": MemoryError(),
    }

    def fail(*_: Any) -> Any:
        raise errors[kind]

    def backward(real: Any, *a: Any) -> Any:
        total = real(*a)
        handle = _parameters[0].register_hook(
            lambda _: handle.remove() or fail()
        )  # the first layer's: the others have their gradient
        return total

    places: dict[str, tuple[str, Callable[..., Any]]] = {
        "forward": ("gain_cl.models.forward.sum_cross_entropy", fail),
        "backward": ("gain_cl.runs.train.loss_sum", backward),
        "score": ("gain_cl.measure.perplexity.token_nll", fail),
    }
    if where == "update":
        real, calls = torch.optim.AdamW.step, itertools.count(1)
        torch.optim.AdamW.step = lambda *a, **k: fail() if str(next(calls)) in at else real(*a, **k)  # type: ignore[method-assign]
        return
    _watch()
    for number in map(int, at):
        _at(places[where][0], number, places[where][1])


def smaller_from(at: str, sequences: str) -> None:
    """What running out of memory must come to: from step ``at`` on, so many sequences a forward
    pass, without any fault."""
    from gain_cl.runs import train

    real, calls = train._gradient, itertools.count(1)

    def gradient(
        loaded: Any, guard: Any, batch: Any, settings: Any, size: int, seed: int
    ) -> float | None:
        return real(
            loaded,
            guard,
            batch,
            settings,
            min(size, int(sequences)) if next(calls) >= int(at) else size,
            seed,
        )

    train._gradient = gradient


def trace_batches(file: str) -> None:
    """A line for each step that was carried through: hash of its tokens, in order."""
    from gain_cl.runs import train

    real = train._gradient

    def gradient(loaded: Any, guard: Any, batch: Any, *a: Any) -> float | None:
        found = real(loaded, guard, batch, *a)
        if found is not None:
            with open(file, "a") as f:
                f.write(hashlib.sha256(batch.tokens_ST.tobytes()).hexdigest() + "\n")
        return found

    train._gradient = gradient


def twin_gradient_kept() -> None:
    """What was added up before memory ran out stays in the gradient."""
    from gain_cl.runs import train

    real = train._gradient
    kept: list[tuple[Any, Any]] = []

    def gradient(*a: Any) -> float | None:
        for p, g in kept:
            p.grad = g
        kept.clear()
        found = real(*a)
        if found is None:
            kept.extend((p, p.grad) for p in _parameters if p.grad is not None)
        return found

    train._gradient = gradient


def twin_batch_dropped() -> None:
    """When memory runs out, only the first half of the sequences is learned."""
    from gain_cl.runs import train

    real = train._gradient

    def gradient(
        loaded: Any, guard: Any, batch: Any, settings: Any, size: int, seed: int
    ) -> float | None:
        if size < settings.sequences:
            batch = type(batch)(*(part[:size] for part in batch))
        return real(loaded, guard, batch, settings, size, seed)

    train._gradient = gradient


def die(name: str, at: str) -> None:
    """kill -9 when the place ``name`` is reached for the ``at``-th time."""
    os.environ["GAIN_CL_FAILPOINT"] = f"{name}@{at}"


# --- disk -----------------------------------------------------------------------------------------


def disk_full(name: str, at: str, room: str) -> None:
    """From the ``at``-th time the place ``name`` (failpoints) is reached no file can grow beyond
    ``room`` bytes: a write stops in the middle, as on a full disk. What the command prints at its
    end is spared."""
    calls = itertools.count(1)

    def reach(reached: str) -> None:
        if reached == name and next(calls) == int(at):
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(room), resource.RLIM_INFINITY))

    _reached(reach)
    spare_messages()


def twin_in_place() -> None:
    """Checkpoints are written where they are read, not under another name first."""
    from gain_cl.system import checkpoint

    def save(folder: Path, files: Any) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                checkpoint.reach("save.before_write")
                checkpoint._write(folder / name, content)
            (folder / checkpoint.MANIFEST).write_bytes(
                checkpoint._manifest({name: checkpoint._facts(folder / name) for name in files})
            )
        except OSError as error:
            raise checkpoint._refused(error, folder, files) from error

    checkpoint.save = save


def refused(name: str, at: str, code: str) -> None:
    """The system calls after the ``at``-th ``name`` answer ``code`` (EROFS, ENOSPC, EIO, EACCES) to
    whatever would change a folder."""
    calls, armed = itertools.count(1), [False]

    def reach(reached: str) -> None:
        armed[0] = armed[0] or (reached == name and next(calls) == int(at))

    _reached(reach)
    number = getattr(errno, code)
    for owner, function in (
        (os, "replace"),
        (os, "rename"),
        (os, "mkdir"),
        (os, "link"),
        (os, "unlink"),
        (os, "rmdir"),
        (os, "fsync"),
    ):
        real = getattr(owner, function)

        def call(*a: Any, real: Any = real, **k: Any) -> Any:
            if armed[0]:
                raise OSError(number, os.strerror(number), str(a[0]))
            return real(*a, **k)

        setattr(owner, function, call)


def _reached(reach: Callable[[str], None]) -> None:
    """Put a function in the place of failpoints.reach wherever it was imported."""
    from gain_cl.measure import scoring
    from gain_cl.runs import finish, learner, run
    from gain_cl.system import checkpoint, files

    for module in (checkpoint, files, finish, learner, scoring, run):
        module.reach = reach  # type: ignore[attr-defined]


def spare_messages() -> None:
    """The limit on file sizes is lifted when the command reports its error, for the report goes
    into a file too."""
    from gain_cl import cli

    real = cli._report

    def report(error: Any) -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return real(error)

    cli._report = report


def full_stdout() -> None:
    """Standard output is a disk without space."""
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


def small_files(room: str) -> None:
    """No file can grow beyond ``room`` bytes, from the start; what the command prints is spared."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(room), resource.RLIM_INFINITY))
    spare_messages()


def unprivileged() -> None:
    """Permissions hold for this process although it may be root's."""
    if os.geteuid() == 0:
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
        nothing = (ctypes.c_uint32 * 6)()
        if ctypes.CDLL(None, use_errno=True).capset(header, nothing):
            raise OSError(ctypes.get_errno(), "capset")


# --- owners ---------------------------------------------------------------------------------------


def hold(file: str) -> None:
    """The owner of a run waits until ``file`` is there before it works."""
    from gain_cl.runs import run

    real = run.carry_out

    def execute(*a: Any) -> Any:
        until = time.monotonic() + 120
        while not Path(file).exists() and time.monotonic() < until:
            time.sleep(0.01)
        return real(*a)

    run.carry_out = execute


def fail_seeds(*seeds: str) -> None:
    """The runs with these seeds fail."""
    from gain_cl.runs import run

    real = run.carry_out

    def execute(config: Any, plan: Any) -> Any:
        if str(config.seed) in seeds:
            raise DataError("planted", f"seed {config.seed}", "run it again")
        return real(config, plan)

    run.carry_out = execute


# --- the hub --------------------------------------------------------------------------------------


def hub(address: str, home: str) -> None:
    """The hub is at ``address`` and both its cache and gain_cl's are in ``home``."""
    from huggingface_hub import constants

    constants.ENDPOINT, constants.HF_HUB_CACHE = address, f"{home}/hub"
    constants.HUGGINGFACE_CO_URL_TEMPLATE = address + "/{repo_id}/resolve/{revision}/{filename}"
    constants.HF_HUB_DISABLE_XET = constants.HF_HUB_DISABLE_PROGRESS_BARS = True
    os.environ["GAIN_CL_CACHE"] = f"{home}/gain_cl"
