# shellcheck shell=bash disable=SC2034 # its variables are read by the scripts that source it
# Sourced by the other launch scripts: errors, options, --dry-run, waiting.
dry_run="" stopping="" status=0

# One line and exit code 2, or the one given.
die() {
  echo "$(basename "$0"): $1" >&2
  exit "${2:-2}"
}

# The header of the calling script, as its help.
usage() {
  sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0"
  exit 0
}

# ~/DIR as the folder that it means: a shell leaves it as it is after --option=.
expand_home() {
  if [[ $1 == \~/* ]]; then echo "$HOME/${1:2}"; else echo "$1"; fi
}

quoted() {
  local word words=()
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]]; then words+=("$word"); else words+=("${word@Q}"); fi
  done
  echo "${words[*]}"
}

# Runs a command; with --dry-run prints it instead, as one line that a shell reads back.
run() {
  if [ -n "$dry_run" ]; then quoted "$@"; else "$@"; fi
}

# Runs a command so many times, so many seconds apart, until it ends well.
tries() {
  local left="$1" pause="$2" code
  until "${@:3}"; do
    code=$?
    [ $((left -= 1)) -gt 0 ] || return "$code"
    echo "$(basename "$0"): exit code $code; once more in $pause seconds" >&2
    sleep "$pause"
  done
}

whole_number() {
  [[ $2 =~ ^[0-9]+$ ]] || die "$1 is '$2'; a whole number is expected"
}

# Waits for a child to end, through the signals that this shell handles meanwhile, and sets status to its exit code.
wait_for() {
  while kill -0 "$1" 2>/dev/null; do wait "$1" || true; done
  status=0
  wait "$1" || status=$?
}

# Sets base to a Python that the package runs on and that can make virtual environments; without one it fails, and
# no_python says why.
find_python() {
  local version fits='import sys; v = sys.version_info; print("python%d.%d" % v[:2])
sys.exit(not (3, 11) <= v < (3, 14) or v.releaselevel != "final")' # python3.11 of Ubuntu 22.04 is a release candidate
  no_python=""
  for base in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.13 python3; do
    version="$("$base" -c "$fits" 2>/dev/null)" || continue
    ! "$base" -c "import ensurepip" 2>/dev/null || return 0 # Debian and Ubuntu have it in a package of its own
    [ -n "$no_python" ] || no_python="$base can't make virtual environments: sudo apt-get install $version-venv"
  done
  base="" no_python="${no_python:-Python 3.11, 3.12 or 3.13 is needed; set PYTHON=/path/to/python3.11}"
  return 1
}
