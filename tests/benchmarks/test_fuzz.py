"""The fuzzer by coverage starts, reads files and reaches more than the valid ones do."""

import pytest

from benchmarks.fuzz_atheris import fuzz


@pytest.mark.slow
def test_files_are_read_and_none_ends_in_a_foreign_exception(tmp_path):
    pytest.importorskip("atheris")
    result = fuzz("safetensors", 2, tmp_path / "found")
    assert result["files"] > 50 and result["reached"] > 10 and not result["found"], result
