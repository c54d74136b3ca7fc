"""A short campaign with a fixed seed, on a host of its own: every planned fault is injected, every invariant holds."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SEEDS = {"bridge": 3, "host": 4}  # together they have most faults that fit into three minutes


@pytest.mark.serial  # recovery is timed
@pytest.mark.parametrize("datapath", SEEDS)
def test_campaign_of_three_minutes_violates_no_invariant(
    datapath: str, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    file = tmp_path / "result.json"
    flags = ["--seed", str(SEEDS[datapath]), "--minutes", "3", "--datapath", datapath, "--json", str(file)]
    command = [str(ROOT / "tests" / "chaos" / "run.sh"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(file.read_text())
    assert result["injected"] == result["planned"]
    assert result["requests"] > 3000
    figure(f"campaign, {datapath} path: {done.stdout.splitlines()[-1]}")
