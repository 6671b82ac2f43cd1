#!/usr/bin/env bash
# Trains with one process on this host, under torchrun. On a slice of several hosts it runs on each of them.
#   bash launch/train_torchrun.sh [options] --config RECIPE [--section.key=value ...]
#     --nnodes=N        hosts (1)
#     --node-rank=R     number of this host, from 0 (TPU_WORKER_ID, or 0)
#     --rdzv=HOST:PORT  host 0 and a free port there; needed when there are several hosts
#     --slice           the three above, as this TPU VM's metadata server says
#     --restarts=N      start again so often after a signal ended the training (3)
#     --dry-run         print the commands, run none
# Everything else goes to `eagle3-xla train`. SIGTERM, Ctrl-C and Google's preemption notice reach the training alone:
# it saves and this script exits 0, after a preemption 75: to be started again. A training that any other signal ended
# (out of memory, a crash of the runtime, a lost peer) is started again here and continues from its last checkpoint; one
# that explained its failure is not.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$here/common.sh"

nnodes=1 node_rank="${TPU_WORKER_ID:-0}" rdzv="" slice="" restarts=3 arguments=()
while [ $# -gt 0 ]; do
  case "$1" in
    --nnodes | --node-rank | --rdzv | --restarts)
      [ $# -gt 1 ] || die "$1 needs a value"
      set -- "$1=$2" "${@:3}" ;;
    --nnodes=*) nnodes="${1#*=}" && shift ;;
    --node-rank=*) node_rank="${1#*=}" && shift ;;
    --rdzv=*) rdzv="${1#*=}" && shift ;;
    --restarts=*) restarts="${1#*=}" && shift ;;
    --slice) slice=1 && shift ;;
    --dry-run) dry_run=1 && shift ;;
    --help | -h) usage ;;
    --) arguments+=("${@:2}") && break ;;
    *) arguments+=("$1") && shift ;;
  esac
done
metadata="http://${GCE_METADATA_HOST:-metadata.google.internal}/computeMetadata/v1/instance"
ask=(curl --silent --fail --header "Metadata-Flavor: Google")
preempted="$metadata/preempted?wait_for_change=true&timeout_sec=60"

attribute() {
  "${ask[@]}" --max-time 10 "$metadata/attributes/$1" || die "--slice: no metadata server of a TPU VM at $metadata"
}
if [ -n "$slice" ] && [ -n "$dry_run" ]; then
  run "${ask[@]}" "$metadata/attributes/agent-worker-number"
  run "${ask[@]}" "$metadata/attributes/worker-network-endpoints"
  nnodes=HOSTS node_rank=RANK rdzv=HOST0:29400
elif [ -n "$slice" ]; then
  node_rank="$(attribute agent-worker-number)"
  # hostname:uid:ip,hostname:uid:ip,...
  IFS=, read -ra hosts <<<"$(attribute worker-network-endpoints)"
  nnodes=${#hosts[@]} rdzv="$(cut -d: -f3 <<<"${hosts[0]}"):29400"
fi

whole_number --restarts "$restarts"
command=(torchrun --nnodes="$nnodes" --nproc-per-node=1)
if [ "$nnodes" = 1 ]; then
  command+=(--standalone)
else
  if [ -z "$slice" ]; then
    whole_number --nnodes "$nnodes"
    whole_number --node-rank "$node_rank"
    [ "$node_rank" -lt "$nnodes" ] || die "--node-rank is $node_rank, but there are --nnodes=$nnodes, counted from 0"
  fi
  [[ $rdzv =~ ^.+:[0-9]+$ ]] || die "--nnodes=$nnodes needs --rdzv=HOST:PORT (host 0 and a free port there)"
  command+=(--node-rank="$node_rank" --rdzv-backend=static --rdzv-id=eagle3-xla --rdzv-endpoint="$rdzv")
fi
command+=(-m eagle3_xla train ${arguments[@]+"${arguments[@]}"})

if [ -n "$dry_run" ]; then
  run "${ask[@]}" "$preempted"
  run "${command[@]}"
  exit 0
fi
PATH="$here/../.venv/bin:$PATH"
command -v torchrun >/dev/null || die "torchrun is not found; launch/setup_tpu_vm.sh or launch/install.sh installs it"

# Google's metadata server says TRUE when this machine will be taken away. Elsewhere nobody answers, and that is that.
watch_for_preemption() {
  local taken
  taken="$("${ask[@]}" --max-time 3 "$metadata/preempted")" || return 0
  until [ "$taken" = TRUE ]; do
    taken="$("${ask[@]}" "$preempted")" || sleep 10
  done
  touch "$log/preempted"
  kill -TERM "$$"
}

# To the training alone: torchrun would give it 30 seconds and then kill it, whatever it is saving.
stop() {
  stopping=1
  [ -z "${torchrun:-}" ] || pkill -TERM -P "$torchrun" || kill -TERM "$torchrun" 2>/dev/null || true
}

log="$(mktemp -d)"
mkfifo "$log/stderr"
watch_for_preemption </dev/null >/dev/null 2>&1 &
watcher=$!
clean_up() {
  pkill -P "$watcher" || true
  kill "$watcher" 2>/dev/null || true
  rm -rf "$log"
}
trap clean_up EXIT
trap stop TERM INT HUP

for ((attempt = 0; ; attempt++)); do
  # torchrun answers 1 whatever happened and says on stderr how the training ended. tee outlives every signal and a
  # broken connection, so that a line of progress that nobody reads ends no training.
  (trap '' TERM INT HUP && exec tee -p "$log/text" <"$log/stderr" >&2) &
  tee=$!
  setsid "${command[@]}" 2>"$log/stderr" &
  torchrun=$!
  [ -z "$stopping" ] || stop
  wait_for "$torchrun"
  ended=$status
  wait_for "$tee" # every process of this attempt is gone
  if [ -e "$log/preempted" ]; then
    [ "$ended" = 0 ] || die "preempted before the training could save; start it again" 75
    die "preempted; the training ended in time, start it again and it goes on" 75
  fi
  [ "$ended" != 0 ] || exit 0
  code="$(grep -oE 'exitcode: -?[0-9]+' "$log/text" | tail -n 1 | grep -oE -- '-?[0-9]+$' || true)"
  if [ "${code:-0}" -lt 0 ]; then ended=$((128 - code)); elif [ -n "$code" ]; then ended=$code; fi
  [ -z "$stopping" ] || die "stopped before the training could save; start it again" "$ended"
  if [ "$ended" -le 128 ] && [ "$ended" != 75 ]; then # 75: another host went away
    message="$(tr '\r' '\n' <"$log/text" | grep -oE 'eagle3-xla train: .*' | tail -n 1 || true)"
    die "the training failed (exit code $ended): ${message:-see above}" "$ended"
  fi
  why="signal $((ended - 128))"
  [ "$ended" != 75 ] || why="the loss of another host"
  [ "$attempt" -lt "$restarts" ] || die "$why ended the training, the last of $restarts restarts" "$ended"
  echo "$(basename "$0"): $why ended the training; restart $((attempt + 1)) of $restarts" >&2
done
