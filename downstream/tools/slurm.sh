#!/usr/bin/env bash
# Shared by the tools of all tasks: start train.py or test.py as a job step of SLURM, one task a GPU.
#   slurm.sh {det,seg,cls} train PARTITION JOB_NAME CONFIG WORK_DIR [options of train.py]
#   slurm.sh {det,seg,cls} test PARTITION JOB_NAME CONFIG CHECKPOINT [options of test.py]
# From the environment: GPUS (8), GPUS_PER_NODE (8; 0 for the CPU), CPUS_PER_TASK (5), SRUN_ARGS, PORT, PYTHON.
set -euo pipefail

task=$1
tool=$2
shift 2
case $tool in
    train) last=WORK_DIR ;;
    test) last=CHECKPOINT ;;
esac
if (($# < 4)); then
    echo "usage: ./tools/slurm_$tool.sh PARTITION JOB_NAME CONFIG $last [options of $tool.py]" >&2
    exit 2
fi

partition=$1
job_name=$2
arguments=("$3")
[[ $tool == train ]] && arguments+=(--work-dir)
arguments+=("$4")
shift 4

# shellcheck source=common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh" "$task"
if [[ -n ${PORT:-} ]]; then
    export MASTER_PORT=${MASTER_PORT:-$PORT}
fi
tasks=${GPUS:-8}
tasks_per_node=$tasks
devices=()
if ((${GPUS_PER_NODE:-8} > 0)); then
    tasks_per_node=$((tasks < ${GPUS_PER_NODE:-8} ? tasks : ${GPUS_PER_NODE:-8}))
    devices=(--gres=gpu:"$tasks_per_node")
fi
read -ra more <<< "${SRUN_ARGS:-}"
exec srun -p "$partition" --job-name="$job_name" "${devices[@]}" \
    --ntasks="$tasks" --ntasks-per-node="$tasks_per_node" --cpus-per-task="${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 \
    "${more[@]}" "$python" -u "$root/downstream/$task/tools/$tool.py" "${arguments[@]}" --launcher slurm "$@"
