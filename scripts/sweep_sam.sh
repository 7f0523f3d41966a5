#!/usr/bin/env bash
# The full grid: SGD, then rho x one-step or two-step x adaptive or not.

set -euo pipefail
# shellcheck source=scripts/sweep_lib.sh
source "$(dirname "$0")/sweep_lib.sh"
begin_sweep "$@"
add_arm sgd --optmzr sgd
read -r -d '' -a rhos <<<"${RHOS:-0.02 0.05 0.1 0.2 0.5 1}" || true
for rho in "${rhos[@]}"; do
    add_arm "sam-rho$rho" --optmzr sgd-sam --sam-rho "$rho"
    add_arm "samv2-rho$rho" --optmzr sgd-sam --sam-v2 --sam-rho "$rho"
    add_arm "asam-rho$rho" --optmzr sgd-sam --adaptive --sam-rho "$rho"
    add_arm "asamv2-rho$rho" --optmzr sgd-sam --sam-v2 --adaptive --sam-rho "$rho"
done
run_sweep
