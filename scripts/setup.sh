# shellcheck shell=bash
# Sourced by the other scripts with requirement files as arguments. Goes to the root of the repository and sets PYTHON to
# a Python that has what they ask for: the running one, else that of .venv, which is made and filled if it has to be.
# Needs a network only then.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

has_requirements() { # has_requirements PYTHON FILE...
    command -v "$1" >/dev/null && "$1" - "${@:2}" 2>/dev/null <<'EOF'
import sys
from importlib.metadata import version

from packaging.requirements import Requirement

if sys.version_info < (3, 10):
    sys.exit(1)
for path in sys.argv[1:]:
    with open(path) as file:
        for line in map(str.strip, file):
            if line and not Requirement(line).specifier.contains(version(Requirement(line).name), prereleases=True):
                sys.exit(1)
EOF
}

PYTHON=
for candidate in python3 python .venv/bin/python; do
    if has_requirements "$candidate" "$@"; then
        PYTHON=$candidate
        break
    fi
done
if [ -z "$PYTHON" ]; then
    echo "installing $* into .venv, which takes some minutes" >&2
    [ -x .venv/bin/python ] || python3 -m venv .venv || exit 1
    PYTHON=.venv/bin/python
    "$PYTHON" -m pip install --quiet "${@/#/--requirement=}" || exit 1
fi
