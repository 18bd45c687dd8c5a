# Set $python to an interpreter that has the dependencies of pyproject.toml; sourced by launch.sh and tests/run.sh.
# If the active environment has them, its interpreter is used. Otherwise $root/.venv is, which is created if necessary.
# $root is the repository; $needs names the lists in pyproject.toml that must be installed (default: dependencies).

satisfies() {
    "$1" - "$root/pyproject.toml" "${needs:-dependencies}" 2>/dev/null <<'PYTHON'
import re, sys
from importlib.metadata import version
from packaging.requirements import Requirement
text = open(sys.argv[1], encoding="utf-8").read()
for name in sys.argv[2].split():
    (wanted,) = re.findall(rf"^{name} = \[(.*?)\]$", text, re.S | re.M)
    for line in re.findall(r'"([^"]+)"', wanted):
        requirement = Requirement(line)
        assert requirement.specifier.contains(version(requirement.name), prereleases=True)
PYTHON
}

python=$(command -v python3 || command -v python || true)
if [ -z "$python" ]; then
    echo "grpo_core needs Python 3.11 or newer, but no python3 was found." >&2
    exit 2
elif ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "grpo_core needs Python 3.11 or newer; $python is $("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')." >&2
    exit 2
fi
if ! satisfies "$python"; then
    venv=$root/.venv/bin/python
    if command -v flock >/dev/null; then exec 9>"$root/.venv.lock" && flock 9; fi  # of two starts at the same time, only one installs
    if ! satisfies "$venv"; then
        case " ${needs:-} " in *" test "*) extras="[test]" ;; *) extras="" ;; esac
        echo "Installing into $root/.venv (once; pinned in constraints.txt) ..."
        "$python" -m venv "$root/.venv"
        # without compiling: most files of the packages are never imported
        "$venv" -m pip install --quiet --no-compile --disable-pip-version-check -c "$root/constraints.txt" -e "$root$extras"
    fi
    exec 9>&-
    python=$venv
fi
