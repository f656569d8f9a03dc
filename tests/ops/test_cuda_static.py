"""The compiled CUDA kernels, without a GPU: instructions, registers, loads and atomic operations.

How instructions are counted: the kernels for Mask2Former's sizes (8 heads of 32 channels, 3 levels, 4 points) are fully
unrolled. The only backward branch of the forward is the endless loop after its last EXIT, so no instruction runs twice.
The number of instructions before that loop therefore bounds the instructions of a warp. A warp handles 4 pairs of query
and head in float (8 lanes of 16 bytes each), and 8 in half precision.
"""

import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

KERNELS = Path(__file__).parents[2] / "eco_m2f" / "ops" / "csrc" / "cuda"
SITE = Path(sysconfig.get_paths()["purelib"])
TORCH_INCLUDE = SITE / "torch" / "include"
ARCHITECTURES = ("sm_86", "sm_90")
STORAGE = {"f": ("float", 4), "N3c104HalfE": ("half", 8), "N3c108BFloat16E": ("bfloat16", 8), "d": ("double", 2)}
BUDGET = 160  # warp instructions per query and head, forward
FUSED_BUDGET = 290  # with the locations and the softmax, which each point's thread computes by itself


def find_tool(name: str) -> str:
    """A tool of the CUDA toolkit, or of triton, which comes with PyTorch. Skips the test without both."""
    found = shutil.which(name) or shutil.which(name, path=SITE / "triton" / "backends" / "nvidia" / "bin")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


@dataclass
class Kernel:
    """The machine code of one kernel."""

    instructions: list[tuple[int, str]]  # (address, text) without the closing loop and its padding
    usage: dict[str, int]  # REG, STACK, SHARED, LOCAL

    def count(self, pattern: str) -> int:
        return sum(re.search(pattern, text) is not None for _, text in self.instructions)

    def backward_branches(self) -> int:
        jumps = ((at, re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)) for at, text in self.instructions)
        return sum(jump is not None and int(jump.group(1), 16) <= at for at, jump in jumps)


def parse_code(text: str) -> dict[str, list[tuple[int, str]]]:
    """Output of `cuobjdump -sass` -> {mangled name: [(address, instruction)]}, up to the closing loop."""
    functions = {}
    for part in text.split("Function : ")[1:]:
        found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*?)\s*;", part)
        code = [(int(at, 16), instruction) for at, instruction in found]
        last = max(i for i, (_, instruction) in enumerate(code) if re.search(r"\bEXIT\b", instruction))
        loop = next(i for i in range(len(code)) if i > last and re.search(rf"BRA {code[i][0]:#x}", code[i][1]))
        functions[part.split()[0]] = code[:loop]
    return functions


