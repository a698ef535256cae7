"""Encoders of the driver: from a driver map, or from a vector, to the UNet's first feature map.

Both end in a zero-initialised convolution, so training starts from the unconditioned backbone.
Method, sections 5 and 6.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from loki_jax.models.layers import Conv3x3, Dtype, GroupNorm, ResidualBlock, dense


class ConditioningEncoder(nn.Module):
    """Driver map at image resolution -> residual for the UNet, 2^len(widths) times smaller.

    Attributes:
      stem: channels after the first convolution.
      widths: one stage for each entry: residual block to that width, then a stride-2 convolution.
      out: channels of the result, the UNet's first width.
      norm_groups: groups of every GroupNorm; must divide `stem` and all widths.
      remat: recompute the residual blocks in the backward pass. At 512 pixels they would otherwise keep
        more memory than the rest of the step (docs/scaling.md).
    """

    stem: int = 64
    widths: tuple[int, ...] = (128, 256, 320)
    out: int = 320
    norm_groups: int = 32
    dtype: Dtype = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "n s s c"]) -> Float[Array, "n h w out"]:
        """Raises ValueError when the map's size is not divisible by the total stride."""
        stride = 2 ** len(self.widths)
        if x.shape[1] % stride or x.shape[2] % stride:
            raise ValueError(
                f"driver maps of {x.shape[1]} x {x.shape[2]} are not divisible by the "
                f"encoder's stride {stride}"
            )
        block = nn.remat(ResidualBlock) if self.remat else ResidualBlock
        residual = lambda width, name: block(width, self.norm_groups, self.dtype, name=name)
        h = Conv3x3(self.stem, dtype=self.dtype, name="stem")(x.astype(self.dtype))
        for i, width in enumerate(self.widths):
            h = residual(width, f"stage_{i}_residual")(h)
            h = Conv3x3(width, stride=2, dtype=self.dtype, name=f"stage_{i}_sample")(h)
        h = residual(self.widths[-1], "refine")(h)
        h = nn.silu(GroupNorm(self.norm_groups, name="norm_out")(h))
        return Conv3x3(self.out, zero_init=True, dtype=self.dtype, name="conv_out")(h)


class VectorEncoder(nn.Module):
    """For driver arms without a map: vector of a frame -> MLP -> spatially constant channels -> zero conv.

    Attributes:
      hidden: width of the MLP.
      out: channels of the result, the UNet's first width.
      size: height and width of the latents.
    """

    hidden: int
    out: int
    size: tuple[int, int]
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n c"]) -> Float[Array, "n h w out"]:
        h = nn.silu(dense(self.hidden, "mlp_in", self.dtype)(x.astype(self.dtype)))
        h = nn.silu(dense(self.hidden, "mlp_middle", self.dtype)(h))
        h = dense(self.out, "mlp_out", self.dtype)(h)
        h = jnp.broadcast_to(h[:, None, None, :], (h.shape[0], *self.size, self.out))
        return Conv3x3(self.out, zero_init=True, dtype=self.dtype, name="conv_out")(h)
