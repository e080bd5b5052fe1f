"""GPUs that a plan can be made for: memory, speeds, and how far their NVLink reaches."""

from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Gpu:
    """hbm: bytes. bandwidth: of HBM, bytes a second. peak: dense bfloat16 FLOPs a second. nvlink: bytes a second of one
    GPU, both directions together. A node has `node_gpus`; NVLink joins the GPUs of `domain_nodes` nodes."""

    name: str
    hbm: int
    bandwidth: float
    peak: float
    nvlink: float
    node_gpus: int
    domain_nodes: int


# hbm is what nvidia-smi shows, which is what an engine can ask for: 81559, 143771, 183359, 189471 and 284208 MiB in
# public logs. The rest are NVIDIA's data sheets, where FLOPs "with sparsity" are twice the dense ones:
# H100 and H200 SXM: 3.35 and 4.8 TB/s, 1,979 TFLOPS with sparsity, NVLink 900 GB/s, 8 GPUs in an HGX board.
# HGX B200: 8 TB/s a GPU, 36 PFLOPS with sparsity of 8 GPUs, NVLink 1.8 TB/s.
# GB200 and GB300 NVL72: 576 TB/s and 360 PFLOPS with sparsity of 72 GPUs, 18 compute trays of 4 GPUs in one NVLink
# domain, 1.8 TB/s a GPU.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100", 81_559 * MIB, 3.35e12, 0.989e15, 0.9e12, node_gpus=8, domain_nodes=1),
        Gpu("h200", 143_771 * MIB, 4.8e12, 0.989e15, 0.9e12, node_gpus=8, domain_nodes=1),
        Gpu("b200", 183_359 * MIB, 8e12, 2.25e15, 1.8e12, node_gpus=8, domain_nodes=1),
        Gpu("gb200", 189_471 * MIB, 8e12, 2.5e15, 1.8e12, node_gpus=4, domain_nodes=18),
        Gpu("gb300", 284_208 * MIB, 8e12, 2.5e15, 1.8e12, node_gpus=4, domain_nodes=18),
    )
}
