#!/usr/bin/env bash
# Run a training script on all GPUs of this machine, or of several machines.
#
#   bash run_ddp.sh                                   train the default on what this machine has
#   bash run_ddp.sh train_reid.py --backbone ...      any script with its options (train_reid.py may be left out)
#   bash run_ddp.sh --check                           try the collectives on every rank: values, bandwidth, who is at fault
#   bash run_ddp.sh --help                            this text
#
# On several machines, the same line on each; only NODE_RANK differs, and 0 is the machine that keeps runs/:
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash run_ddp.sh train_reid.py --data ...
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=10.0.0.1 bash run_ddp.sh train_reid.py --data ...
#
# Environment variables, with their defaults:
#
#   NPROC            processes on this machine (one per GPU; without GPUs, 1)
#   NNODES           machines (1)
#   NODE_RANK        number of this machine, from 0 (0)
#   MASTER_ADDR      address of machine 0 (needed if NNODES is above 1)
#   MASTER_PORT      a free port on machine 0 (29500; on one machine, any free port is taken)
#   MAX_RESTARTS     how often all processes are started again after a failure; give the script --resume (0).
#                    On several machines torchrun then hands out the ranks itself: keep runs/ on a disk that all share
#   LOGLEVEL         set, e.g. to INFO, torchrun speaks, too; otherwise it ends as the first rank did that failed: with
#                    exit code 2 after bad input, 143 after SIGTERM
#   PYTHON           the interpreter whose torch is used (python3)
#   OMP_NUM_THREADS  CPU threads of each process (cores / processes)
#   NCCL_*           passed on as they are. Nothing is switched off here: NCCL uses P2P and InfiniBand where it finds them.
#                    For example NCCL_SOCKET_IFNAME=eth0 chooses a network, NCCL_DEBUG=INFO shows what NCCL has chosen
set -euo pipefail

fail() {
  echo "error: $1" >&2
  exit 2
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}

# What to run: the collectives' check, a script, or the default with options.
target=("$root/train_reid.py")
case "${1:-}" in
  -h | --help)
    sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"
    exit 0
    ;;
  --check)
    shift
    target=(-m benchmarks.collectives)
    export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
    ;;
  "" | -*) ;;
  *)
    if [ -f "$1" ]; then target=("$1"); else target=("$root/$1"); fi
    [ -f "${target[0]}" ] || fail "no script $1, neither here nor in $root"
    shift
    ;;
esac

# What this machine has, as torch sees it (CUDA_VISIBLE_DEVICES and CPU limits included).
command -v "$python" >/dev/null || fail "no interpreter $python: set PYTHON to the one that has torch"
status=0
machine=$("$python" -c '
import importlib.util, os, sys
if importlib.util.find_spec("torch") is None:
    sys.exit(3)
import torch
cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
print(torch.cuda.device_count(), cores)') || status=$?
[ "$status" -ne 3 ] || fail "$python has no torch: pip install -r requirements.txt, or set PYTHON to one that has it"
[ "$status" -eq 0 ] || fail "$python can't import torch (its message is above)"
read -r gpus cores <<<"$machine"

nodes=${NNODES:-1}
node_rank=${NODE_RANK:-0}
port=${MASTER_PORT:-29500}
restarts=${MAX_RESTARTS:-0}
processes=${NPROC:-$((gpus > 0 ? gpus : 1))}
for setting in "NNODES=$nodes" "NODE_RANK=$node_rank" "MASTER_PORT=$port" "MAX_RESTARTS=$restarts" "NPROC=$processes"; do
  [[ "${setting#*=}" =~ ^[0-9]+$ ]] || fail "$setting: give a whole number"
done
[ "$processes" -ge 1 ] || fail "NPROC=$processes: give at least 1"
[ "$node_rank" -lt "$nodes" ] || fail "NODE_RANK=$node_rank with NNODES=$nodes: machines are numbered from 0"

if [ "$nodes" -eq 1 ]; then
  meeting=(--standalone)
else
  [ -n "${MASTER_ADDR:-}" ] || fail "NNODES=$nodes needs MASTER_ADDR, the address of the machine with NODE_RANK=0"
  if [ "$restarts" -eq 0 ]; then
    meeting=(--node-rank "$node_rank" --master-addr "$MASTER_ADDR" --master-port "$port")
  else
    # Only this rendezvous lets all machines start again together, and only a fresh store keeps attempts apart.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE="${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}"
    meeting=(--rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$port" --rdzv-id carousel)
    meeting+=(--rdzv-conf "is_host=$((node_rank == 0))")
  fi
fi

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}"
export PYTHONUNBUFFERED="${PYTHONUNBUFFERED:-1}" # lines arrive when they are printed, in a log file too
# A hung NCCL collective ends the job, and NCCL says why it failed.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

exec "$python" "$root/core/engine/launch.py" --nnodes "$nodes" --nproc-per-node "$processes" "${meeting[@]}" \
  --max-restarts "$restarts" "${target[@]}" "$@"
