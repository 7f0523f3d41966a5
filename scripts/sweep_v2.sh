#!/usr/bin/env bash
# No SAM, two-step SAM and one-step SAM.

set -euo pipefail
# shellcheck source=scripts/sweep_lib.sh
source "$(dirname "$0")/sweep_lib.sh"
begin_sweep "$@"
add_arm sgd --optmzr sgd
read -r -d '' -a rhos <<<"${RHOS:-0.05}" || true
for rho in "${rhos[@]}"; do
    add_arm "sam-rho$rho" --optmzr sgd-sam --sam-rho "$rho"
    add_arm "samv2-rho$rho" --optmzr sgd-sam --sam-v2 --sam-rho "$rho"
done
run_sweep
