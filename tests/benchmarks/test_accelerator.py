"""The run on an accelerator goes through on a CPU, tiny, and its figures become rows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.accelerator import rows_of

ROOT = Path(__file__).parents[2]


def test_rows_name_the_device():
    train = {"steps_per_s": 2.0, "clips_per_s": 4.0, "mfu": 0.5, "peak_memory_gb": 60.0, "data_wait": 0.01}
    (row,) = rows_of({"device": {"device": "H200"}, "train": train})
    assert "| H200 | 500 ms a step, 4.00 windows/s, MFU 50.0%" in row and row.startswith("| main command")
    assert rows_of({"device": {"device": "H200"}}) == []


@pytest.mark.slow
def test_the_main_command_is_killed_and_resumed(tmp_path):
    command = [sys.executable, "benchmarks/accelerator.py", "--quick", "--out", str(tmp_path)]
    subprocess.run([*command, "--sections", "device", "inputs", "train"], cwd=ROOT, check=True)
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["section"] for row in rows] == ["device", "inputs", "train"]
    assert not any(row["exit"] for row in rows)
    assert rows[-1]["result"]["steps"] == 4 and rows[-1]["result"]["starts"] == 2
