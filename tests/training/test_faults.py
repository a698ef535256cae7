"""What an error means, when updates count as stuck, and who ends a process that hangs. No model runs here."""

import errno
import os
import signal
import threading
import time
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs.common import base_config
from loki_jax.data.schema import Batch, ClipInfo, DatasetError
from loki_jax.training.config import NonFiniteError
from loki_jax.training.faults import (
    ExitCode,
    Preempted,
    StopRequest,
    Watchdog,
    exit_code,
    leave,
)
from loki_jax.training.logging import Progress, progress_line
from loki_jax.training.monitor import StepMonitor, window_names
from loki_jax.training.workdir import dataset_checksums, installed_packages


def chained(outer, inner):
    outer.__cause__ = inner
    return outer


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Preempted(3), ExitCode.PREEMPTED),
        (NonFiniteError("x"), ExitCode.NOT_FINITE),
        (OSError(errno.ENOSPC, "No space left on device"), ExitCode.STORAGE),
        (chained(ValueError("save failed"), OSError(errno.EDQUOT, "Disk quota exceeded")), ExitCode.STORAGE),
        (
            ValueError("INTERNAL: write failed: No space left on device [source locations=...]"),
            ExitCode.STORAGE,
        ),
        (DatasetError("shard"), ExitCode.DATA),
        (chained(RuntimeError("reader"), DatasetError("shard")), ExitCode.DATA),
        (ValueError("config"), ExitCode.ERROR),
        (KeyError("bug"), ExitCode.ERROR),
    ],
)
def test_errors_have_exit_codes(error, code):
    assert exit_code(error) == code


