#!/bin/sh
# Build .venv-ray: the engine and Ray in an environment of their own (about 700 MB).
#
# Its own, because Ray pins what it needs and the engine must work without it. Does nothing when
# neither this script nor the requirements have changed since the last success.
#
# usage: scripts/setup-ray.sh [PYTHON]      (default: that of .venv)
set -eu
cd "$(dirname "$0")/.."

venv=.venv-ray
stamp=$venv/.setup-$(cat scripts/setup-ray.sh pyproject.toml constraints.txt | cksum | cut -d' ' -f1)
if [ -e "$stamp" ]; then exit 0; fi

"${1:-.venv/bin/python}" -m venv "$venv"
"$venv/bin/python" -m pip --disable-pip-version-check install --quiet -c constraints.txt -e '.[ray]'
rm -f "$venv"/.setup-*
touch "$stamp"
