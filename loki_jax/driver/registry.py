from __future__ import annotations

_CHANNELS = {"full": 45, "no_posenc": 3, "no_deform": 42}


def driver_channels(arm: str) -> int:
    """Channels of the driver map of an ablation arm.

    Raises:
      ValueError: there is no such arm, or it has no map.
    """
    if arm not in _CHANNELS:
        hint = " (its numbers come from `flame_vector`)" if arm == "flame_vector" else ""
        raise ValueError(f"arm {arm!r} has no driver map{hint}; arms with one: {', '.join(_CHANNELS)}")
    return _CHANNELS[arm]
