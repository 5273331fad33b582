"""Speed and memory of a training step of each method against a bare forward pass with its loss, on
the same batches.

    python scripts/speed.py [--steps 5] [OVERRIDE ...]

Methods are timed in turn within each round, so that a drift of the machine's speed falls on all of
them; figures are medians over rounds. Memory is the peak of a process of its own per method.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

METHODS = ("forward", "gain_attn", "gain_ffn", "lora", "full")


def worker(method: str, overrides: list[str]) -> None:
    """One step a line of input; prints seconds, and at the end the peak memory in bytes."""
    import torch

    from gain_cl import adapters, domains
    from gain_cl.compose import composition
    from gain_cl.guards.base import Guard
    from gain_cl.measure import provenance
    from gain_cl.measure.perplexity import evaluating
    from gain_cl.models import forward, load
    from gain_cl.runs import train

    config = composition.compose(
        [*overrides, *([] if method == "forward" else [f"method={method}"])], [], []
    )
    torch.set_num_threads(config.compute.threads or torch.get_num_threads())
    loaded = load.load_model(
        config.model, load.device_of(config.compute.device, config.model.dtype)
    )
    domain = domains.prepare_domain(
        config.domains[config.sequence.trained[0]], loaded.tokenizer, loaded.tokenizer_hash
    )
    blocks = domain.train_blocks(config.seed, config.train.block, loaded.separator_id)
    if method == "forward":

        def steps():  # type: ignore[no-untyped-def]
            for i in range(10**6):
                batch = train.batch_at(blocks, i, config.train.sequences)
                with evaluating(loaded.model):
                    forward.loss_sum(loaded, batch.tokens_ST).item()
                yield
    else:
        adapter = adapters.build_adapter(config.adapter)
        adapter.attach(loaded)
        many = config.train.model_copy(update={"steps": 10**6, "tokens": None})

        def steps():  # type: ignore[no-untyped-def]
            yield from train.stage(
                loaded,
                adapter,
                Guard(),
                blocks,
                many,
                train.optimizer(adapter, many),
                index=1,
                seed=0,
                micro_batch=config.compute.micro_batch,
            )

    stream = steps()
    next(stream)
    print("ready", flush=True)
    for _ in sys.stdin:
        begun = time.perf_counter()
        next(stream)
        if loaded.device.type == "cuda":
            torch.cuda.synchronize()
        print(time.perf_counter() - begun, flush=True)
    print(
        torch.cuda.max_memory_allocated()
        if loaded.device.type == "cuda"
        else provenance.peak_memory(),
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--worker", choices=METHODS)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.overrides)
        return
    from gain_cl.compose import composition

    tokens = composition.compose(args.overrides, [], []).train.batch_tokens
    seconds: dict[str, list[float]] = {m: [] for m in METHODS}
    processes = {}
    for m in METHODS:
        command = [sys.executable, __file__, "--worker", m, *args.overrides]
        processes[m] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert processes[m].stdout.readline() == "ready\n"
    for _ in range(args.steps):
        for m, p in processes.items():
            p.stdin.write("\n")
            p.stdin.flush()
            seconds[m].append(float(p.stdout.readline()))
    memory = {m: int(p.communicate()[0]) for m, p in processes.items()}
    base = statistics.median(seconds["forward"])
    print(f"{'':<10} {'tokens/s':>9} {'x forward':>10} {'peak GB':>8}")
    for m in METHODS:
        middle = statistics.median(seconds[m])
        ratio = statistics.median(
            a / b for a, b in zip(seconds[m], seconds["forward"], strict=True)
        )
        print(f"{m:<10} {tokens / middle:>9.0f} {ratio:>10.2f} {memory[m] / 1e9:>8.2f}")
    print(
        json.dumps(
            {
                "batch_tokens": tokens,
                "forward_seconds": base,
                "seconds": seconds,
                "memory_bytes": memory,
            }
        )
    )


if __name__ == "__main__":
    main()
