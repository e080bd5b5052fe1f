"""What recorded launches become on GPUs that are not there: registers, spills, shared memory, instructions.

A launch is specialised by the very functions that Triton's runtime calls, so that what is compiled here is what a GPU
would run. The wheel of Triton brings ptxas and cuobjdump; no driver is needed, but a process without the interpreter.
"""

import hashlib
import importlib
import multiprocessing
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from kernels.backend import Launch

ARCHITECTURES = (90, 100, 103)  # H100 and H200; B200 and GB200; B300 and GB300
OPCODES = ("HGMMA", "HMMA", "UTCHMMA", "LDGSTS", "STL", "LDL")
MOST_REGISTERS = 255  # of a thread
MOST_SHARED = 227 * 1024  # bytes of a block, the same on all three
# of the kernels that must run on tensor cores: the constant that says how many rows their tiles have
TILE_ROWS = {"attention._attend": "ROWS", "linear._multiply": "BLOCK_T", "lora._expand": "BLOCK_T"}


@dataclass(frozen=True, slots=True)
class Specialisation:
    """All that decides what a launch compiles to, but for the architecture. In Triton's terms: signature maps argument
    names to types; constants and attributes are keyed by the argument's path."""

    module: str
    kernel: str
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    num_warps: int
    num_stages: int

    @property
    def name(self) -> str:
        """Such as `norm._add_rms_norm`."""
        return f"{self.module.rpartition('.')[2]}.{self.kernel}"

    def constant(self, name: str) -> Any:
        """The value of a constant argument."""
        return self.constants[list(self.signature).index(name),]

    @property
    def text(self) -> str:
        """For people, and for the digest: types, a `/16` where divisibility is known, constants, options."""
        parts = []
        for index, (name, kind) in enumerate(self.signature.items()):
            divisible = "/16" if self.attributes.get((index,)) else ""
            shown = f"={self.constants[index,]}" if kind == "constexpr" else f" {kind}{divisible}"
            parts.append(f"{name}{shown}")
        return f"{', '.join(parts)}; {self.num_warps} warps, {self.num_stages} stages"

    @property
    def key(self) -> str:
        """The name and a digest of the text."""
        return f"{self.name} {hashlib.sha256(self.text.encode()).hexdigest()[:10]}"


@dataclass(frozen=True, slots=True)
class Build:
    """What one specialisation takes on one architecture."""

    registers: int  # of a thread
    stack: int  # bytes of a thread, spills
    shared: int  # bytes of a block, static and dynamic
    tensor_memory: int  # columns of a block, Blackwell only
    opcodes: dict[str, int]  # empty where they cannot be read

    def faults(self, tensor_cores: Sequence[str]) -> list[str]:
        """Why this must not ship; tensor_cores: one of these instructions has to be there, or nothing is asked."""
        found = []
        moves = self.opcodes.get("STL", 0) + self.opcodes.get("LDL", 0)
        if self.stack or moves:
            found.append(f"spills: {self.stack} bytes of stack, {moves} loads and stores")
        if self.registers > MOST_REGISTERS:
            found.append(f"{self.registers} registers")
        if self.shared > MOST_SHARED:
            found.append(f"{self.shared} bytes of shared memory")
        if tensor_cores and self.opcodes and not any(self.opcodes[opcode] for opcode in tensor_cores):
            found.append(f"no {' or '.join(tensor_cores)}")
        return found


