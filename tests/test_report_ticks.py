"""The labels of the axes of a report, computed by the page's own script."""

import json
import shutil
import subprocess

import pytest
from conftest import ROOT

PAGE = ROOT / "grpo_core" / "report" / "page"


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_n20_no_two_ticks_of_an_axis_have_the_same_label():
    """FAULTS N20: a panel whose values were close had two equal labels on its axis."""
    domains = [
        [0.0, 1.0], [0.99990, 1.0001], [1000.1, 1001.3], [123456.1, 123456.9], [1.00001e7, 1.00003e7], [1e-5, 1.0004e-5],
        [-0.30002, -0.30001], [0, 48], [1e-6, 1e-1],
    ]  # fmt: skip
    code = "".join((PAGE / f"{name}.js").read_text() for name in ("dom", "scales")) + (
        f"const out = {json.dumps(domains)}.flatMap((d) => [3, 5, 8].flatMap((n) => [inShort, (v, k) => inShort(100 * v, k) + ' %'].map((f) => {{"
        "const at = ticks(d[0], d[1], n); return [at.length, typeof tickLabels === 'function' ? tickLabels(at, f) : at.map((v) => f(v, 3))]; })));"
        "console.log(JSON.stringify(out));"
    )
    done = subprocess.run(["node", "-e", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for count, labels in json.loads(done.stdout):
        assert count == len(labels) == len(set(labels)) > 0, labels
