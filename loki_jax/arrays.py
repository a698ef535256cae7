"""The array type of values which may live on the host or on a device."""

import jax
import numpy as np

ArrayLike = jax.Array | np.ndarray
