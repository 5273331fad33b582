#!/bin/bash
# A run that outlives its time limit (docs/slurm.md): sbatch scripts/slurm.sh model=qwen2.5 method=gain_ffn seed=0
# One job per seed: sbatch --array=0-2 scripts/slurm.sh model=qwen2.5 method=gain_ffn
#SBATCH --job-name=gain_cl
#SBATCH --time=04:00:00
#SBATCH --ntasks=1 --cpus-per-task=8 --mem=64G --gpus=1
#SBATCH --signal=B:USR1@300 --requeue --open-mode=append

# Here what makes `python` find gain_cl: a module, or source .venv/bin/activate

export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun no longer inherits it
child='' signal='' ended=''

forward() { # always USR1: to a TERM srun answers by killing its tasks
    signal=$1
    [ "$1" = USR1 ] || ended=$1
    [ -z "$child" ] || kill -USR1 "$child" 2>/dev/null
}
trap 'forward USR1' USR1
trap 'forward TERM' TERM

srun python -m gain_cl run "$@" ${SLURM_ARRAY_TASK_ID:+"seed=$SLURM_ARRAY_TASK_ID"} &
child=$!
[ -z "$signal" ] || forward "$signal" # it came before there was a child
while :; do
    signal=''
    wait "$child"
    code=$?
    [ -n "$signal" ] || break # else the signal, not the child, ended the wait
done

case $code in
    75 | 138 | 143) ;; # preempted with all saved, or by USR1 or TERM before it was up
    *) exit "$code" ;;
esac
[ -z "$ended" ] || exit "$code" # Slurm ends the job: it requeues by itself, or somebody cancelled
job=${SLURM_ARRAY_TASK_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID} # one task: the plain number may mean the whole array
scontrol requeue "${job:-$SLURM_JOB_ID}" || exit "$code" # refused: a failed job, not one that looks complete
