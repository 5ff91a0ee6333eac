#!/usr/bin/env bash
# `serve [CONFIG] [--flags]` is `acestep serve`, with Serve's own lines, for `docker logs`; `serve` followed by a command of Ray's own
# (`serve status`, `serve deploy`, ...) and anything else is run as it is. KubeRay replaces this by `ray start`.
# Writes only to ACESTEP_HOME, ACESTEP_CHECKPOINTS and the temporary folder.
set -euo pipefail

if [ "${1:-serve}" = serve ]; then
  case ${2:-} in
    "" | -*) exec acestep serve /opt/acestep/serve_config.yaml --verbose "${@:2}" ;;
    *.yaml | *.yml) exec acestep serve "$2" --verbose "${@:3}" ;;
  esac
fi
exec "$@"
