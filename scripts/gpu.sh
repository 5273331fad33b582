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
#
# What a session with such a machine does: three calls at once, from a checkout whose .gpu scripts/gpu_pack.sh has filled. Each carries one pack.
# What lies in /tmp there stays between calls less than 30 s apart. A lease has 15 minutes, its start and the transfers (2 to 3) included.
#   1. carry .gpu/pack1, limit 340 s:
#        mkdir -p /tmp/g && tar xzf .gpu/pack1/code.tar.gz -C /tmp/g && bash /tmp/g/code/scripts/gpu.sh .gpu setup bench long small
#      SUBJECTS, LONG_SUBJECTS, SMALL_SUBJECTS name other rows. Each list begins with what is wanted most: time may end before the last.
#   2. carry .gpu/pack2, limit 150 s:
#        TEST_SECONDS=110 TEST_PROCESSES=14 bash /tmp/g/code/scripts/gpu.sh .gpu stash tests
#      TESTS="pattern" takes some. Each failure is shown with its traceback, in tests.txt too.
#   3. carry .gpu/pack3, limit 330 s:
#        BLOCKS=1 RUNS=8 RUN_SECONDS=290 bash /tmp/g/code/scripts/gpu.sh .gpu runs
#      Block 0 took 200 s on 2026-11-27, eight runs at once. The runs compile nothing (compute.compile=none), so that blocks are comparable.
#   All three in one message: on 2026-11-28 more than 30 s passed after the first, the machine was gone, and a new one cost 60 s and call 1's setup.
# Results: .txt and .json of $OUT; bench_page.py prints a record as docs/speed.md has it. RUN_WORDS cannot name a key that the experiment sets.
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
  cd "$WORK" && timeout -k 5 $((seconds + 15)) python3 "$code/scripts/bench/bench.py" name="$name" out="$OUT" device="$DEVICE" total="$seconds" "$@" \
    >"$OUT/$name.txt" 2>&1
  echo "bench $name ended with $?"
  grep -v -E '(Warning|warn|examples/s|train_runtime|^ *$)' "$OUT/$name.txt" | tail -"${LINES_SHOWN:-60}" | cut -c1-150
}

bench() {
  measure qwen7b "${BENCH_SECONDS:-180}" model="${BENCH_MODEL:-qwen2.5_7b}" block="${BENCH_BLOCK:-2048}" sequences="${BENCH_SEQUENCES:-2}" \
    seconds=45 rounds="${ROUNDS:-7}" profile=gain_ffn+compile \
    subjects="${SUBJECTS:-gain_ffn+compile,peft_ia3,limit+compile,gain_ffn+compile+ckpt,lora,lora+compile,trl_liger_plain,trl_liger,forward,gain_ffn,forward+compile,limit,trl_lora,gain_attn+compile,peft_lora,trl_lora_plain,trainer_lora}"
}

small() {
  measure smollm2 "${SMALL_SECONDS:-65}" model="${SMALL_MODEL:-smollm2}" block="${SMALL_BLOCK:-256}" sequences=8 seconds=30 rounds="${ROUNDS:-9}" profile=none \
    subjects="${SMALL_SUBJECTS:-gain_ffn+compile,gain_ffn,peft_ia3,lora,lora+compile,forward,gain_ffn+graphs,full}"
}

long() {
  measure qwen7b-4096 "${LONG_SECONDS:-50}" model="${BENCH_MODEL:-qwen2.5_7b}" block="${LONG_BLOCK:-4096}" sequences=2 seconds=40 \
    rounds="${LONG_ROUNDS:-5}" profile=none subjects="${LONG_SUBJECTS:-gain_ffn+compile,trl_liger,peft_ia3}"
}

tests() {
  # each name as it ends, each failure with its traceback at once (tests/gpu/show_failures.py); INT makes pytest sum up when time is over
  cd "$code" && PYTHONPATH=$code/tests/gpu:$PYTHONPATH timeout -s INT -k 10 "${TEST_SECONDS:-100}" python3 -m pytest -p show_failures -v --tb=short -rfE -p no:cacheprovider -p no:benchmark \
    -n "${TEST_PROCESSES:-8}" -m gpu --basetemp="$WORK/pytest" ${TESTS:+-k "$TESTS"} tests/gpu/test_gpu.py >"$OUT/tests.txt" 2>&1
  echo "tests ended with $?: $(grep -c PASSED "$OUT/tests.txt") passed, $(grep -c SKIPPED "$OUT/tests.txt") skipped"
  grep -v -E '(PASSED|SKIPPED|Warning|warner)' "$OUT/tests.txt" | tail -"${LINES_SHOWN:-60}" | cut -c1-180
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
  convert='from gain_cl.compose import composition; from gain_cl.models import source; print("model:", source.locate_model(composition.compose(["tasks=none"], [], []).model))'
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
    python3 -m gain_cl sweep experiment="${EXPERIMENT:-gpu}" dry_run=true worktree=false only=block$block ${RUN_WORDS:-} >"logs/sweep$block.txt" 2>&1
    grep -o -E 'gain_cl run .*' "logs/sweep$block.txt" | sed 's/^gain_cl run //' >"logs/block$block.txt"
    [ -s "logs/block$block.txt" ] || { echo "block $block: no run to make; sweep said:"; tail -5 "logs/sweep$block.txt"; continue; }
    say "block $block: $(wc -l <"logs/block$block.txt") runs, $left s left"
    nl -w1 -s' ' "logs/block$block.txt" | OMP_NUM_THREADS=${RUN_THREADS:-2} xargs -r -P "${RUNS:-8}" -L1 bash -c \
      'n=$1; shift; timeout -s TERM -k 15 '"$left"' python3 -m gain_cl run "$@" >"logs/block'"$block"'-$n.log" 2>&1; echo "run $n ended with $?: $(tail -1 "logs/block'"$block"'-$n.log" | cut -c1-110)"' _ &
    while kill -0 $! 2>/dev/null; do sleep "${COLLECT_SECONDS:-10}"; collect; done
    wait $!
    collect
  done
  python3 - <<'PY'
from pathlib import Path

from gain_cl.measure import record
from gain_cl.stats.matrix import summary
from gain_cl.studies.study import loss_matrix

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
