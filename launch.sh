#!/usr/bin/env bash
# bash launch.sh [PROCESSES] [--config FILE] [section.key=value ...]
#
# Train with PROCESSES processes on this machine. The default is one process per GPU, or one without a GPU. The default
# FILE is configs/gsm8k_qwen2.5_1.5b.yaml on a machine with a GPU, and configs/tiny.yaml without one. To use several
# machines, set NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT in the environment of each.
set -euo pipefail
trap 'printf "\ngrpo_core: SIGINT received before the run has started; nothing was started\n" >&2; exit 130' INT
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
if [ -n "${CUDA_VISIBLE_DEVICES+set}" ] && [ "$gpus" -gt 0 ]; then
    visible=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '[0-9A-Za-z]' || true)
    [ "$visible" -lt "$gpus" ] && gpus=$visible
fi

processes=$((gpus > 0 ? gpus : 1))
case "${1:-}" in
    "" | -* | *=*) ;;
    *) processes=$1; shift ;;
esac
case "$processes" in
    *[!0-9]* | 0) echo "PROCESSES is '$processes'; it must be a whole number of at least 1." >&2; exit 2 ;;
esac
if [ "$gpus" -eq 0 ]; then
    case " $* " in
        *" --config"*) echo "No GPU here: running on the CPU, processes: $processes." ;;
        *) echo "No GPU here: running the default, configs/tiny.yaml, on the CPU, processes: $processes." ;;
    esac
elif [ "$processes" -gt "$gpus" ]; then
    echo "$processes processes were asked for, but only $gpus GPU(s) are visible." >&2
    exit 2
fi

source "$root/environment.sh"
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m grpo_core launch --processes "$processes" "$@"
