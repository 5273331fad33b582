#!/usr/bin/env bash
# Fill .gpu/pack1, .gpu/pack2 and .gpu/pack3 of this checkout with what scripts/gpu.sh needs on a GPU machine without network.
#
#   bash scripts/gpu_pack.sh [MEBIBYTES]     # the most that a pack may hold (default 46)
#
# pack1: the committed source, wheels for Python 3.12, tokenised domains, the converted model but for its weights. pack2, pack3: halves
# of the model's archive, from which the weights are converted there. Every call of the
# machine carries the whole checkout too, hence three packs. PYTHON is an environment with gain_cl's dependencies.
set -euo pipefail
cd "$(dirname "$0")/.."
most=${1:-46}
python=${PYTHON:-.venv/bin/python}
pip=${PIP:-$python -m pip}
export PYTHONPATH=$PWD/src
exclude=$(git rev-parse --git-common-dir)/info/exclude
mkdir -p "$(dirname "$exclude")" && touch "$exclude"
grep -qx '/.gpu/' "$exclude" || echo '/.gpu/' >>"$exclude"
[ -z "$(git status --porcelain -- src configs experiments scripts tests)" ] || echo "note: what is not committed stays behind" >&2
rm -rf .gpu/pack? .gpu/code
mkdir -p .gpu/pack1/wheels .gpu/pack2 .gpu/pack3 .gpu/code .gpu/wheels

# the source, and a .git that knows this one commit (of its files only those that run), so that records name it
here=$PWD
git archive HEAD src configs experiments scripts tests pyproject.toml constraints.txt | tar x -C .gpu/code
git rev-parse HEAD >.gpu/code/COMMIT
git init -q .gpu/code
git rev-list --objects --no-walk HEAD | grep -v -E ' (results|docs|examples)/.*[.]|safetensors$' | cut -d' ' -f1 >.gpu/objects
git pack-objects -q .gpu/code/.git/objects/pack/pack <.gpu/objects >/dev/null
(
  cd .gpu/code
  cat COMMIT >.git/shallow
  git update-ref --no-deref HEAD "$(cat COMMIT)"
  git read-tree HEAD
  git ls-files -- results docs examples configs/model/smollm2_healed.safetensors | git update-index --skip-worktree --stdin
  [ -z "$(git status --porcelain src)" ]
  git -C "$here" rev-parse --abbrev-ref HEAD >BRANCH
)
tar czf .gpu/pack1/code.tar.gz -C .gpu code

# wheels of what the machine lacks (hydra, omegaconf, pydantic, datasets, gguf, TRL, Liger), one version of each
platforms="--platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform manylinux1_x86_64"
pinned() { grep -i -E "^($1)==" constraints.txt; }
wanted=$(pinned 'pydantic|pydantic_core|typing-inspection|annotated-types|hydra-core|omegaconf|datasets|dill|multiprocess|gguf')
# shellcheck disable=SC2086
$pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp $platforms -d .gpu/pack1/wheels \
  $wanted trl==1.16.0 liger-kernel==0.8.5
$pip wheel -q --no-deps -w .gpu/pack1/wheels "$(pinned antlr4-python3-runtime)"

# what a run of experiments/gpu.yaml reads
[ -e .gpu/tokens.xz ] || $python -m gain_cl prepare bundle=.gpu/bundle tasks=none model.dtype=bfloat16 eval.documents=40 eval.window=128 >.gpu/bundle.txt
[ -e .gpu/tokens.xz ] || $python scripts/gpu_tokens.py pack .gpu/bundle/tokens .gpu/tokens.xz # rm -r .gpu makes both anew
cp .gpu/tokens.xz .gpu/pack1/
cp .gpu/bundle/env.sh .gpu/pack1/
converted=$(echo .gpu/bundle/models/*)
mkdir -p ".gpu/pack1/models/$(basename "$converted")"
find "$converted" -type f ! -name '*.safetensors' -exec cp {} ".gpu/pack1/models/$(basename "$converted")/" ';'
archive=$($python -c 'from gain_cl.compose import composition; from gain_cl.system import packages; print(packages.archive(composition.compose(["tasks=none"], [], []).model.package))')
split -n 2 -d "$archive" .gpu/half.
mv .gpu/half.00 .gpu/pack2/model.0
mv .gpu/half.01 .gpu/pack3/model.1
for pack in .gpu/pack2 .gpu/pack3; do # where the archive lies in the bundle, and what it must be
  echo "packages/$(basename "$(dirname "$archive")")/$(basename "$archive")" >$pack/model.name
  sha256sum <"$archive" | cut -d' ' -f1 >$pack/model.sha256
done

for pack in .gpu/pack?; do
  size=$(du -s --apparent-size --block-size=1K "$pack" | cut -f1)
  echo "$pack: $((size / 1024)).$((size % 1024 * 10 / 1024)) MiB"
  [ "$size" -le $((most * 1024)) ] || { echo "$pack is larger than $most MiB" >&2; exit 1; }
done
