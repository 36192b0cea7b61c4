#!/bin/bash
#SBATCH --job-name=tfslurm-sync-0123456789ab
#SBATCH --comment=tfslurm:sync:sync
#SBATCH --output=/factory/sync/logs/slurm.log
#SBATCH --open-mode=truncate
#SBATCH --export=NONE
#SBATCH --requeue
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=1
#SBATCH --time=1-00:00:00
#SBATCH --dependency=singleton
# sync every 5 minutes, rendered by tfslurm VERSION. Each run queues the next, and one runs at a time.
set -uo pipefail
umask 022

folder=/factory/sync
name=tfslurm-sync-0123456789ab

waiting() { squeue --noheader --states=PENDING --format=%A --name="$name"; }

# Before anything else, so that the chain goes on however this one ends; a restarted one finds its successor there.
for pause in 5 15 45 0; do
  [[ ! -e $folder/stop ]] || break
  if queued=$(waiting); then
    [[ -z $queued ]] || break
    sbatch --begin=now+5minutes "$folder/script.sh" && break
  fi
  sleep "$pause"
done

# sbatch --export=NONE also empties the environment of srun's tasks, unless it is told otherwise.
export SLURM_EXPORT_ENV=ALL
export TFSLURM_ROOT=/factory
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
exec /env/train/bin/python -m tfslurm sync --quiet
