#!/usr/bin/env bash
# What there is to do on a GPU machine without network, from the packs of scripts/gpu_pack.sh. Each part ends by itself in its time.
#
#   bash gpu.sh PACKS PART...     PACKS: the folder with pack1 ...; parts: setup bench small long stash tests runs
#
# setup  wheels and tokenised domains into $WORK (default: gain_cl_gpu of the temporary folder); done once
# bench  Qwen2.5-7B's configuration, T 2048      small  SmolLM2-135M at study settings      long  Qwen2.5-7B's, 2 x 4096
# stash  keeps pack2 for a later call
# tests  pytest -m gpu                           runs   experiments/gpu.yaml, block by block, RUNS at once
# BENCH_SECONDS, SMALL_SECONDS, LONG_SECONDS, TEST_SECONDS, RUN_SECONDS limit the parts; results go to $OUT. DEVICE=cpu rehearses.
set -uo pipefail
packs=$(cd "$1" && pwd)
shift
code=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
WORK=${WORK:-${TMPDIR:-/tmp}/gain_cl_gpu}
OUT=${OUT:-$WORK/out}
DEVICE=${DEVICE:-cuda}
export OUT PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false COLUMNS=150
export PYTHONPATH=$code/src:$WORK/site GAIN_CL_CACHE=$WORK/bundle HF_HUB_CACHE=$WORK/bundle/hub HF_HUB_OFFLINE=1
export TORCHINDUCTOR_CACHE_DIR=$WORK/inductor TRITON_CACHE_DIR=$WORK/triton
git config --global --add safe.directory "$code" 2>/dev/null
mkdir -p "$OUT" "$WORK"
began=$(date +%s)
say() { echo "== $(($(date +%s) - began)) s: $*"; }

setup() {
  [ -e "$WORK/ready" ] && return 0
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$WORK/site" "$packs"/pack1/wheels/*.whl || return
  python3 "$code/scripts/gpu_tokens.py" unpack "$packs/pack1/tokens.xz" "$WORK/bundle/tokens" || return
  cp -r "$packs/pack1/env.sh" "$packs/pack1/models" "$WORK/"
  touch "$WORK/ready"
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,temperature.gpu --format=csv,noheader 2>/dev/null
  git -C "$code" log -1 --format='commit %H' 2>/dev/null || sed 's/^/commit (no git here) /' "$code/COMMIT"
}

stash() { # pack2's half of the model's archive, for a later call
  cp "$packs/pack2/model.0" "$WORK/model.0"
}

measure() { # NAME SECONDS WORDS...
  local name=$1 seconds=$2
  shift 2
  cd "$WORK" && timeout -k 5 $((seconds + 15)) python3 -m gain_cl bench name="$name" out="$OUT" device="$DEVICE" total="$seconds" "$@" \
    >"$OUT/$name.txt" 2>&1
  echo "bench $name ended with $?"
  grep -v -E '(Warning|warn|examples/s|train_runtime|^ *$)' "$OUT/$name.txt" | tail -"${LINES_SHOWN:-60}" | cut -c1-150
}

bench() {
  measure qwen7b "${BENCH_SECONDS:-215}" model="${BENCH_MODEL:-qwen2.5_7b}" block="${BENCH_BLOCK:-2048}" sequences="${BENCH_SEQUENCES:-2}" \
    seconds=45 rounds="${ROUNDS:-9}" profile=gain_ffn,gain_ffn+compile,gain_ffn+swiglu+liger+cudnn \
    subjects="${SUBJECTS:-forward,limit,gain_ffn,gain_ffn+triton,gain_ffn+cudnn,gain_ffn+compile,gain_ffn+swiglu+liger+cudnn,peft_ia3,peft_lora,trl_lora,trl_lora_plain,lora,trl_liger,trl_liger_plain,trainer_lora,peft_lora_hfloss,limit+compile,gain_ffn+compile+cudnn,gain_ffn+liger,gain_attn,forward+compile,lora+compile,gain_ffn+ckpt,limit+liger+cudnn,gain_ffn+swiglu+liger+cudnn+ckpt}"
}

small() {
  measure smollm2 "${SMALL_SECONDS:-60}" model="${SMALL_MODEL:-smollm2}" block=256 sequences=8 seconds=25 rounds="${ROUNDS:-9}" profile=gain_ffn \
    subjects="${SMALL_SUBJECTS:-forward,limit,gain_ffn,lora,gain_ffn+compile,peft_ia3,peft_lora,trl_lora_plain,full,gain_ffn+triton,gain_ffn+graphs}"
}

long() {
  measure qwen7b-4096 "${LONG_SECONDS:-60}" model="${BENCH_MODEL:-qwen2.5_7b}" block="${LONG_BLOCK:-4096}" sequences=2 seconds=40 \
    rounds="${LONG_ROUNDS:-5}" profile=none subjects="${LONG_SUBJECTS:-gain_ffn+swiglu+liger+cudnn,gain_ffn+compile,trl_liger,gain_ffn}"
}

