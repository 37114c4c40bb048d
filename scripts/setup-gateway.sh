#!/bin/sh
# Build .venv-gateway: a LiteLLM proxy in an environment of its own (about 1 GB).
#
# Its own, because it pins versions of half the ecosystem; the engine reaches it over HTTP, never by
# import. The version is exact: 1.82.7 and 1.82.8 on the package index were malicious, so a newer one
# is taken by hand alone. Does nothing when this script has not changed since the last success.
#
# usage: scripts/setup-gateway.sh [PYTHON]      (default: that of .venv)
set -eu
cd "$(dirname "$0")/.."

venv=.venv-gateway
stamp=$venv/.setup-$(cksum <scripts/setup-gateway.sh | cut -d' ' -f1)
if [ -e "$stamp" ]; then exit 0; fi

"${1:-.venv/bin/python}" -m venv "$venv"
"$venv/bin/python" -m pip --disable-pip-version-check install --quiet 'litellm[proxy]==1.105.7'
rm -f "$venv"/.setup-*
touch "$stamp"
