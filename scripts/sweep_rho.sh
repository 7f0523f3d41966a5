#!/usr/bin/env bash
# One-step SAM over rho.

set -euo pipefail
# shellcheck source=scripts/sweep_lib.sh
source "$(dirname "$0")/sweep_lib.sh"
begin_sweep "$@"
read -r -d '' -a rhos <<<"${RHOS:-0.01 0.02 0.05 0.1 0.2}" || true
for rho in "${rhos[@]}"; do
    add_arm "samv2-rho$rho" --optmzr sgd-sam --sam-v2 --sam-rho "$rho"
done
run_sweep
