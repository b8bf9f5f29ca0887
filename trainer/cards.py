"""What accelerators can do, from their makers' data sheets: the one table of it. Nothing in it was measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """One accelerator in the machine that it is usually sold in.

    memory: bytes. bf16, tf32, fp32: peaks of dense products, FLOP/s; 0 where it has none. bandwidth: of its memory,
    bytes/s. node_link: bytes/s that it sends to its neighbours in the node. per_node: how many share a node.
    network: bytes/s that a node sends to others.
    """

    memory: float
    bf16: float
    tf32: float
    fp32: float
    bandwidth: float
    node_link: float
    per_node: int
    network: float


# Memory, peaks and bandwidth: NVIDIA's data sheets, dense figures. Links: half of NVLink's two-way figure, or 16 lanes
# of PCIe 4. Network: of NVIDIA's own eight-GPU machines, 100 Gbit/s for those without one; clouds often have less.
CARDS = {
    "h200": Card(141e9, 989e12, 494e12, 67e12, 4.8e12, 450e9, 8, 400e9),
    "h100": Card(80e9, 989e12, 494e12, 67e12, 3.35e12, 450e9, 8, 400e9),
    "a100": Card(80e9, 312e12, 156e12, 19.5e12, 2.04e12, 300e9, 8, 200e9),
    "l40s": Card(48e9, 362e12, 183e12, 91.6e12, 0.864e12, 32e9, 8, 12.5e9),
    "l4": Card(24e9, 121e12, 60e12, 30.3e12, 0.3e12, 32e9, 8, 12.5e9),
    "a10g": Card(24e9, 70e12, 35e12, 31.2e12, 0.6e12, 32e9, 8, 12.5e9),
    "v100": Card(32e9, 0.0, 0.0, 15.7e12, 0.9e12, 150e9, 8, 50e9),
}


def named(device_name: str) -> Card | None:
    """The card of a name as the driver says it, such as "NVIDIA H100 80GB HBM3"; None for an unknown one."""
    name = device_name.lower()
    return next((card for key, card in CARDS.items() if key in name), None)