tests() {
  cd "$code" && timeout -k 5 "${TEST_SECONDS:-100}" python3 -m pytest -q -p no:cacheprovider -n "${TEST_PROCESSES:-8}" -m gpu \
    --junitxml="$OUT/tests.xml" --basetemp="$WORK/pytest" tests/test_gpu.py >"$OUT/tests.txt" 2>&1
  echo "tests ended with $?"
  tail -"${LINES_SHOWN:-60}" "$OUT/tests.txt" | cut -c1-180
}

collect() { # what the runs have left so far, without trained states
  (
    cd "$WORK/runs" 2>/dev/null || exit 0
    find . -name '*.json' -o -name '*.parquet' -o -name '*.jsonl' -o -name '*.csv' -o -name '*.log' -o -name '*.txt' |
      grep -v -E '/ckpt/|/cells/' | tar czf "$WORK/collected.tmp" -T - 2>/dev/null
    mv "$WORK/collected.tmp" "$OUT/runs.tar.gz"
  )
}

runs() {
  local name archive convert limit=$((${RUN_SECONDS:-380} + $(date +%s))) left block
  name=$(cat "$packs"/pack3/model.name)
  archive=$WORK/bundle/$name
  if [ ! -e "$archive" ]; then
    mkdir -p "$(dirname "$archive")"
    [ -e "$packs/pack2/model.0" ] && cp "$packs/pack2/model.0" "$WORK/model.0"
    cat "$WORK/model.0" "$packs/pack3/model.1" >"$archive"
    [ "$(sha256sum <"$archive" | cut -d' ' -f1)" = "$(cat "$packs"/pack3/model.sha256)" ] || { rm "$archive"; echo "the model's archive is broken"; return 1; }
  fi
  mkdir -p "$WORK/runs/logs" && cd "$WORK/runs" || return
  # weights from the archive; config and tokenizer as they were converted here: the manifest holds the hashes of all of them
  convert='from gain_cl import build, models; print("model:", models.locate(build.compose(["tasks=none"], [], []).model))'
  python3 -c "$convert" 2>&1 | tail -1
  python3 - "$WORK" <<'PY'
import hashlib
import json
import shutil
import sys
from pathlib import Path

(given,), work = Path(sys.argv[1], "models").glob("*"), Path(sys.argv[1])
made = work / "bundle/models" / given.name
manifest = json.loads((given / "CONVERTED.json").read_text())
found = hashlib.sha256((made / "model.safetensors").read_bytes()).hexdigest()
same = found == manifest["files"]["model.safetensors"]
print("weights:", "the very bytes of the packing machine" if same else f"rounded otherwise by this processor ({found[:12]}), as the records say")
manifest["files"]["model.safetensors"] = found
for file in given.iterdir():
    shutil.copy(file, made)
(made / "CONVERTED.json").write_text(json.dumps(manifest, indent=1))
PY
  python3 -c "$convert" 2>&1 | tail -1
  say "the model is converted"
  # shellcheck disable=SC2086
  for block in ${BLOCKS:-0 1 2}; do
    left=$((limit - $(date +%s)))
    [ "$left" -lt "${BLOCK_LEAST_SECONDS:-60}" ] && { echo "block $block: no time left"; break; }
    python3 -m gain_cl sweep experiment=gpu dry_run=true worktree=false only=block$block ${RUN_WORDS:-} 2>&1 |
      grep -o -E 'gain_cl run .*' | sed 's/^gain_cl run //' >"logs/block$block.txt"
    say "block $block: $(wc -l <"logs/block$block.txt") runs, $left s left"
    nl -w1 -s' ' "logs/block$block.txt" | OMP_NUM_THREADS=${RUN_THREADS:-2} xargs -r -P "${RUNS:-8}" -L1 bash -c \
      'n=$1; shift; timeout -s TERM -k 15 '"$left"' python3 -m gain_cl run "$@" >"logs/block'"$block"'-$n.log" 2>&1; echo "run $n ended with $?: $(tail -1 "logs/block'"$block"'-$n.log" | cut -c1-110)"' _ &
    while kill -0 $! 2>/dev/null; do sleep "${COLLECT_SECONDS:-10}"; collect; done
    wait $!
    collect
  done
  python3 - <<'PY'
from pathlib import Path

from gain_cl import record
from gain_cl.comparison import loss_matrix
from gain_cl.matrix import summary

KEYS = ("learned", "own_step", "backward", "from_base", "controls_from_base")
print(f"{'method':<10} {'rate':>8} {'block':>5} {'seconds':>8} {'tokens/s':>9} " + " ".join(f"{k[:12]:>12}" for k in KEYS) + "  (nats)")
for path in sorted(Path("results/runs").glob("*.json")):
    try:
        run = record.load(path)
        told, found = run.record, summary(loss_matrix(run))
        train = [s.train for s in told.stages if s.train]
        speed = sum(t.tokens for t in train) / sum(t.seconds for t in train)
        values = " ".join(f"{found[k].value:>12.4f}" if k in found else f"{'-':>12}" for k in KEYS)
        print(f"{told.method:<10} {told.config['train']['lr']:>8.1e} {told.seed:>5} {told.provenance['seconds']:>8.0f} {speed:>9.0f} {values}")
    except Exception as error:
        print(path.name, type(error).__name__, error)
PY
}

for part in "$@"; do
  say "$part"
  "$part" || echo "$part failed with $?"
done
say "end"
