#!/bin/bash
# Trains on several machines under SLURM; pre-empted, timed out or restarted, it goes on from its newest checkpoint.
#
#   sbatch recipes/launch/slurm.sh recipes/pretrain.py --config recipes/llava15/pretrain.yaml
#   sbatch --nodes 4 --export ALL,ENGINE=deepspeed_configs/accelerate_zero3.yaml recipes/launch/slurm.sh recipes/...
#
# Submit it from the repository's root, with the environment active in which mllm is installed. --resume is added here:
# it starts a new run in an empty folder, and goes on where there are checkpoints.
#SBATCH --job-name=mllm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1      # one launcher a machine, which starts one process for each GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64       # the processes' data workers are among these
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120        # two minutes before the end: a step and a checkpoint must fit; 300 for large models
#SBATCH --requeue
#SBATCH --open-mode=append       # a job that starts again writes on in the same log
#SBATCH --output=slurm-%j.out
set -u

ENGINE=${ENGINE:-deepspeed_configs/accelerate_zero2.yaml}
GPUS=${SLURM_GPUS_ON_NODE:-1}

# Shared storage: what all machines read and write. train.output_dir must lie there too (only rank 0 writes it).
export HF_HOME=${HF_HOME:-$PWD/runs/huggingface}    # fill it on the login node, then HF_HUB_OFFLINE=1 keeps jobs off the net
export MLLM_CACHE=${MLLM_CACHE:-$PWD/runs/cache}    # the index of the data, made once

# NCCL finds InfiniBand and NVLink by itself. Where it does not:
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}               # INFO tells which network it took: look for NET/IB, not NET/Socket
# export NCCL_SOCKET_IFNAME=ib0                     # the interface of the rendezvous, if the first one is a slow one
# export NCCL_IB_HCA=mlx5                           # which adapters, on machines that have several networks
# export NCCL_IB_DISABLE=1                          # no InfiniBand at all: everything over NCCL_SOCKET_IFNAME

# The first machine is where all meet. The port differs from job to job, so that two jobs on a machine do not meet.
export MLLM_MAIN_HOST=${MLLM_MAIN_HOST:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
export MLLM_MAIN_PORT=$((20000 + SLURM_JOB_ID % 20000))

# A launcher that is told to go grants its processes so many seconds for their checkpoint.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110}

# One machine's launcher. SLURM sends its warnings (USR1 before the end, TERM where the job is pre-empted) to this task
# and, as the site is set up, to all processes below it. The training processes must hear of it: they finish their step,
# write a checkpoint and leave. The launcher must not end of it: torchrun dies of USR1, which it does not handle.
one_machine() {
    (
        trap '' USR1
        exec accelerate launch --config_file "$ENGINE" \
            --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" --num_processes "$((SLURM_NNODES * GPUS))" \
            --main_process_ip "$MLLM_MAIN_HOST" --main_process_port "$MLLM_MAIN_PORT" \
            --deepspeed_multinode_launcher standard "$@"
    ) &
    launcher=$!
    warned=
    trap 'warned=1; warn "$launcher" "$1" &' USR1 TERM
    while :; do
        wait "$launcher"
        code=$?
        kill -0 "$launcher" 2>/dev/null || break    # else it was the warning that ended the wait
    done
    [ -n "$warned" ] && [ "$code" -ne 0 ] && return 143
    return "$code"
}

# Again and again: a process that still imports or builds ignores it.
warn() {
    while kill -0 "$1" 2>/dev/null; do
        pkill -USR1 --parent "$1" -f "$2"
        sleep 1
    done
}
export -f one_machine warn
export ENGINE GPUS

srun --kill-on-bad-exit=1 bash -c 'one_machine "$@"' one_machine "$@" --resume
code=$?
# 143: told to leave, and the checkpoint is written. The same job, same number, goes to the end of the queue.
[ "$code" -eq 143 ] && scontrol requeue "$SLURM_JOB_ID"
exit "$code"
