"""A short campaign of faults; by hand a long one: see `campaign`."""

import pytest

from tests.faults import campaign


@pytest.mark.slow
def test_short_campaign(tmp_path):
    found = campaign.campaign(kills=3, terms=1, processes=[1, 2], seed=1, folder=tmp_path)
    assert (found["kills"], found["terms"], found["wrong"]) == (3, 1, [])
    assert (found["bit_equal"], found["lost_records"], found["repeated_records"]) == (True, 0, 0)
    assert found["rows_compared"] >= campaign.STEPS * campaign.ROWS
    assert 0 < found["sigterm_to_exit_s"] < 30  # the goal on a machine with nothing else to do is 5
