#!/bin/bash
#SBATCH --job-name=6b7c2f1e-0000-4000-8000-000000000001
#SBATCH --comment=tfslurm:import:ds-0000000000000001
#SBATCH --output=/factory/jobs/job-0000000000000001/logs/slurm.log
#SBATCH --open-mode=append
#SBATCH --export=NONE
#SBATCH --no-requeue
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=2
#SBATCH --time=1-00:00:00
# import ds-0000000000000001, rendered by tfslurm VERSION. Slurm runs this script, and so does the local launcher.
set -uo pipefail
umask 022

uuid=6b7c2f1e-0000-4000-8000-000000000001
folder=/factory/jobs/job-0000000000000001
job="${SLURM_ARRAY_JOB_ID:-${SLURM_JOB_ID:-}}"
attempt=$((0 + ${SLURM_RESTART_COUNT:-0}))
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
  trap : TERM INT USR2
  report exit.json "{\"uuid\": \"$uuid\", \"attempt\": $attempt, \"exit_code\": $code, \"at\": \"$(now)\"}"
  # What happened is folded into the catalog at once where the node can reach it; else by the next sync.
  /env/core/bin/python -m tfslurm sync --quiet || true
  exit "$code"
}
trap finish EXIT

rm -f "$folder/exit.json" "$folder/outcome.json"
if [[ -n $job ]]; then address=$(address_of "$node"); else address=127.0.0.1; fi
report started.json "{\"uuid\": \"$uuid\", \"slurm_job_id\": \"$job\", \"attempt\": $attempt, \"node\": \"$node\", \"address\": \"$address\", \"pid\": $$, \"ticks\": $(cut -d ' ' -f 22 /proc/$$/stat), \"at\": \"$(now)\"}"
echo "$(now) attempt $attempt on $node"

export TFSLURM_NODE_ADDRESS="$address" TFSLURM_ATTEMPT="$attempt"
# sbatch --export=NONE also empties the environment of srun's tasks, unless it is told otherwise.
export SLURM_EXPORT_ENV=ALL
export TFSLURM_ROOT=/factory
set +u # modules and conda read variables that nobody set
set -u

attend /env/train/bin/python -m tfslurm.datasets.importer "$folder"
