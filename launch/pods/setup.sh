#!/usr/bin/env bash
# Makes a fresh TPU VM (Ubuntu 22.04, whose Python is 3.10) ready for run.sh: Python 3.11, the locked packages, and the bucket.
#
#   bash launch/pods/setup.sh [BUCKET MOUNT]
#
# What is there already is left alone, so that it may be run again.
set -euo pipefail

cd "$(dirname "$0")/../.."
bucket="${1:-}" mount="${2:-}"

install() {
  # A fresh machine may still be installing things by itself.
  sudo apt-get -q -o DPkg::Lock::Timeout=600 update
  sudo env DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=600 install "$@"
}

if ! command -v python3.11 >/dev/null || ! python3.11 -c 'import ensurepip, venv'; then
  install software-properties-common
  sudo add-apt-repository -y ppa:deadsnakes/ppa
  install python3.11 python3.11-venv
fi
python3.11 -m venv .venv
grep '^libtpu==' requirements-dev.txt >tpu.txt
.venv/bin/pip install --quiet --use-pep517 -r requirements.txt -r tpu.txt

if [[ -n "$bucket" ]]; then
  if ! command -v gcsfuse >/dev/null; then
    key=/usr/share/keyrings/cloud.google.asc
    curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null
    echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    install gcsfuse
  fi
  sudo mkdir -p "$mount"
  sudo chown "$(id -un)" "$mount"
  # A checkpoint is a folder that is renamed when it is whole; without a hierarchical namespace that takes a limit of files.
  mountpoint -q "$mount" || gcsfuse --implicit-dirs --rename-dir-limit=200000 "$bucket" "$mount"
fi
