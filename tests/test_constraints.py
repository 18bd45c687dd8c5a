"""constraints.txt names versions for the Python that pyproject.toml asks for, and for no other."""

import re
import tomllib

from conftest import ROOT


def test_s4_no_pin_is_for_a_python_that_is_refused():
    """FAULTS S4: lines for Python below 3.11, which requires-python refuses."""
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert needs.startswith(">=3.11")
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    names = [re.fullmatch(r"([\w.-]+)==[\w.+]+", line)[1].lower() for line in lines]  # no marker behind it
    assert len(names) == len(set(names)) > 10
