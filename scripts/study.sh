#!/usr/bin/env bash
# Train what the study of RESULTS.md lacks, two runs at a time, and add every finished run to results/. Launched again it
# goes on where it was interrupted. The list is in experiment/study_list.py; --help says what can be set.
set -euo pipefail
flags=("$@")
set -- requirements.txt
# shellcheck source=scripts/setup.sh
source "$(dirname "$0")/setup.sh"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # of each run; torch reads it as it is imported
exec "$PYTHON" -m analysis.study study "$OLDPWD" ${flags[@]+"${flags[@]}"}
