#!/usr/bin/env bash
# Shared by the tools of all tasks: start train.py or test.py on the GPUs of a machine, or on its CPU.
#   dist.sh {det,seg,cls} train CONFIG GPUS [options of train.py]
#   dist.sh {det,seg,cls} test CONFIG CHECKPOINT GPUS [options of test.py]
# GPUS is the number of processes: one a GPU, or where there is none, on the CPU through gloo. 0 is one process on the CPU.
# From the environment: CUDA_VISIBLE_DEVICES, PYTHON; PORT; NNODES, NODE_RANK, MASTER_ADDR for several machines.
set -euo pipefail

task=$1
tool=$2
shift 2
case $tool in
    train) usage="CONFIG GPUS [options of train.py]" num_files=1 ;;
    test) usage="CONFIG CHECKPOINT GPUS [options of test.py]" num_files=2 ;;
esac
if (($# <= num_files)); then
    echo "usage: ./tools/dist_$tool.sh $usage" >&2
    exit 2
fi

files=("${@:1:num_files}")
gpus=${*:num_files+1:1}
shift $((num_files + 1))

# shellcheck source=common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh" "$task"
[[ $gpus =~ ^[0-9]+$ ]] || fail "the number of GPUs is '$gpus': ./tools/dist_$tool.sh $usage"
script=$root/downstream/$task/tools/$tool.py

if ((gpus == 0)); then
    CUDA_VISIBLE_DEVICES="" exec "$python" "$script" "${files[@]}" "$@"
fi
if [[ -n ${PORT:-} || ${NNODES:-1} != 1 ]]; then
    meeting=(--nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}"
        --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-29500}")
else
    meeting=(--standalone) # a free port, so that several runs fit on a machine
fi
exec "$python" -m downstream.tools.launch "${meeting[@]}" --nproc_per_node="$gpus" \
    "$script" "${files[@]}" --launcher pytorch "$@"
