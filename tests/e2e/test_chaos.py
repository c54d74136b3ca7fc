"""A short campaign with a fixed seed, on a host of its own: every planned fault is injected, every invariant holds."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# (data path, seed, minutes): three minutes together. Seed 29 on the bridge has an open defect, see docs/resilience.md.
CAMPAIGNS = (("bridge", 100, 1.5), ("host", 100, 1.5))


@pytest.mark.serial  # recovery is timed
@pytest.mark.parametrize(("datapath", "seed", "minutes"), CAMPAIGNS)
def test_short_campaign_injects_all_its_faults_and_violates_no_invariant(
    datapath: str, seed: int, minutes: float, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    file = tmp_path / "result.json"
    flags = ["--seed", str(seed), "--minutes", str(minutes), "--datapath", datapath, "--json", str(file)]
    command = [str(ROOT / "tests" / "chaos" / "run.sh"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(file.read_text())
    assert result["injected"] == result["planned"]
    assert result["requests"] > 30 * 60 * minutes
    figure(f"campaign, {datapath} path: {done.stdout.splitlines()[-1]}")
