# shellcheck shell=bash
# Sourced by the other scripts with requirement files as arguments. Goes to the root of the repository and sets PYTHON to
# a Python that has what they ask for: the running one, else that of .venv, which is made and filled if it has to be.
# Needs a network only then. TORCH_INDEX=URL names a further package index for pip, say one with torch's CPU builds.

unset CDPATH PYTHONSAFEPATH # they would send cd elsewhere, and hide the packages of this directory
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
versioned=(python3.14 python3.13 python3.12 python3.11 python3.10)

has_requirements() { # has_requirements PYTHON FILE...
    command -v "$1" >/dev/null && "$1" - "${@:2}" 2>/dev/null <<'PYTHON'
import os.path
import sys
from importlib.metadata import version

from packaging.requirements import Requirement

if sys.version_info < (3, 10) or os.path.exists(os.path.join(sys.prefix, "unfinished")):
    sys.exit(1)
for path in sys.argv[1:]:
    with open(path) as file:
        for line in (line.partition("#")[0].strip() for line in file):
            if line and not Requirement(line).specifier.contains(version(Requirement(line).name), prereleases=True):
                sys.exit(1)
PYTHON
}

find_base() { # prints a Python that can make an environment, or why none can
    local name found reason="there is none on PATH"
    for name in python3 python "${versioned[@]}"; do
        command -v "$name" >/dev/null || continue
        found=$("$name" - "$name" 2>/dev/null <<'PYTHON'
import sys

if sys.version_info < (3, 10):
    print(sys.argv[1] + " is Python %d.%d" % sys.version_info[:2])
    sys.exit(1)
try:
    import ensurepip, venv
except ImportError:
    print(sys.argv[1] + " cannot make environments, for which Debian and Ubuntu have the package python3-venv")
    sys.exit(1)
print(getattr(sys, "_base_executable", None) or sys.executable)  # not that of an environment, which may be made anew
PYTHON
        ) && echo "$found" && return
        reason=${found:-$reason}
    done
    echo "$reason"
    return 1
}

version_of() { # version_of PYTHON
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

fault_of_venv() { # says why .venv has to be made anew, if it has to be
    local version
    if [ -e .venv/unfinished ]; then
        echo "was left half-installed"
    elif ! version=$(version_of .venv/bin/python); then
        echo "has no Python that runs"
    elif ! .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "is of Python $version, which is too old"
    fi
}

show_progress() { # copies pip's output, and tells on stderr what it is at: one line on a terminal, else one every half minute
    local began=$SECONDS passed shown=0 code line part='' last='' every=30 before='' after='\n'
    [ ! -t 2 ] || { every=1 before='\r\033[K' after=''; }
    while true; do
        code=0
        IFS= read -r -t 1 line || code=$?
        line=$part$line part=''
        if [ "$code" = 0 ]; then
            echo "$line"
            case $line in *Collecting* | *Downloading* | *Building* | *Installing*) last=${line#"${line%%[! ]*}"} ;; esac
        elif [ "$code" -gt 128 ]; then # time is over, perhaps within a line
            part=$line
        else # the output is over
            [ -z "$line" ] || echo "$line"
            break
        fi
        passed=$((SECONDS - began))
        [ $((passed - shown)) -ge "$every" ] || continue
        shown=$passed
        printf "$before  %d:%02d  %5d MB in .venv  %.60s$after" $((passed / 60)) $((passed % 60)) "$(du -sm .venv | cut -f 1)" "$last" >&2
    done
    [ ! -t 2 ] || printf '%b' "$before" >&2
    cat # nothing, except where an old bash takes the one for the other
}

install() { # install FILE...: into .venv, made where there is none
    local base fault failed=0
    base=$(find_base) || { echo "error: Python 3.10 or newer is needed, and $base: install one, or put it on PATH" >&2; exit 2; }
    if [ -e .venv ] || [ -L .venv ]; then
        fault=$(fault_of_venv)
        [ -z "$fault" ] || { echo "note: .venv $fault, and is made anew" >&2; rm -rf .venv; }
    fi
    PYTHON=.venv/bin/python
    if has_requirements "$PYTHON" requirements.txt; then
        echo "installing $* into .venv, which takes a minute or so" >&2
    elif [ -n "${TORCH_INDEX:-}" ]; then
        echo "installing $* into .venv, torch from $TORCH_INDEX where that has the newest build" >&2
    else
        echo "installing $* into .venv: about 6 GB and five minutes where pip takes torch's CUDA build, as on x86-64 Linux;" >&2
        echo "a machine without a GPU needs a fraction of that if TORCH_INDEX=URL names a package index with CPU builds" >&2
    fi
    mkdir -p .venv
    touch .venv/unfinished # until pip is through: a process that is killed leaves it
    [ -x "$PYTHON" ] || "$base" -m venv .venv || exit 1
    "$PYTHON" -m pip --version >/dev/null 2>&1 || "$PYTHON" -m ensurepip >/dev/null || exit 1
    "$PYTHON" -m pip install --progress-bar off ${TORCH_INDEX:+"--extra-index-url=$TORCH_INDEX"} "${@/#/--requirement=}" 2>&1 |
        show_progress >.venv/pip.log || failed=1
    if [ "$failed" != 0 ]; then
        grep '^ERROR' .venv/pip.log | head -n 3 >&2
        echo "error: pip could not install $*: .venv/pip.log has all it said; mend that and launch this again" >&2
        exit 1
    fi
    rm .venv/unfinished
}

PYTHON=
for candidate in python3 python .venv/bin/python "${versioned[@]}"; do
    if has_requirements "$candidate" "$@"; then
        PYTHON=$candidate
        break
    fi
done
[ -n "$PYTHON" ] || install "$@"