def parse_usage(text: str) -> dict[str, dict[str, int]]:
    """Output of `cuobjdump -res-usage` -> {mangled name: {resource: amount}}."""
    pattern = r"Function (\S+):\s+(REG:.*)"
    return {name: {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", line)} for name, line in re.findall(pattern, text)}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> dict[str, dict[tuple, Kernel]]:
    """{architecture: {(direction, storage, channels per read, fixed, fused): kernel}}."""
    nvcc, cuobjdump = find_tool("nvcc"), find_tool("cuobjdump")
    folder = tmp_path_factory.mktemp("cubin")
    command = [nvcc, "-O3", "-std=c++17", "-cubin", f"-I{TORCH_INCLUDE}", str(KERNELS / "launch.cu")]
    running = {
        name: subprocess.Popen([*command, f"-arch={name}", "-o", f"{folder}/{name}.cubin"], stderr=subprocess.PIPE)
        for name in ARCHITECTURES
    }
    result = {}
    for name, process in running.items():
        _, errors = process.communicate()
        assert process.returncode == 0, errors.decode()
        outputs = []
        for option in ("-sass", "-res-usage"):
            done = subprocess.run([cuobjdump, option, f"{folder}/{name}.cubin"], capture_output=True, text=True)
            outputs.append(done.stdout + done.stderr)
        usage = parse_usage(outputs[1])
        result[name] = {
            describe(mangled): Kernel(code, usage[mangled]) for mangled, code in parse_code(outputs[0]).items()
        }
    return result


def describe(mangled: str) -> tuple[str, str, int, bool, bool]:
    direction, rest = re.search(r"(forward|backward)_kernelINS_7VariantI(.*)", mangled).groups()
    storage, vector, fixed, fused = re.match(r"(f|d|N3c\d+\w+?E)Li(\d)ELb([01])ELb([01])E", rest).groups()
    return direction, STORAGE[storage][0], int(vector), fixed == "1", fused == "1"


architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)
fixed_kinds = pytest.mark.parametrize("storage, vector", [pair for pair in STORAGE.values() if pair[0] != "double"])


@architectures
def test_every_variant_is_there(kernels, architecture):
    expected = {(storage, vector, False) for storage, vector in STORAGE.values()}
    expected |= {(storage, 1, False) for storage, _ in STORAGE.values()}
    expected |= {(storage, vector, True) for storage, vector in STORAGE.values() if storage != "double"}
    for direction in ("forward", "backward"):
        for fused in (False, True):
            found = {key[1:4] for key in kernels[architecture] if key[0] == direction and key[4] == fused}
            assert found == expected


@architectures
def test_nothing_spills(kernels, architecture):
    for key, kernel in kernels[architecture].items():
        assert kernel.usage["LOCAL"] == kernel.usage["STACK"] == 0, key
        assert kernel.count(r"\b(LDL|STL)\b") == 0, key


@architectures
def test_occupancy_is_not_bound_by_shared_memory_or_registers(kernels, architecture):
    """Mask2Former's kernels use at least half of the threads of a multiprocessor (64K registers, 100 KiB)."""
    for key, kernel in kernels[architecture].items():
        if key[3]:
            registers = 96 * -(-kernel.usage["REG"] // 8) * 8  # of a block; they come in eights
            blocks = min(65536 // registers, 100 * 1024 // (kernel.usage["SHARED"] + 1024))
            assert blocks * 96 >= 1536 // 2, (key, kernel.usage)


@architectures
@pytest.mark.parametrize("fused, budget", ((False, BUDGET), (True, FUSED_BUDGET)))
@fixed_kinds
def test_forward_budget(kernels, architecture, storage, vector, fused, budget):
    kernel = kernels[architecture]["forward", storage, vector, True, fused]
    assert kernel.backward_branches() == 0, "no longer unrolled: the count below would be too low"
    pairs = 32 // (32 // vector)  # of query and head, in a warp
    assert len(kernel.instructions) / pairs <= budget
    assert kernel.count(r"\bFFMA\b") >= 12 * 4 * vector  # points, corners, channels: it does the work


@architectures
@pytest.mark.parametrize("fused", (False, True))
@fixed_kinds
def test_forward_reads_sixteen_bytes_at_a_time(kernels, architecture, storage, vector, fused):
    kernel = kernels[architecture]["forward", storage, vector, True, fused]
    assert kernel.count(r"\bLDG\.E\.128") == 12 * 4
    assert kernel.count(r"\bSTG\.E\.128") == 1
    assert kernel.count(r"\bLD\.E") == 0  # a generic load: the compiler lost track of the memory space


@architectures
def test_additions_are_fire_and_forget(kernels, architecture):
    """RED, never ATOM, and no loop of compare and swap, as half-precision atomics have before sm_90."""
    for key, kernel in kernels[architecture].items():
        assert kernel.count(r"\bATOM|CAS") == 0, key
        assert (kernel.count(r"\bRED[G]?\b") > 0) == (key[0] == "backward"), key
        assert kernel.count(r"\bRED.*(F16|BF16)") == 0, key  # sums of hundreds of terms stay in float


@fixed_kinds
def test_sm_90_adds_four_floats_at_once(kernels, storage, vector):
    kernel = kernels["sm_90"]["backward", storage, vector, True, False]
    assert kernel.count(r"\bREDG.*F32x4") > 0 and kernel.count(r"\bRED.*F32(?!x4)") == 0


@architectures
def test_pixels_are_a_product_and_then_a_difference(kernels, architecture):
    """A fused multiply-add would choose other cells than the CPU."""
    for direction in ("forward", "backward"):
        kernel = kernels[architecture][direction, "float", 4, True, False]
        assert kernel.count(r"\bFFMA.*-0\.5") == 0 and kernel.count(r"\bFADD.*-0\.5") >= 2


def test_parser_finds_loops():
    text = "Function : k\n /*0000*/ MOV R1, R2 ;\n /*0010*/ @P0 BRA 0x0 ;\n /*0020*/ EXIT ;\n /*0030*/ BRA 0x30;\n"
    kernel = Kernel(parse_code(text)["k"], {})
    assert len(kernel.instructions) == 3 and kernel.backward_branches() == 1