def specialise(launch: Launch) -> Specialisation:
    """What Triton's runtime would compile for a launch. Tensors may be on the `meta` device."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("compiling needs a process without TRITON_INTERPRET in its environment")
    kernel = launch.kernel
    # types and alignment are the same for every NVIDIA target
    backend = make_backend(GPUTarget("cuda", ARCHITECTURES[0], 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    bound, kinds, _ = bind(*launch.args, **launch.constants, **options)
    _, signature, constants, attributes = kernel._pack_args(backend, options, bound, kinds, options)
    return Specialisation(
        kernel.fn.__module__, kernel.fn.__name__, signature, constants, attributes, **options
    )


def build(specialisation: Specialisation, architecture: int) -> Build:
    """Compiles for sm_<architecture>. Raises what Triton or ptxas raise."""
    kernel = getattr(importlib.import_module(specialisation.module), specialisation.kernel)
    source = ASTSource(
        fn=kernel,
        signature=specialisation.signature,
        constexprs=specialisation.constants,
        attrs=specialisation.attributes,
    )
    options = {"num_warps": specialisation.num_warps, "num_stages": specialisation.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _tool("cuobjdump", "-res-usage", cubin.name)
        try:
            assembly = _tool("nvdisasm", cubin.name)
        except (
            subprocess.CalledProcessError
        ):  # Triton 3.6 compiles for sm_103, and its nvdisasm cannot read that
            assembly = None
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    return Build(
        registers=used["REG"],
        stack=used["STACK"] + used["LOCAL"],
        shared=used["SHARED"] + compiled.metadata.shared,
        tensor_memory=getattr(compiled.metadata, "tmem_size", None) or 0,
        opcodes={opcode: len(re.findall(rf"\b{opcode}\b", assembly)) for opcode in OPCODES}
        if assembly
        else {},
    )


def build_all(
    specialisations: Iterable[Specialisation], architectures: Sequence[int], processes: int
) -> Iterator[tuple[Specialisation, int, Build | Exception]]:
    """Every specialisation for every architecture, as they are done; an exception where one does not compile."""
    work = [(s, architecture) for s in specialisations for architecture in architectures]
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        futures = {pool.submit(build, *item): item for item in work}
        for future in as_completed(futures):
            error = future.exception()
            if error is not None and not isinstance(error, Exception):
                raise error
            yield (*futures[future], error or future.result())


def tensor_cores(specialisation: Specialisation, architecture: int) -> tuple[str, ...]:
    """Which instruction a build must have; none is asked of kernels without products. Tiles of 64 rows and more take
    the warp group's or Blackwell's own, smaller ones the warp's."""
    if specialisation.name not in TILE_ROWS:
        return ()
    if specialisation.constant(TILE_ROWS[specialisation.name]) < 64:
        return ("HMMA",)
    return ("HGMMA",) if architecture == 90 else ("UTCHMMA",)


def compile_all(launches: Iterable[Launch], processes: int) -> tuple[dict[str, Any], list[str]]:
    """The record of what the launches compile to, and what must not ship."""
    started = time.monotonic()
    specialisations = {s.key: s for s in map(specialise, launches)}
    builds: dict[str, Any] = {key: {"signature": s.text} for key, s in sorted(specialisations.items())}
    problems: list[str] = []
    total = len(specialisations) * len(ARCHITECTURES)
    done = build_all(specialisations.values(), ARCHITECTURES, processes)
    for number, (specialisation, architecture, build) in enumerate(done, 1):
        where = f"{specialisation.key} sm_{architecture}"
        if isinstance(build, Exception):
            problems.append(f"{where} does not compile: {build}")
            continue
        builds[specialisation.key][f"sm_{architecture}"] = asdict(build)
        problems += [
            f"{where}: {fault}" for fault in build.faults(tensor_cores(specialisation, architecture))
        ]
        progress = f"[{number}/{total}, {time.monotonic() - started:.0f} s]"
        print(
            f"{progress} {where}: {build.registers} registers, {build.shared} bytes shared", file=sys.stderr
        )
    return {"triton": triton.__version__, "builds": builds}, problems


def missing(record: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Kernels that only one of the two knows."""
    before, after = ({key.partition(" ")[0] for key in side["builds"]} for side in (record, now))
    return [
        *(f"{name} is in the record, and nothing launches it" for name in sorted(before - after)),
        *(f"{name} is launched, and not in the record" for name in sorted(after - before)),
    ]


def drift(record: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs from the record, in lines for people; nothing is comparable between versions of Triton."""
    if record["triton"] != now["triton"]:
        return [f"the record is of triton {record['triton']}, this is {now['triton']}: only the limits apply"]
    lines = []
    for key, build in now["builds"].items():
        if key not in record["builds"]:
            lines.append(f"{key}: new, {build['signature']}")
            continue
        for place in (f"sm_{architecture}" for architecture in ARCHITECTURES):
            old, new = (flat(side.get(place, {})) for side in (record["builds"][key], build))
            changed = [name for name in old | new if old.get(name) != new.get(name)]
            lines += [f"{key} {place}: {name} {old.get(name)} -> {new.get(name)}" for name in changed]
    return lines


def flat(build: dict[str, Any]) -> dict[str, Any]:
    return {**{k: v for k, v in build.items() if k != "opcodes"}, **build.get("opcodes", {})}


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout
