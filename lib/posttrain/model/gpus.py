"""GPUs by the names people give them: what their data sheets say of memory, matmuls and bandwidth."""

from dataclasses import dataclass

from posttrain.errors import ConfigError
from posttrain.model.memory import GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One kind of GPU, by the vendor's data sheet."""

    memory_gb: int
    """As it is sold."""
    peak: float
    """Dense bfloat16 FLOP/s with float32 accumulation: half of what is printed for sparse matrices."""
    bandwidth: float
    """Of its memory, bytes/s."""
    ecc_inline: bool = False
    """GDDR6 keeps its check bits in the memory itself, HBM beside it."""
    source: str
    """Where the three figures are printed."""

    @property
    def usable_bytes(self) -> float:
        """What a process may hope for: driver, firmware and check bits take 3 % of HBM, 6 % of GDDR6 with ECC."""
        return self.memory_gb * GIB * (0.94 if self.ecc_inline else 0.97)


GPUS = {
    "h100": Gpu(memory_gb=80, peak=989e12, bandwidth=3.35e12, source="NVIDIA H100 data sheet, SXM"),
    "h200": Gpu(memory_gb=141, peak=989e12, bandwidth=4.8e12, source="NVIDIA H200 data sheet, SXM"),
    "b200": Gpu(memory_gb=180, peak=2250e12, bandwidth=7.7e12, source="NVIDIA DGX B200 data sheet, an eighth of it"),
    "a100": Gpu(memory_gb=80, peak=312e12, bandwidth=2.039e12, source="NVIDIA A100 data sheet, 80 GB SXM"),
    "a100-40": Gpu(memory_gb=40, peak=312e12, bandwidth=1.555e12, source="NVIDIA A100 data sheet, 40 GB SXM"),
    "l40s": Gpu(memory_gb=48, peak=362.05e12, bandwidth=0.864e12, ecc_inline=True, source="NVIDIA L40S data sheet"),
    "l4": Gpu(memory_gb=24, peak=121e12, bandwidth=0.3e12, ecc_inline=True, source="NVIDIA L4 data sheet"),
    "a10g": Gpu(memory_gb=24, peak=70e12, bandwidth=0.6e12, ecc_inline=True, source="NVIDIA A10G data sheet"),
    "rtx4090": Gpu(memory_gb=24, peak=165.2e12, bandwidth=1.008e12, source="NVIDIA Ada architecture whitepaper"),
}


def gpu_of(name: str) -> Gpu:
    """The GPU of that name, whatever its case.

    Raises:
        ConfigError: there is none in the table.
    """
    found = GPUS.get(name.lower())
    if found is None:
        raise ConfigError(f"gpu {name!r} is not known; known: {', '.join(GPUS)}")
    return found
