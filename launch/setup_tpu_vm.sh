#!/usr/bin/env bash
# Makes a TPU VM ready to train: Python, .venv with the tpu extra, a look at the chips, the data.
#   bash launch/setup_tpu_vm.sh [options]
#     --data=gs://BUCKET/FOLDER   copied to --to
#     --to=DIR                    (data)
#     --extras=NAMES              of setup.cfg, by comma (tpu)
#     --dry-run                   print the commands, run none
# The chips of a slice answer only when all of its hosts ask at once, so run it on all of them together:
#   gcloud compute tpus tpu-vm ssh NAME --worker=all --command='bash eagle3-xla/launch/setup_tpu_vm.sh'
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

data="" to=data extras=tpu
while [ $# -gt 0 ]; do
  case "$1" in
    --data | --to | --extras)
      [ $# -gt 1 ] || die "$1 needs a value"
      set -- "$1=$2" "${@:3}" ;;
    --data=*) data="${1#*=}" && shift ;;
    --to=*) to="$(expand_home "${1#*=}")" && shift ;;
    --extras=*) extras="${1#*=}" && shift ;;
    --dry-run) dry_run=1 && shift ;;
    --help | -h) usage ;;
    *) die "unknown option $1" ;;
  esac
done
to="$(realpath --canonicalize-missing "$to")"
if [ -n "$data" ]; then
  [[ $data == gs://?* ]] || die "--data is '$data'; gs://BUCKET/FOLDER is expected"
  [ -n "$dry_run" ] || command -v gcloud >/dev/null || die "gcloud is not found; --data needs the Google Cloud CLI"
fi

# The images of TPU VMs bring Ubuntu 22.04, whose own Python is 3.10, and whose python3.11 is a release candidate; those of
# the deadsnakes archive are releases.
if ! find_python; then
  [ -n "$dry_run" ] || command -v apt-get >/dev/null || die "$no_python"
  # On a new VM Ubuntu's own upgrades hold apt's locks for some minutes; apt itself waits for dpkg's alone.
  apt=(sudo apt-get -qq -o DPkg::Lock::Timeout=600)
  tries 6 30 run "${apt[@]}" update || die "apt-get update failed, see above" 1
  tries 6 30 run sudo add-apt-repository --yes ppa:deadsnakes/ppa || die "add-apt-repository failed, see above" 1
  tries 6 30 run "${apt[@]}" install --yes python3.11 python3.11-venv || die "apt-get install failed, see above" 1
  base=python3.11
fi
export PJRT_DEVICE="${PJRT_DEVICE:-TPU}"
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"

look='import os, sys; import torch_xla.runtime as xr; from torch_xla._internal.tpu import num_available_chips
if os.environ["PJRT_DEVICE"] == "TPU" and not num_available_chips(): sys.exit("no TPU chip on the PCI bus of this host")
xr.use_spmd(); n = xr.global_runtime_device_count()
print(f"PJRT sees {n} {xr.device_type()} devices, {xr.addressable_runtime_device_count()} of them on this host")'
code=0
run timeout 300 "$python" -c "$look" || code=$?
[ "$code" != 124 ] || die "PJRT did not answer in 5 minutes; do all hosts of the slice run this at once?" 1
[ "$code" = 0 ] || die "PJRT can't use PJRT_DEVICE=$PJRT_DEVICE here, see above" 1

if [ -n "$data" ]; then
  run mkdir -p "$to"
  run gcloud storage rsync --recursive "$data" "$to"
fi
