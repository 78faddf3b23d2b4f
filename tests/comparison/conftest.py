"""The command line of a comparison that ends in seconds."""

import pytest


@pytest.fixture
def flags(team_flags):
    return team_flags
