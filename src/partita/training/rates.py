"""Learning rates over the steps of a run, the same on both engines.

peak   /------\\           a linear warm-up to the peak, then one of
      /        \\          cosine    half a cosine to the floor at the last step (2017, 1608.03983, without restarts)
     /          \\___      linear    a line to the floor at the last step
    /    stable  decay     constant  the peak
                           wsd       the peak, then a line to the floor over the last `decay_steps` (2404.06395)
"""

from __future__ import annotations

import math

LR_SCHEDULES = ("cosine", "linear", "constant", "wsd")


def rate_at(step: int, steps: int, warmup_steps: int, kind: str, decay_steps: int, floor: float) -> float:
    """The learning rate of `step`, counted from 0, as a fraction of the peak.

    Args:
        step: The step.
        steps: Steps of the run.
        warmup_steps: Steps until the peak.
        kind: One of `LR_SCHEDULES`.
        decay_steps: For `wsd`: the last steps, over which the rate falls.
        floor: The last rate, as a fraction of the peak.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if kind == "constant":
        return 1.0
    first = max(warmup_steps, steps - decay_steps) if kind == "wsd" else warmup_steps
    done = min(1.0, max(0.0, (step - first) / max(1, steps - first)))
    left = 0.5 * (1 + math.cos(math.pi * done)) if kind == "cosine" else 1 - done
    return floor + (1 - floor) * left
