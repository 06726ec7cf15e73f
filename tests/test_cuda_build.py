"""What can be said of the CUDA kernels without a GPU: they are there for every architecture, none spills, and what
multiplies matrices does it on tensor cores, with operands that asynchronous copies bring."""

import shutil

import cuda_ahead_of_time as ahead
import pytest

from imagegen import _library

needs_cuobjdump = pytest.mark.skipif(not ahead.cuobjdump(), reason="cuobjdump is not there: pip install triton")
needs_nvcc = pytest.mark.skipif(
    not (shutil.which("nvcc") and ahead.cuobjdump()), reason="nvcc or cuobjdump is not there"
)

MULTIPLIES = ("attention", "conv_transpose2d", "upsample_conv2d")  # what is named so multiplies matrices
BESIDE = ("prepare", "reduce", "conv2d_moments")  # but what is named so, a file or a kernel in it
WARPGROUP = ("sm90", "wgmma")  # on sm_90a alone, by its own instructions
MULTICASTS = "upsample_conv2d_wgmma"  # to the blocks of a cluster
# Registers above which fewer than 16 warps fit a multiprocessor: no longer enough loads are under way.
MOST_REGISTERS = {"group_norm": 128, "group_norm_planar": 128, "group_norm_innermost": 128}


def check(stem, architecture):
    found = ahead.kernels(stem, architecture)
    by_warpgroups = any(word in stem for word in WARPGROUP)
    elsewhere = by_warpgroups and architecture != "90a"  # where no kernel is there, or none has a body
    assert found or elsewhere
    for kernel in found:
        assert kernel.stack == kernel.count(ahead.SPILLS) == 0, f"{kernel.name} spills"
        assert kernel.registers <= MOST_REGISTERS.get(stem, 255), kernel.name
        if stem.startswith(MULTIPLIES) and not elsewhere and not any(word in stem + kernel.name for word in BESIDE):
            assert kernel.instructions["HGMMA" if by_warpgroups else "HMMA"], kernel.name
            assert kernel.instructions["LDGSTS"] or kernel.instructions["UTMALDG"], kernel.name
            if stem.startswith(MULTICASTS):
                assert "UBLKCP.S.G.MULTICAST" in kernel.sass, kernel.name


# Of what CI builds: all of it for sm_90a, and for the others what multiplies matrices; below, that nothing else spills.
BUILT = [(stem, a) for a in ("90a", "80", "100") for stem in ahead.STEMS if a == "90a" or stem.startswith(MULTIPLIES)]


@needs_cuobjdump
@pytest.mark.parametrize("stem, architecture", BUILT)
def test_kernels_as_built(stem, architecture):
    """For free where this checkout was built with nvcc: no file is compiled for it."""
    if not ahead.is_built(stem, architecture):
        pytest.skip("this checkout's build has no CUDA kernels, or older ones than its sources")
    check(stem, architecture)


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("architecture", ahead.ARCHITECTURES)
@pytest.mark.parametrize("stem", ahead.STEMS)
def test_kernels_of_every_architecture(stem, architecture):
    check(stem, architecture)


@pytest.mark.skipif(not (_library._C and _library._C.cuda_architectures()), reason="this build has no CUDA kernels")
@needs_cuobjdump
def test_no_cuda_kernel_in_the_library_spills():
    usage = ahead.resource_usage(_library._C.__file__)
    assert len(usage) > 100
    assert [kernel.name for kernel in usage if kernel.stack] == []
    architectures = {name.removesuffix("-real") for name in _library._C.cuda_architectures().split()}
    assert architectures <= ahead.architectures(_library._C.__file__)


FAULTY = """
__global__ void __launch_bounds__(1024, 2) spilling(float* x) {  // 32 registers
  float kept[64];
  for (int i = 0; i < 64; ++i) kept[i] = x[1024 * i + threadIdx.x];
  __syncthreads();
  for (int i = 0; i < 64; ++i) x[1024 * i + threadIdx.x + 1] = kept[i];
}
__global__ void plain(float* x) { x[threadIdx.x] *= 2; }
"""


@needs_nvcc
def test_a_spill_is_seen(tmp_path, monkeypatch):
    (tmp_path / "faulty_kernel.cu").write_text(FAULTY)
    monkeypatch.setattr(ahead, "CUDA", tmp_path)
    monkeypatch.setattr(ahead, "COMPILED", tmp_path)
    with pytest.raises(AssertionError, match=r"spilling.* spills"):
        check("faulty", "80")
    spilling, plain = sorted(ahead.kernels("faulty", "80"), key=lambda kernel: -kernel.stack)
    assert (
        spilling.stack >= 32 * 4
        and spilling.registers == 32
        and spilling.instructions["STL"]
        and spilling.instructions["LDL"]
    )
    assert plain.stack == 0 and plain.instructions["STG"] == 1 and plain.registers < 16
    table = ahead.table(["faulty"], ["80"])
    head, _, *rows = ([cell.strip() for cell in line.strip("| ").split("|")] for line in table)
    assert head == ["file", "kernel", "sm_80", "shared", "spilled", "spills", "matrix products"]
    assert sorted(row[1] for row in rows) == ["`plain`", "`spilling`"]
    of_spilling = next(row for row in rows if row[1] == "`spilling`")
    assert of_spilling[2:5] == ["32", "0", str(spilling.stack)] and int(of_spilling[5]) > 0
