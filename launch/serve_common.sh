# shellcheck shell=bash disable=SC2034,SC2154 # its variables are read by the scripts that source it
# Sourced by launch/serve_*.sh: their options, what is wrong before the engine starts, and how it ended.
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$here/common.sh"
root="$(dirname "$here")"
engines="${EAGLE3_ENGINES:-$root/.engines}"

target="" head="" port=30000 cpu="" arguments=()
while [ $# -gt 0 ]; do
  case "$1" in
    --target | --head | --port)
      [ $# -gt 1 ] || die "$1 needs a value"
      set -- "$1=$2" "${@:3}" ;;
    --target=*) target="$(expand_home "${1#*=}")" && shift ;;
    --head=*) head="$(expand_home "${1#*=}")" && shift ;;
    --port=*) port="${1#*=}" && shift ;;
    --cpu) cpu=1 && shift ;;
    --dry-run) dry_run=1 && shift ;;
    --help | -h) usage ;;
    *) arguments+=("$1") && shift ;;
  esac
done
[ -n "$target" ] || die "--target DIR is needed: the model that is served"
whole_number --port "$port"
[ -z "$head" ] || [ -n "$dry_run" ] || [ -f "$head/config.json" ] ||
  die "no head at $head (config.json is expected); eagle3-xla export writes one"

# The Python of an engine's environment for the CPU; makes the environment where it is missing.
cpu_python() {
  python="$engines/$1/bin/python"
  run bash "$root/tests/engines/environments.sh" -d "$engines" "$1"
}

# One line for an engine that is not there, or whose Qwen2 hands no hidden states to a head. $1: name, $2: package.
check_engine() {
  local package
  package="$("$python" -c "import importlib.util as u; print(u.find_spec('$2').submodule_search_locations[0])" \
    2>/dev/null)" || die "$1 is not installed for $python; install it there, or name the Python that has it"
  if [ -n "$head" ] && grep -q '"qwen2"' "$target/config.json" 2>/dev/null &&
    ! grep -q set_eagle3_layers_to_capture "$package/srt/models/qwen2.py"; then
    die "this $1 takes no head for a Qwen2 target: eagle3-xla patch apply --engine $1 --path $package"
  fi
  ! (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || die "port $port is in use; choose another with --port=N"
}

# Runs the engine until it ends, and says how it ended. A signal to this script reaches it.
serve() {
  if [ -n "$dry_run" ]; then
    run "$@"
    return
  fi
  "$@" &
  local server=$!
  trap 'stopping=1; kill -TERM $server 2>/dev/null || true' TERM INT HUP
  wait_for "$server" 2>/dev/null # the shell says itself which signal ended it
  [ -z "$stopping" ] || exit 0
  die "the engine ended by itself (exit code $status); the lines above say why" 1
}