def test_message_names_the_last_whole_checkpoint(tmp_path, capsys):
    for name in ("4", "8", "12.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    with pytest.raises(SystemExit) as stopped:
        leave(OSError(errno.ENOSPC, "No space left on device", "x"), tmp_path)
    assert stopped.value.code == 74
    message = capsys.readouterr().err
    assert (
        "No space left" in message
        and str(tmp_path / "checkpoints" / "8") in message
        and "same command" in message
    )
    with pytest.raises(KeyError):  # an error of the program keeps its traceback
        leave(KeyError("bug"), tmp_path)


def test_signal_asks_once_and_acts_the_second_time():
    previous = signal.getsignal(signal.SIGTERM)
    with StopRequest() as request:
        assert not request.reached(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.reached(2)
        assert signal.getsignal(signal.SIGTERM) == previous
    assert signal.getsignal(signal.SIGTERM) == previous


def test_watchdog_ends_a_run_that_hangs_and_no_other():
    ended = []
    done = threading.Event()
    watchdog = Watchdog(0.2, end=lambda code: (ended.append(code), done.set()))
    assert not done.wait(0.5)  # not before the first beat
    watchdog.beat()
    assert done.wait(30) and ended == [ExitCode.LOST_PROCESS]
    patient = Watchdog(60.0, end=ended.append)
    patient.beat()
    patient.stop()
    assert len(ended) == 1


def test_what_takes_longer_than_a_step_has_a_limit_of_its_own():
    ended = []
    watchdog = Watchdog(0.4, 60.0, end=ended.append)
    watchdog.beat()
    with watchdog.slow():
        time.sleep(1.5)
    assert ended == []
    time.sleep(1.5)  # the limit of a step again
    assert ended == [ExitCode.LOST_PROCESS]
    hung = threading.Event()
    watchdog = Watchdog(0.1, 0.4, end=lambda code: hung.set())
    with watchdog.slow():
        assert hung.wait(30)


def metrics(loss=1.0, norm=1.0):
    bad = not np.isfinite([loss, norm]).all()
    return {"loss": jnp.float32(loss), "grad_norm": jnp.float32(norm), "skipped": jnp.float32(bad)}


def batch_of(number):
    return Batch(**dict.fromkeys(Batch._fields) | {"clip_index": number})


def faults(**changes):
    return ConfigDict(base_config().faults.to_dict() | changes)


def test_steps_are_looked_at_one_late_until_one_is_skipped():
    monitor = StepMonitor(faults(max_skips=3), skipped=5)
    assert monitor.follow(1, batch_of(1), metrics()) == []
    assert monitor.follow(2, batch_of(2), metrics(np.nan)) == []
    # Step 2 is seen when 3 has started, and then 3 at once.
    seen = monitor.follow(3, batch_of(3), metrics(norm=np.inf))
    assert [(i.kind, i.step, i.batch.clip_index) for i in seen] == [("skipped", 2, 2), ("skipped", 3, 3)]
    assert monitor.in_row == 2 and monitor.skipped == 7 and not monitor.stuck
    assert [i.step for i in monitor.follow(4, batch_of(4), metrics(np.nan))] == [4]
    assert monitor.stuck
    assert monitor.follow(5, batch_of(5), metrics(2.0, 3.0)) == [] and monitor.in_row == 0
    assert monitor.means() == {"loss": 1.5, "grad_norm": 2.0, "skipped": 3.0}
    assert monitor.means() == {"skipped": 0.0}


def test_one_skip_is_enough_where_the_config_says_so():
    monitor = StepMonitor(faults(max_skips=1))
    assert [i.step for i in monitor.follow(1, batch_of(1), metrics(np.nan))] == [1] and monitor.stuck


def test_spikes_stand_out_of_the_median():
    monitor = StepMonitor(faults(spike_factor=5.0, spike_window=40))
    rng = np.random.default_rng(0)
    found = [
        i
        for step in range(30)
        for i in monitor.follow(step, batch_of(step), metrics(norm=1 + 0.5 * rng.random()))
    ]
    assert found == []
    monitor.follow(30, batch_of(30), metrics(norm=9.0))
    (spike,) = monitor.finish()
    assert (spike.kind, spike.step) == ("spike", 30) and 1 < spike.figures["median"] < 1.5
    assert "step 30" in str(spike)


def test_windows_are_named_by_clip():
    clips = tuple(
        ClipInfo(clip_index=i, clip_id=f"clip{i}", identity="p", fps=Fraction(25), length=9, split="train",
                 first_record=0, fit_quality=None, source="", licence="", extra={}) for i in range(3)
    )  # fmt: skip
    batch = Batch(
        *(None,) * 5, clip_index=jnp.array([2, 0]), frame_index=jnp.array([[4, 5], [1, 2]]),
        reference_index=jnp.array([7, 3]), reference_camera=None, reference_crop=None,
    )  # fmt: skip
    assert window_names(batch, clips) == [
        {"clip": "clip2", "frame": 4, "reference": 7}, {"clip": "clip0", "frame": 1, "reference": 3},
    ]  # fmt: skip


def test_progress_counts_windows_and_utilisation():
    progress = Progress(10, 30, batch_size=4, flops=6.0, peak=12.0)
    figures = progress.report(20)
    assert figures["clips_per_s"] == pytest.approx(4 * figures["steps_per_s"])
    assert figures["mfu"] == pytest.approx(figures["steps_per_s"] / 2)
    assert figures["eta_s"] == pytest.approx(10 / figures["steps_per_s"])
    line = progress_line(20, 30, figures | {"loss": 0.25, "skipped": 2.0})
    assert "step 20/30" in line and "loss 0.2500" in line and "MFU" in line and "2 updates skipped" in line
    alone = Progress(0, 1, 1).report(1)
    assert "mfu" not in alone and "MFU" not in progress_line(1, 1, alone)


def test_checksums_tell_files_apart(tmp_path):
    (tmp_path / "small").write_bytes(b"a" * 100)
    with open(tmp_path / "large", "wb") as file:
        file.truncate(65 * 2**20)
    before = dataset_checksums(tmp_path)
    assert before["small"]["bytes"] == 100 and set(before["large"]) == {"bytes", "sha256_ends"}
    with open(tmp_path / "large", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    after = dataset_checksums(tmp_path)
    assert after["small"] == before["small"] and after["large"] != before["large"]
    assert any(line.startswith("jax==") for line in installed_packages())
