"""The benchmarks of training reach their bounds, in their quickest form."""

import pytest

from benchmarks import resume, topologies
from tests.training.tiny_run import environment


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(tmp_path):
    result = resume.run(tmp_path, 2, 30, environment(tmp_path / "cache"))
    assert result["identical"] == 2, result


@pytest.mark.slow
def test_two_processes_compute_what_one_does(tmp_path):
    result = topologies.measure(tmp_path, topologies.QUICK, 3, tmp_path / "cache")
    assert result["within_bounds"] and result["restored_pairs"] == 2, result
