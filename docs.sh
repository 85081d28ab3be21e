#!/usr/bin/env bash
# The site through nbdev and Quarto where Quarto is installed, otherwise through smalldocs, which reads the same _quarto.yml; then every link between its pages.
set -euo pipefail
if command -v quarto >/dev/null; then nbdev-docs
else
  echo "quarto is not installed: rendering with smalldocs instead"
  VIRTUAL_ENV=$(realpath "$VENV") "$VENV/bin/uv" pip install --quiet smalldocs
  shim=$(mktemp -d); trap 'rm -rf "$shim"' EXIT
  printf '#!/bin/sh\nexit 0\n' > "$shim/quarto"; chmod +x "$shim/quarto"
  PATH="$shim:$PATH" nbdev-proc-nbs
  (cd _proc && smalldocs render)
  rm -rf _docs && mv _proc/_docs _docs
fi
"$VENV/bin/uv" tool run --quiet linkchecker --no-status --no-warnings _docs/index.html
echo "the site is in _docs"
