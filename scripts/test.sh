#!/usr/bin/env bash
# Linters, types, the arrows between folders, figures of the pages, and tests, on all cores but at most four. Further
# arguments go to pytest. WITH_EXAMPLES=1 asks for the frameworks of examples/ too, WITH_EXPORT=1 for what
# analysis/export.py needs; without them their tests are skipped.
set -euo pipefail
flags=("$@")
set -- requirements.txt requirements-dev.txt requirements-analysis.txt ${WITH_EXAMPLES:+requirements-examples.txt} \
    ${WITH_EXPORT:+requirements-export.txt}
# shellcheck source=scripts/setup.sh
source "$(dirname "$0")/setup.sh"
PATH=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$PATH

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
shellcheck -x scripts/*.sh .ci/run
"$PYTHON" -m mypy
lint-imports
"$PYTHON" -m analysis.ledger render --check
"$PYTHON" -m pytest --numprocesses=auto --maxprocesses=4 --dist=worksteal ${flags[@]+"${flags[@]}"}
