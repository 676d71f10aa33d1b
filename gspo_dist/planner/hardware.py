"""GPUs that a plan can name: published figures, rounded as their makers round them."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1 << 30


def gib(count: float) -> str:
    """Bytes as text, in MiB below a tenth of a GiB."""
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / (1 << 20):.1f} MiB"


@dataclass(frozen=True)
class Gpu:
    """One GPU and its share of a node."""

    name: str
    """Family and memory as the maker writes them: H100-80GB."""
    memory_gib: float
    """Usable memory in GiB: what the driver reports, not what the name says."""
    tflops: float
    """Dense bf16 arithmetic in 1e12 FLOP/s, without sparsity."""
    hbm_gb_s: float
    """Memory bandwidth in 1e9 bytes per second."""
    network_gb_s: float = 50.0
    """Its share of the node's network cards in 1e9 bytes per second, one direction: one 400-Gbit/s card."""
    gpus_per_node: int = 8
    """GPUs of this kind per node."""
    nvlink_gb_s: float = 450.0
    """Between GPUs of one NVLink domain, in 1e9 bytes per second and direction."""
    nvlink_gpus: int = 8
    """GPUs of one NVLink domain: those of a node, or of a rack."""
    pcie_gb_s: float = 64.0
    """To the memory of its host, in 1e9 bytes per second and direction."""

    @property
    def memory(self) -> int:
        """Usable bytes."""
        return int(self.memory_gib * GIB)


# Sources: the makers' data sheets (SXM variants).
GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100-40GB", 39.4, 312.0, 1555.0, 25.0, nvlink_gb_s=300.0, pcie_gb_s=32.0),
        Gpu("A100-80GB", 79.2, 312.0, 2039.0, 25.0, nvlink_gb_s=300.0, pcie_gb_s=32.0),
        Gpu("H100-80GB", 79.2, 989.0, 3350.0),
        Gpu("H200-141GB", 139.8, 989.0, 4800.0),
        Gpu("H20-96GB", 95.1, 148.0, 4000.0),
        Gpu("B200-180GB", 178.0, 2250.0, 7700.0, nvlink_gb_s=900.0),
        Gpu("B300-288GB", 268.0, 2250.0, 8000.0, 100.0, nvlink_gb_s=900.0),
        Gpu(
            "GB200-186GB",
            184.0,
            2500.0,
            8000.0,
            gpus_per_node=4,
            nvlink_gb_s=900.0,
            nvlink_gpus=72,
            pcie_gb_s=450.0,
        ),
        # No NVLink: its GPUs talk over PCIe.
        Gpu("L40S-48GB", 44.5, 362.0, 864.0, 12.5, nvlink_gb_s=32.0, pcie_gb_s=32.0),
    )
}


def find_gpu(name: str) -> Gpu:
    """The GPU whose name is or starts with `name`, whatever its case: h100, H100-80GB.

    Also what drivers call them (NVIDIA H100 80GB HBM3). ValueError for an unknown or ambiguous name.
    """
    wanted = _plain(name)
    exact = [g for g in GPUS.values() if wanted in (_plain(g.name), _plain(g.name.split("-")[0]))]
    found = exact or [g for g in GPUS.values() if wanted and _plain(g.name).startswith(wanted)]
    if not found:
        words = name.upper().replace("-", " ").split()
        family = [g for g in GPUS.values() if g.name.split("-")[0] in words]
        found = [g for g in family if g.name.split("-")[1] in words] or family
    if len(found) != 1:
        known = ", ".join(g.name for g in found or GPUS.values())
        raise ValueError(f"hardware must name one GPU: got {name!r}; use one of {known}")
    return found[0]


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "").replace(" ", "")
