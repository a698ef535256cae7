"""What all programs of data_prep share: quick starts, errors of usage, options of the library."""

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest

from data_prep import cli
from data_prep.build import Options as BuildProgram
from data_prep.dataset.options import BuildOptions, ImportOptions, SynthOptions
from data_prep.head_asset import Flame
from data_prep.head_asset import Options as HeadProgram
from loki_jax.fitting.clips import CROP_FACTOR
from loki_jax.fitting.problem import FitSettings

PROGRAMS = (
    "build", "import_fits", "export", "synth", "report", "head_asset", "embed_landmarks", "fetch_models",
    "recipes.hdtf", "recipes.talkvid",
)  # fmt: skip


def test_help_needs_no_jax():
    imports = "; ".join(f"import data_prep.{program}" for program in PROGRAMS)
    code = f"import sys; {imports}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


def test_options_of_the_command_line_are_those_of_the_library():
    command = ["--clips", "a", "b", "--head", "builtin", "--out", "x", "--fps", "30000/1001", "--no-images"]
    options = cli.parse(BuildProgram, "build", None, [*command, "--latents", "sd", "--max-seconds", "5"])
    assert options.clips == ("a", "b") and options.fps == Fraction(30000, 1001) and options.max_seconds == 5
    assert not options.images and options.stored_format == "png" and not options.overwrite
    flame = cli.parse(
        HeadProgram, "head_asset", None, ["flame", "m.pkl", "--out", "x.npz", "--lip-vertex", "-1"]
    )
    assert isinstance(flame, Flame) and flame.lip_vertex == -1 and flame.embedding and not flame.no_sheet
    assert BuildOptions().crop_factor == CROP_FACTOR and BuildOptions().fov == FitSettings().fov


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BuildOptions(size=4), "--size must be at least 8"),
        (lambda: BuildOptions(fps=Fraction(0)), "--fps positive"),
        (lambda: BuildOptions(validation=1.0), r"--validation must be in \[0, 1\)"),
        (lambda: BuildOptions(images=False), "--no-images needs --latents"),
        (lambda: BuildOptions(min_frames=0), "--min-frames must be positive"),
        (lambda: BuildOptions(fov=150.0), "--fov must be"),
        (lambda: BuildOptions(max_seconds=Fraction(0)), "--max-seconds must be positive"),
        (lambda: ImportOptions(camera=-1), "--camera not negative"),
        (lambda: SynthOptions(clips_per_identity=0), "--clips-per-identity"),
        (lambda: SynthOptions(seed=-1), "--seed not negative"),
    ],
)
def test_options_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_errors_of_usage_end_with_status_2(capsys):
    with pytest.raises(SystemExit) as end:
        cli.parse(BuildProgram, "build", None, ["--clips", "a", "--head", "h", "--out", "o", "--fov", "0"])
    assert end.value.code == 2 and "--fov must be in (0, 150)" in capsys.readouterr().err
