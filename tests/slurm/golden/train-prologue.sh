#!/bin/bash
#SBATCH --job-name=6b7c2f1e-0000-4000-8000-000000000001
#SBATCH --comment=tfslurm:job:job-0000000000000001
#SBATCH --output=/factory/jobs/job-0000000000000001/logs/slurm.log
#SBATCH --open-mode=append
#SBATCH --export=NONE
#SBATCH --no-requeue
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=1
#SBATCH --time=1-00:00:00
# job job-0000000000000001, rendered by tfslurm VERSION. Slurm runs this script, and so does the local launcher.
set -uo pipefail
umask 022

folder=/factory/jobs/job-0000000000000001
attempt="${SLURM_RESTART_COUNT:-0}"
node="${SLURMD_NODENAME:-$(uname -n)}"
mkdir -p "$folder/logs"
exec >>"$folder/logs/attempt-$attempt.log" 2>&1 </dev/null

report() { # report FILE JSON: written whole or not at all
  printf '%s\n' "$2" >"$folder/.$1.$$" && mv -f "$folder/.$1.$$" "$folder/$1"
}

now() { date -u +%Y-%m-%dT%H:%M:%SZ; }

address_of() { # Slurm's own address of a node: its name need not resolve
  local address
  address=$(scontrol show node "$1" 2>/dev/null | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
  printf '%s' "${address:-$1}"
}

child='' signalled=''
relay() { # to what runs; where nothing does, this script ends. Background processes of bash ignore SIGINT
  [[ -n $child ]] || exit 143
  signalled=1
  kill -s TERM "$child" 2>/dev/null
}
trap relay TERM INT

attend() { # run a command in the background: bash would keep a signal waiting until a foreground one ends
  "$@" &
  child=$!
  local code
  while :; do
    signalled='' code=0
    wait "$child" || code=$?
    [[ -n $signalled ]] || break # a trap ends the wait early: the code is not the command's own then
  done
  child=
  return "$code"
}

finish() {
  local code=$?
  trap - EXIT
  trap : TERM INT
  report exit.json "{\"uuid\": \"6b7c2f1e-0000-4000-8000-000000000001\", \"attempt\": $attempt, \"exit_code\": $code, \"at\": \"$(now)\"}"
  # What happened is folded into the catalog at once where the node can reach it; else by the next sync.
  /env/core/bin/python -m tfslurm sync --quiet || true
  exit "$code"
}
trap finish EXIT

rm -f "$folder/exit.json" "$folder/outcome.json"
if [[ -n ${SLURM_JOB_ID:-} ]]; then address=$(address_of "$node"); else address=127.0.0.1; fi
report started.json "{\"uuid\": \"6b7c2f1e-0000-4000-8000-000000000001\", \"slurm_job_id\": \"${SLURM_ARRAY_JOB_ID:-${SLURM_JOB_ID:-}}\", \"attempt\": $attempt, \"node\": \"$node\", \"address\": \"$address\", \"pid\": $$, \"ticks\": $(cut -d ' ' -f 22 /proc/$$/stat), \"at\": \"$(now)\"}"
echo "$(now) attempt $attempt on $node"

export TFSLURM_ROOT=/factory
export TFSLURM_NODE_ADDRESS="$address" TFSLURM_ATTEMPT="$attempt"
# sbatch --export=NONE also empties the environment of srun's tasks, unless it is told otherwise.
export SLURM_EXPORT_ENV=ALL
set +u # modules and conda read variables that nobody set
# shellcheck disable=SC1091
type -t module >/dev/null || source /etc/profile # a batch script's shell is no login shell
module load cuda/12.8 nccl || exit
eval "$(conda shell.bash hook)"
conda activate trainer || exit
# shellcheck disable=SC1091
source '/env/some venv/bin/activate' || exit
export NCCL_SOCKET_IFNAME=ib0
export MOTTO='it'"'"'s $HOME `date`
and more'
ulimit -l unlimited
set -u

export HF_HUB_OFFLINE=1 HDF5_USE_FILE_LOCKING=FALSE
export OMP_NUM_THREADS=1
export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=
# glibc keeps large buffers instead of giving them back at every step: a quarter faster on CPUs.
export MALLOC_MMAP_THRESHOLD_=17179869184 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456

# Tokens and plan come first and from one process: ranks that wait for it would run into NCCL's timeout.
attend /env/train/bin/python -m tfslurm.training.prepare "$folder" || exit

ranks() { # one trainer process a rank: srun's tasks on Slurm, children of this shell without it
  if [[ -n ${SLURM_JOB_ID:-} ]]; then
    local first
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    MASTER_ADDR=$(address_of "$first")
    MASTER_PORT=$((20000 + (SLURM_JOB_ID * 7 + attempt) % 20000))
    export MASTER_ADDR MASTER_PORT
    exec srun --kill-on-bad-exit=1 --wait=0 --nodes=1 --ntasks=1 --cpus-per-task=1 \
      /env/train/bin/python -m tfslurm.training.trainer "$folder"
  fi
  export MASTER_ADDR=127.0.0.1 MASTER_PORT=$((20000 + $$ % 20000)) WORLD_SIZE=1
  local rank code stopping='' pids=()
  trap 'stopping=1; kill -s TERM "${pids[@]}" 2>/dev/null' TERM
  for ((rank = 0; rank < WORLD_SIZE; rank++)); do
    RANK=$rank LOCAL_RANK=$rank /env/train/bin/python -m tfslurm.training.trainer "$folder" &
    pids[rank]=$!
  done
  [[ -z $stopping ]] || kill -s TERM "${pids[@]}" 2>/dev/null # it came before all of them ran
  while :; do # not `wait -n`: bash 5.2's overlooks a process that was killed just before
    for rank in "${!pids[@]}"; do
      kill -0 "${pids[rank]}" 2>/dev/null && continue
      code=0
      wait "${pids[rank]}" || code=$?
      unset "pids[rank]"
      # One dead rank leaves the others waiting in a collective for ever.
      [[ $code -eq 0 ]] || { kill -s KILL "${pids[@]}" 2>/dev/null; return "$code"; }
    done
    [[ -n ${pids[*]-} ]] || return 0
    sleep 0.5 &
    wait "$!" # a foreground sleep would keep a signal waiting
  done
}
attend ranks
