"""Hypothesis without its clock (a busy machine is not a failing one), and the flag that rewrites the golden rules."""

from __future__ import annotations

import os

import hypothesis
import pytest

# repeatable in CI; HYPOTHESIS_PROFILE=default makes another search every time
hypothesis.settings.register_profile("steady", deadline=None, derandomize=True, database=None, max_examples=60)
# minutes of searching, for tests/unit/fuzz; the database in .hypothesis keeps what failed
hypothesis.settings.register_profile("long", deadline=None, max_examples=20_000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "steady"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="write tests/unit/balancer/golden/ again from today's rules"
    )
