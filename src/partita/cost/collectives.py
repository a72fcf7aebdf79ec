"""Collectives: the seconds of each on a group of ranks, from latency and bandwidth of its links (alpha and beta).

    ring      (n - 1) steps of 1 / n of the bytes; a reduction of all takes them twice
    tree      2 log2(n) steps down and up a tree, and the bytes twice (double binary trees; Sanders et al. 2009)

Where a group spans machines, its rings enter and leave each machine through as many network ports as it has ranks there. In an
all-to-all each rank sends bytes of its own, those to other machines through its own port.
"""

from __future__ import annotations

import math
from itertools import pairwise

from partita.cost.hardware import Curve, Group, Hardware, Link, value_at


def seconds(hardware: Hardware, group: Group, name: str, message_bytes: float) -> float:
    """Seconds of a collective.

    Args:
        hardware: The links.
        group: The ranks.
        name: One of `partita.cost.hardware.COLLECTIVES`.
        message_bytes: Bytes of the unsplit tensor: what an all-gather returns, what a reduce-scatter takes.
    """
    n = group.size
    if n <= 1 or message_bytes <= 0:
        return 0.0
    inside = hardware.link_inside()
    if group.is_inside:
        return _on_link(inside, name, n, message_bytes)
    between = hardware.link_between()
    nodes = math.ceil(n / group.per_node)
    speed = min(inside.bandwidth * value_at(inside.efficiency, message_bytes),
                group.per_node * between.bandwidth * value_at(between.efficiency, message_bytes / group.per_node))  # fmt: skip
    if group.per_node == 1:
        return _on_link(between, name, n, message_bytes)
    if name == "all_to_all":
        outside, within = message_bytes * (n - group.per_node) / n, message_bytes * (group.per_node - 1) / n
        return between.latency_s + max(
            outside / (between.bandwidth * value_at(between.efficiency, outside)),
            within / (inside.bandwidth * value_at(inside.efficiency, within)),
        )
    steps = {"all_reduce": 2, "send": 0, "broadcast": 1}.get(name, 1)
    ring = steps * ((nodes - 1) * between.latency_s + (group.per_node - 1) * inside.latency_s)
    tree = steps * (math.log2(nodes) * between.latency_s + (group.per_node - 1) * inside.latency_s)
    latency = min(
        ring if "ring" in between.algorithms else math.inf, tree if "tree" in between.algorithms else math.inf
    )
    return max(latency, between.latency_s) + volume(name, n) * message_bytes / speed


def least_seconds(hardware: Hardware, group: Group, name: str, message_bytes: float) -> float:
    """Seconds that reductions, scatters or gathers of so many bytes take at least: at the best efficiency, without latency."""
    if group.size <= 1:
        return 0.0
    inside, between = hardware.link_inside(), hardware.link_between()
    link = inside if group.is_inside else between
    speed = _fastest(link) if group.is_inside else min(_fastest(inside), group.per_node * _fastest(between))
    if (group.is_inside or group.per_node == 1) and link.measured:
        return 0.0
    if group.per_node == 1:
        speed = _fastest(between)
    return volume(name, group.size) * message_bytes / speed


def _fastest(link: Link) -> float:
    return link.bandwidth * max(share for _, share in link.efficiency)


def volume(name: str, n: int) -> float:
    """The share of the bytes that each rank sends in a ring."""
    if name == "all_reduce":
        return 2 * (n - 1) / n
    return 1.0 if name in ("broadcast", "send") else (n - 1) / n


def _on_link(link: Link, name: str, n: int, size: float) -> float:
    if name in link.measured:
        return _scaled(link.measured[name], name, n, size)
    speed = link.bandwidth * value_at(link.efficiency, size)
    if name in ("broadcast", "send"):
        return link.latency_s * (1 if name == "send" else math.ceil(math.log2(n))) + size / speed
    rounds = 2 if name == "all_reduce" else 1
    ring = rounds * (n - 1) * link.latency_s + volume(name, n) * size / speed
    if "tree" not in link.algorithms or name != "all_reduce":
        return ring
    tree = 2 * math.ceil(math.log2(n)) * link.latency_s + 2 * size / speed
    return tree if "ring" not in link.algorithms else min(ring, tree)


def _scaled(curve: Curve, name: str, n: int, size: float) -> float:
    """Seconds among n ranks from those measured among two: each of n - 1 steps has its latency, the rest goes by volume."""
    latency = curve[0][1]
    if size <= curve[0][0]:
        two = latency
    elif size >= curve[-1][0]:
        (low, first), (high, last) = curve[-2] if len(curve) > 1 else curve[-1], curve[-1]
        slope = (last - first) / (high - low) if high > low else 0.0
        two = last + slope * (size - high)
    else:
        two = _between(curve, size)
    if n == 2 or name == "send":
        return two
    return latency * (n - 1) + max(0.0, two - latency) * volume(name, n) / volume(name, 2)


def _between(curve: Curve, size: float) -> float:
    """Seconds between two measured sizes, in proportion to the bytes."""
    for (low, first), (high, last) in pairwise(curve):
        if low <= size <= high:
            return first + (last - first) * (size - low) / (high - low)
    return curve[-1][1]
