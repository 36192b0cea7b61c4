#!/bin/bash
#SBATCH --job-name=6b7c2f1e-0000-4000-8000-000000000001
#SBATCH --comment=tfslurm:job:job-0000000000000001
#SBATCH --output=/factory/jobs/job-0000000000000001/logs/slurm.log
#SBATCH --open-mode=append
#SBATCH --export=NONE
#SBATCH --no-requeue
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=2
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=1-00:00:00
#SBATCH --gres=gpu:2
#SBATCH --signal=B:USR2@120
#SBATCH --exclude=n7,n9
# job job-0000000000000001, rendered by tfslurm VERSION. Slurm runs this script, and so does the local launcher.
set -uo pipefail
umask 022

uuid=6b7c2f1e-0000-4000-8000-000000000001
folder=/factory/jobs/job-0000000000000001
job="${SLURM_ARRAY_JOB_ID:-${SLURM_JOB_ID:-}}"
attempt=$((3 + ${SLURM_RESTART_COUNT:-0}))
node="${SLURMD_NODENAME:-$(uname -n)}"

now() { date -u +%Y-%m-%dT%H:%M:%SZ; }

# Slurm may have taken this script twice: of the jobs of one submission, the first to come here runs.
if [[ -n $job ]]; then
  claim=$folder/claim-$uuid
  printf '%s\n' "$job" >"$claim.$job" && ln "$claim.$job" "$claim" 2>/dev/null # with its content, or not at all
  rm -f "$claim.$job"
  owner=$(cat "$claim" 2>/dev/null)
  [[ -n $owner ]] || { echo "$(now) job $job cannot write $claim" && exit 1; }
  [[ $owner == "$job" ]] || { echo "$(now) job $job leaves: $uuid runs as job $owner" && exit 0; }
fi

mkdir -p "$folder/logs"
exec >>"$folder/logs/attempt-$attempt.log" 2>&1 </dev/null

report() { # report FILE JSON: written whole or not at all
  printf '%s\n' "$2" >"$folder/.$1.$$" && mv -f "$folder/.$1.$$" "$folder/$1"
}

address_of() { # Slurm's own address of a node: its name need not resolve
  local address
  address=$(scontrol show node "$1" 2>/dev/null | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
  printf '%s' "${address:-$1}"
}

child='' signalled=''
relay() { # to what runs; where nothing does, this script ends. Background processes of bash ignore SIGINT
  [[ -n $child ]] || exit 143
  signalled=1
  if [[ -n $job && -n ${training:-} && ! -e $folder/stop ]]; then
    : >"$folder/leave" # Slurm has told the ranks itself; srun would kill them before they have saved their state
  else
    kill -s TERM "$child" 2>/dev/null
  fi
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

leave() { # the walltime is near: the trainer saves its state at the next step boundary
  signalled=1
  echo "$(now) asked to leave"
  : >"$folder/leave"
}
trap leave USR2

finish() {
  local code=$?
  trap - EXIT
  trap : TERM INT USR2
  report exit.json "{\"uuid\": \"$uuid\", \"attempt\": $attempt, \"exit_code\": $code, \"at\": \"$(now)\"}"
  # What happened is folded into the catalog at once where the node can reach it; else by the next sync.
  /env/core/bin/python -m tfslurm sync --quiet || true
  exit "$code"
}
trap finish EXIT

finished=''
[[ ! -e $folder/outcome.json ]] || ! grep -Eq '"result": ?"succeeded"' "$folder/outcome.json" || finished=1
rm -f "$folder/exit.json" "$folder/leave"
[[ -n $finished ]] || rm -f "$folder/outcome.json"
if [[ -n $job ]]; then address=$(address_of "$node"); else address=127.0.0.1; fi
report started.json "{\"uuid\": \"$uuid\", \"slurm_job_id\": \"$job\", \"attempt\": $attempt, \"node\": \"$node\", \"address\": \"$address\", \"pid\": $$, \"ticks\": $(cut -d ' ' -f 22 /proc/$$/stat), \"at\": \"$(now)\"}"
echo "$(now) attempt $attempt on $node"
if [[ -n $finished ]]; then
  echo "an earlier attempt has succeeded: nothing is left to do"
  exit 0
fi

export TFSLURM_NODE_ADDRESS="$address" TFSLURM_ATTEMPT="$attempt"
# sbatch --export=NONE also empties the environment of srun's tasks, unless it is told otherwise.
export SLURM_EXPORT_ENV=ALL
export TFSLURM_ROOT=/factory
set +u # modules and conda read variables that nobody set
set -u

export HF_HUB_OFFLINE=1 HDF5_USE_FILE_LOCKING=FALSE
export OMP_NUM_THREADS=8
export TFSLURM_WORLD_SIZE=2 TFSLURM_BARREN_ATTEMPTS=3

# Tokens and plan come first and from one process: ranks that wait for it would run into NCCL's timeout.
attend /env/train/bin/python -m tfslurm.training.prepare "$folder" || exit

choose_port() { # choose_port NUMBER: below those that the kernel hands out, and where nothing listens
  MASTER_PORT=$((20000 + $1 % 12000))
  while (exec 3<>"/dev/tcp/$MASTER_ADDR/$MASTER_PORT") 2>/dev/null; do
    MASTER_PORT=$((20000 + (MASTER_PORT - 19999) % 12000))
  done
  export MASTER_ADDR MASTER_PORT
}

ranks() { # one trainer process a rank: srun's tasks on Slurm, children of this shell without it
  if [[ -n $job ]]; then
    MASTER_ADDR=$(address_of "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)")
    # An array's tasks have ids of their own too: no two jobs on a node begin at the same port.
    choose_port "$((SLURM_JOB_ID * 7 + attempt))"
    exec srun --kill-on-bad-exit=1 --wait=0 --nodes=1 --ntasks=2 --cpus-per-task=8 \
      /env/train/bin/python -m tfslurm.training.trainer "$folder"
  fi
  MASTER_ADDR=127.0.0.1
  choose_port "$$"
  export WORLD_SIZE=2
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
training=1
attend ranks
