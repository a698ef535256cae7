"""The options of a conversion: command line of `loki_jax.convert` and argument of `conversion.convert`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import tyro


@dataclasses.dataclass(frozen=True)
class ConvertOptions:
    out: Path
    """folder or .safetensors file to write"""
    source: tyro.conf.Positional[Path | None] = None
    """weights to read, see above"""
    to: Literal["orbax", "diffusers", "flax", "ldm", "loki", "workdir"] | None = None
    """layout to write"""
    config: str | None = None
    """FILE.py[:VARIANT] or a run's config.json (default: SD 2.1's sizes)"""
    text_encoder: Path | None = None
    """text_encoder folder of SD 2.1 for the null prompt"""
    null_prompt: Path | None = None
    """.npy file with the null prompt, (1, 77, width)"""
    head: Path | None = None
    """head.npz of the workdir to write"""
    sha256: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """a weights file must have it"""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """dtype to write (default: as in the source)"""
    workdir: Path | None = None
    """workdir of a run of loki_jax.train, instead of SOURCE"""
    ema: bool = True
    """the moving average of a run's parameters, if there is one, and not the last parameters"""

    def contradiction(self) -> str | None:
        """What is wrong with the options taken together."""
        is_file = self.workdir is not None or self.to in ("ldm", "loki")
        if (self.source is None) == (self.workdir is None):
            return "give either SOURCE or --workdir"
        if is_file and self.out.suffix != ".safetensors":
            return f"--out {self.out}: the only file format written is .safetensors"
        if self.workdir is not None and self.to is not None:
            return f"--to {self.to}: give the workdir as SOURCE"
        if self.text_encoder is not None and self.null_prompt is not None:
            return "--text-encoder and --null-prompt exclude each other"
        return None
