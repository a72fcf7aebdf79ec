"""The random numbers of a step: they depend on the seed, the step and the replica alone, so that none have to be kept."""

from __future__ import annotations

_MASK = (1 << 64) - 1


def step_seed(seed: int, step: int, replica: int) -> int:
    """What to seed a generator with at step `step`, counted from 0, of a replica: 63 bits.

    Three rounds of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"), so that
    neighbouring steps, replicas and seeds have nothing in common.
    """
    state = 0
    for number in (seed, step, replica):
        state = _mix((state + number + 0x9E3779B97F4A7C15) & _MASK)
    return state >> 1


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
