"""Write what a LoRA run learned as a delta for a model preset (model.delta): MODULE.lora_A (r, in),
MODULE.lora_B (out, r), float16.

    python scripts/delta.py RECORD.json OUT.safetensors

alpha / r is folded into B. Prints what the preset says of the file.
"""

import argparse
from pathlib import Path

from safetensors.torch import load_file, save_file

from gain_cl.measure import record
from gain_cl.system.files import sha256

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("record", type=Path)
parser.add_argument("out", type=Path)
asked = parser.parse_args()
run = record.load(asked.record).record
lora, last = run.config["adapter"]["config"], run.stages[-1]
if run.config["adapter"]["peft_type"] != "LORA" or lora.get("use_rslora") or lora.get("use_dora"):
    parser.error("only plain LoRA is a delta")
saved = (
    Path(run.config["output_dir"])
    / run.run_id
    / "stages"
    / f"{last.index:02d}-{last.domain}"
    / "adapter.safetensors"
)
scale, tensors = lora["lora_alpha"] / lora["r"], {}
for name, tensor in load_file(saved).items():
    module, _, part = name.removesuffix(".default.weight").rpartition(".")
    tensors[f"{module}.{part}"] = (
        (tensor * (scale if part == "lora_B" else 1.0)).half().contiguous()
    )
save_file(tensors, asked.out, metadata={"run": run.run_id, "record_sha256": sha256(asked.record)})
print(f"delta:\n  file: {asked.out.name}\n  sha256: {sha256(asked.out)}")
