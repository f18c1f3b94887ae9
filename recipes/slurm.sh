#!/usr/bin/env bash
# Pre-trains on several machines under Slurm; options are those of train_ldae.py. Run it from a checkout that all machines see:
#   sbatch recipes/slurm.sh paper --data ILSVRC/imagenet-1k --output_dir runs/paper --resume
# A job that ends early has saved its last step: the same command goes on. It was not tried on a cluster; docs/several-gpus.md.
#SBATCH --job-name=ldae
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
set -euo pipefail

read -r first _ <<< "$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
gpus=$SLURM_GPUS_ON_NODE
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / gpus))

# SLURM_NODEID is another number on each machine, so it is read there
launch="exec accelerate launch --multi_gpu --num_machines $SLURM_NNODES --num_processes $((SLURM_NNODES * gpus)) \
--machine_rank \$SLURM_NODEID --main_process_ip $first --main_process_port 29500 \
--mixed_precision bf16 --dynamo_backend no train_ldae.py \"\$@\""
srun bash -c "$launch" train_ldae.py "$@"
