#!/bin/bash
#SBATCH --job-name=tfslurm-sync-0123456789ab
#SBATCH --comment=tfslurm:sync:sync
#SBATCH --output=/factory/sync/logs/slurm.log
#SBATCH --open-mode=truncate
#SBATCH --export=NONE
#SBATCH --requeue
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=2
#SBATCH --time=10
#SBATCH --dependency=singleton
# sync every 7 minutes, rendered by tfslurm VERSION. Each run queues the next, and one runs at a time.
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
    sbatch --begin=now+7minutes "$folder/script.sh" && break
  fi
  sleep "$pause"
done

# sbatch --export=NONE also empties the environment of srun's tasks, unless it is told otherwise.
export SLURM_EXPORT_ENV=ALL
export TFSLURM_ROOT=/factory
export TFSLURM_CONFIG=/etc/tfslurm/site.yaml
set +u # modules and conda read variables that nobody set
set -u
exec /env/train/bin/python -m tfslurm sync --quiet
