"""The GPU catalogue understands the names that drivers, Slurm and people use."""

import pytest

from launcher.errors import ClusterError
from launcher.facts.gpu import GIB, gpu, gpu_names


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("A100-80GB", "A100-80GB"),
        ("a100", "A100-80GB"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100-40GB-PCIe"),
        ("NVIDIA A100 80GB PCIe", "A100-80GB-PCIe"),
        ("H100-80GB-PCIe", "H100-PCIe"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX-6000-Ada"),
        ("NVIDIA GH200 120GB HBM3", "GH200"),
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("Tesla T4", "T4"),
        ("Tesla V100-SXM2-32GB", "V100-32GB"),
        ("NVIDIA A10G", "A10G"),
        ("cpu", "cpu"),
    ],
)
def test_names_people_and_drivers_use(said, meant):
    """nvidia-smi's spelling, GRES types and short names lead to the same entry."""
    assert gpu(said).name == meant


def test_an_unknown_gpu_lists_the_known_ones():
    """There is no silent default: memory and speed would be wrong."""
    with pytest.raises(ClusterError, match=r"'voodoo2' is not in the catalogue.*A100-80GB"):
        gpu("voodoo2")


@pytest.mark.parametrize("name", gpu_names())
def test_entries_are_plausible(name):
    """Units are right: GiB of memory, FLOP/s below the data sheet, bandwidths in bytes per second."""
    entry = gpu(name)
    assert 10 * GIB < entry.memory_bytes < 300 * GIB
    assert 1e13 < entry.achievable_flops <= entry.flops < 1e16
    assert 1e9 < entry.pcie_bytes_s < entry.memory_bytes_s
    assert 0.5 <= entry.efficiency < 0.95
    assert 0.3 <= entry.attention < entry.efficiency
    assert 1e9 < entry.network_bytes_s < entry.link_bytes_s


def test_another_size_of_memory_is_another_card():
    """An A100 with 64 GB exists, and is none of ours: memory would be wrong."""
    with pytest.raises(ClusterError, match="A100-64GB"):
        gpu("A100-64GB")


def test_pcie_cards_have_no_nvlink():
    """The same chip in a server without NVLink talks ten times slower: ZeRO-3 there is another decision."""
    assert gpu("A100-80GB-PCIe").link_bytes_s < gpu("A100-80GB").link_bytes_s / 5
