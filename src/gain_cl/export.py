"""From a finished run to an ordinary transformers checkpoint."""

from __future__ import annotations

from pathlib import Path

from gain_cl.config import RunConfig
from gain_cl.errors import ConfigError, DataError
from gain_cl.record import RunRecord


def merged(record: RunRecord, to: Path, stage: int | None = None, output_dir: str | None = None) -> float:
    """Fold the state after a stage (default: the last) into the base weights in fp32 and write a transformers folder.

    The product is taken from the base weights and the saved fp32 state, never from weights already merged, so that
    rounding happens once. Returns max |logit difference| / max |logit| between the folded and the unfolded model, both
    in fp32, on 64 tokens. DataError when the state is gone, ConfigError for a stage that is not in the run or a folder
    that is not empty.
    """
    last = len(record.stages) - 1
    stage = last if stage is None else stage
    if not 1 <= stage <= last:
        raise ConfigError(f"stage {stage} is not among 1..{last}", "stage", "stage 0 is the base model itself")
    if to.exists() and any(to.iterdir()):
        raise ConfigError("the folder is not empty", str(to), "name another one")
    config = RunConfig.model_validate(record.config)
    saved = (
        Path(output_dir or config.output_dir)
        / record.run_id
        / "stages"
        / f"{stage:02d}-{record.stages[stage].domain}"
        / "adapter.safetensors"
    )
    if not saved.exists():
        raise DataError(
            "the trained state of this stage is not there",
            str(saved),
            "name its output_dir with --output-dir, or run again with force=true",
        )

    import torch
    from safetensors.torch import load_file

    from gain_cl import adapters, models

    loaded = models.load(config.model.model_copy(update={"dtype": "float32"}), models.device_of(config.compute.device, "float32"))
    adapter = adapters.build(config.adapter)
    adapter.attach(loaded)
    adapter.load_state(load_file(saved))
    ids = torch.arange(64, device=loaded.device)[None] % loaded.vocabulary
    with torch.inference_mode():
        before = loaded.model(ids).logits
    adapter.absorb()
    with torch.inference_mode():
        gap = ((loaded.model(ids).logits - before).abs().max() / before.abs().max()).item()
    loaded.model.config.use_cache = True
    loaded.model.save_pretrained(to)
    loaded.tokenizer.save_pretrained(to)
    return gap
