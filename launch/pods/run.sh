#!/usr/bin/env bash
# The one entry on every machine, in a container or not: sets caches up, listens for notice, and becomes the command.
#
#   bash launch/pods/run.sh launch.train --config=configs/stage3.py:v5e-64 --data=DATA --workdir=RUN --multihost
#
# CACHE   folder for compiled programs; may be shared, process 0 alone writes. Default: no cache.
# NOTICE  "gce": ask this machine's metadata server whether it is about to be taken away, and tell the command (SIGTERM).
# PIDFILE file with the number of the process; one that still runs there, as after a broken connection, is told to stop first.
# RAD_REFUSED file that the command makes where it ends with status 2, for a launcher that is told one status for many processes.
# PYTHON  default: python3.
set -euo pipefail

cd "$(dirname "$0")/../.."

if [[ -n "${CACHE:-}" ]]; then
  mkdir -p "$CACHE"
  export JAX_COMPILATION_CACHE_DIR="$CACHE"
fi

ours() {  # whether a process is a command of ours, and not another one that has its number by now
  [[ "$(tr '\0' ' ' 2>/dev/null <"/proc/$1/cmdline")" == *" -m launch."* ]]
}

if [[ -n "${PIDFILE:-}" ]]; then
  if [[ -s "$PIDFILE" ]] && old="$(<"$PIDFILE")" && ours "$old"; then
    echo "note: process $old of an earlier start is still there: it is told to stop" >&2
    kill -TERM "$old" || true
    for ((seconds = 0; seconds < ${PATIENCE:-120}; seconds++)); do
      ours "$old" || break
      sleep 1
    done
    if ours "$old"; then
      kill -KILL "$old" || true
      sleep 1
    fi
  fi
  echo "$$" >"$PIDFILE"
fi

if [[ "${NOTICE:-}" == gce ]]; then
  # After `exec` the command has this shell's number. Kubernetes and SLURM send SIGTERM themselves.
  command_pid=$$
  (
    url=http://metadata.google.internal/computeMetadata/v1/instance
    while kill -0 "$command_pid" 2>/dev/null; do
      for what in preempted maintenance-event; do
        answer="$(curl -s -m 2 -H 'Metadata-Flavor: Google' "$url/$what" || true)"
        if [[ "$answer" == TRUE || "$answer" == TERMINATE* ]]; then
          echo "note: this machine will be taken away ($what: $answer)" >&2
          kill -TERM "$command_pid"
          exit
        fi
      done
      sleep 2
    done
  ) &
fi

exec "${PYTHON:-python3}" -u -m "$@"
