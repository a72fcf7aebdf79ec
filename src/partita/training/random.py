"""The random numbers of a step follow from the seed, the step and the position in the run, so no state is saved."""

from __future__ import annotations

_MASK = (1 << 64) - 1


def step_seed(seed: int, step: int, microbatch: int, *places: int) -> int:
    """The seed of a random generator at step `step`, counted from 0.

    Micro-batches are counted over all replicas, so that each samples the same numbers in every distribution.
    `places` are further numbers that the seed depends on, such as a stage.
    """
    return mixed_seed(seed, step, microbatch, *places)


def mixed_seed(*numbers: int) -> int:
    """A seed of 63 bits that depends on every one of `numbers` and on their order.

    A round of SplitMix64 for each (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"), so that
    the seeds of neighbouring numbers have nothing in common.
    """
    state = 0
    for number in numbers:
        state = _mix((state + number + 0x9E3779B97F4A7C15) & _MASK)
    return state >> 1


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
