#!/usr/bin/env bash
# `serve [CONFIG]` prepares and serves a config; anything else is run as it is. KubeRay replaces this by `ray start`.
# Writes only to ACESTEP_HOME, ACESTEP_CHECKPOINTS and the temporary folder.
set -euo pipefail

if [ "${1:-serve}" = serve ] && [ $# -le 2 ]; then
  config=${2:-/opt/acestep/serve_config.yaml}
  env=$(acestep ray-env --alone) # apart from eval, which would go on without it
  eval "$env"
  acestep prepare "$config"
  exec serve run "$config"
fi
exec "$@"
