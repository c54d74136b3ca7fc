"""Two short campaigns with a fixed seed, each on a host of its own: every fault is injected, every invariant holds."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SEED, MINUTES = 100, 1.5


def begin(datapath: str, result: Path) -> subprocess.Popen[str]:
    flags = ["--seed", str(SEED), "--minutes", str(MINUTES), "--datapath", datapath, "--json", str(result)]
    command = [str(ROOT / "tests" / "chaos" / "run.sh"), *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.paired  # recovery is timed
def test_short_campaigns_inject_all_their_faults_and_violate_no_invariant(
    tmp_path: Path, figure: Callable[[str], None]
) -> None:
    results = {path: tmp_path / f"{path}.json" for path in ("bridge", "host")}
    campaigns = {path: begin(path, result) for path, result in results.items()}
    printed = {path: campaign.communicate(timeout=900)[0] for path, campaign in campaigns.items()}
    for path, campaign in campaigns.items():
        assert campaign.returncode == 0, printed[path]
        result = json.loads(results[path].read_text())
        assert result["injected"] == result["planned"]
        assert result["requests"] > 30 * 60 * MINUTES
        figure(f"campaign, {path} path: {printed[path].splitlines()[-1]}")
