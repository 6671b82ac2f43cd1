#!/usr/bin/env bash
# Runs a command on every host of a TPU slice, as torch_xla.distributed.xla_dist did, and again after a preemption.
#   bash launch/train_xla_dist.sh --tpu=NAME [options] -- COMMAND [arguments]
#     --zone=ZONE --project=PROJECT   as gcloud takes them (else gcloud's own defaults)
#     --env=NAME=VALUE                set for COMMAND on every host; may be repeated
#     --dir=DIR                       where COMMAND runs, from the home folder (eagle3-xla)
#     --restarts=N                    run COMMAND again so often after a signal, a lost connection, a preemption (10)
#     --recreate=CREATE               after a preemption: delete the slice, run this command here, which makes it anew
#     --setup=COMMAND                 run on every host of the new slice, in the home folder; at most 3 times, until it ends
#                                     well
#     --wait=MINUTES                  how long to wait until a slice is READY again (60)
#     --poll=SECONDS                  how often to look (30)
#     --dry-run                       print the commands, run none
# For example, from a machine with gcloud:
#   bash launch/train_xla_dist.sh --tpu=my-v4-32 --zone=us-central2-b -- \
#     bash launch/train_torchrun.sh --slice --config RECIPE
# Without --recreate the slice is waited for; a spot slice that was taken away does not come back by itself. Checkpoints
# must outlive the hosts: train.out in a bucket (gs://).
# SIGTERM and Ctrl-C stop the command on all hosts, so that it saves, and wait for it; while none runs, they end this.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$here/common.sh"

tpu="" place=() environment=() dir=eagle3-xla restarts=10 recreate="" setup="" wait=60 poll=30 command=()
while [ $# -gt 0 ]; do
  case "$1" in
    --tpu | --zone | --project | --env | --dir | --restarts | --recreate | --setup | --wait | --poll)
      [ $# -gt 1 ] || die "$1 needs a value"
      set -- "$1=$2" "${@:3}" ;;
    --tpu=*) tpu="${1#*=}" && shift ;;
    --zone=* | --project=*) place+=("$1") && shift ;;
    --env=*)
      [[ $1 =~ ^--env=[A-Za-z_][A-Za-z0-9_]*= ]] || die "$1: --env=NAME=VALUE is expected"
      environment+=("${1#*=}") && shift ;;
    --dir=*) dir="${1#*=}" dir="${dir#\~/}" && shift ;;
    --restarts=*) restarts="${1#*=}" && shift ;;
    --recreate=*) recreate="${1#*=}" && shift ;;
    --setup=*) setup="${1#*=}" && shift ;;
    --wait=*) wait="${1#*=}" && shift ;;
    --poll=*) poll="${1#*=}" && shift ;;
    --dry-run) dry_run=1 && shift ;;
    --help | -h) usage ;;
    --) command=("${@:2}") && break ;;
    -*) die "unknown option $1; the command that the hosts run comes after --" ;;
    *) command=("$@") && break ;;
  esac
done
[ -n "$tpu" ] || die "--tpu=NAME is missing; gcloud compute tpus tpu-vm list shows the names"
[ ${#command[@]} -gt 0 ] || die "no command; give it after --"
whole_number --restarts "$restarts"
whole_number --wait "$wait"
whole_number --poll "$poll"

# One COMMAND at a time on a host: gcloud itself starts a command again when a connection breaks, but the old one may
# live on. The lock file holds its process id.
lock="\"\$HOME\"/.eagle3-xla.lock" # the hosts' home
start="cd $(quoted "$dir") && exec flock --nonblock --conflict-exit-code=75 $lock"
start+=" bash -c 'echo \$\$ >$lock; exec \"\$@\"' -"
start+=" env $(quoted ${environment[@]+"${environment[@]}"} "${command[@]}")"
stop="flock --nonblock $lock true || { kill -TERM \"\$(cat $lock)\"; flock --timeout 300 $lock true; }"

gcloud=(gcloud compute tpus tpu-vm)
describe=("${gcloud[@]}" describe "$tpu" ${place[@]+"${place[@]}"} "--format=value(state)")
ssh=("${gcloud[@]}" ssh "$tpu" ${place[@]+"${place[@]}"} --worker=all)
delete=("${gcloud[@]}" delete "$tpu" ${place[@]+"${place[@]}"} --quiet)

if [ -n "$dry_run" ]; then
  run "${describe[@]}"
  run "${ssh[@]}" --command="$start"
  echo "$(basename "$0"): and after a preemption, at most $restarts times:" >&2
  run "${describe[@]}"
  if [ -n "$recreate" ]; then
    run "${delete[@]}"
    echo "$recreate"
    run "${describe[@]}"
    [ -z "$setup" ] || run "${ssh[@]}" --command="$setup"
  fi
  run "${ssh[@]}" --command="$stop"
  run "${ssh[@]}" --command="$start"
  exit 0
fi
command -v gcloud >/dev/null || die "gcloud is not found; install the Google Cloud CLI and run: gcloud auth login"

say() {
  echo "$(basename "$0"): $1" >&2
}

on_hosts() {
  "${ssh[@]}" --command="$1"
}

stop_hosts() {
  trap '' TERM INT HUP
  stopping=1
  say "stopping the command on all hosts of $tpu"
  on_hosts "$stop" || true
  [ -n "$running" ] || die "stopped before the command ran again" 1
}

until_ready() {
  local deadline=$((SECONDS + wait * 60))
  until state="$("${describe[@]}")" && [ "$state" = READY ]; do
    [ "$SECONDS" -lt "$deadline" ] || die "$tpu is ${state:-gone} after $wait minutes; it was not READY again" 1
    sleep "$poll"
  done
}

state="$("${describe[@]}")" || die "gcloud can't describe $tpu, see above" 1
[ "$state" = READY ] || say "$tpu is $state; waiting until it is READY"
until_ready
running=""
trap stop_hosts TERM INT HUP
for ((attempt = 0; ; attempt++)); do
  running=1
  # In a session of its own, so that Ctrl-C does not cut the connection over which the hosts tell how they saved.
  setsid "${ssh[@]}" --command="$start" &
  wait_for $!
  running="" ended=$status
  [ -z "$stopping" ] || exit "$ended"
  [ "$ended" != 75 ] || sleep "$poll" # a host knows of its preemption before the slice's state tells
  for _ in 1 2 3; do # what can't be described may be the network's fault
    ! state="$("${describe[@]}")" || break
    state=""
    sleep "$poll"
  done
  # 75 is the lock's or tells that a host is preempted or lost another, 255 a lost connection, 128 and above a signal;
  # others are the command's own words. 0 is not the end on a slice that is known to be going: a host that shuts down
  # may have ended the command.
  if [ "$ended" = 0 ] && [[ "$state" =~ ^(READY)?$ ]]; then
    [ -n "$state" ] || say "the command ended well; gcloud can't describe $tpu, see above"
    exit 0
  fi
  if [ "$state" = READY ] && [ "$ended" -lt 128 ] && [ "$ended" != 75 ]; then
    die "the command failed on a host (exit code $ended), see above" "$ended"
  fi
  [ "$attempt" -lt "$restarts" ] || die "exit code $ended, $tpu is ${state:-gone}, the last of $restarts restarts" 1
  say "exit code $ended, $tpu is ${state:-gone}; restart $((attempt + 1)) of $restarts"
  if [ "$state" != READY ]; then
    if [ -n "$recreate" ]; then
      [ -z "$state" ] || "${delete[@]}" || say "$tpu is not deleted, see above; Google may be at it, --recreate tells"
      bash -c "$recreate" || die "--recreate failed, see above" 1
    fi
    until_ready
    if [ -n "$recreate" ] && [ -n "$setup" ]; then
      tries 3 "$poll" on_hosts "$setup" || die "--setup failed on a host (exit code $?), see above" 1
    fi
  fi
  on_hosts "$stop" || true
done
