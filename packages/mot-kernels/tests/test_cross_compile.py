"""Every kernel compiles for the GPUs we name, and fits their shared memory, without having them.

Triton compiles for any target on any machine, but not in a process with TRITON_INTERPRET set: this
file runs itself once, as a script, in a process of its own, for all targets and kernels.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import recorded_launches
import torch

from mot_kernels.tuning.lookup import Problem, default_config


@dataclass(frozen=True)
class Target:
    """A GPU architecture, the shared memory a block may use there, its matrix instruction.

    And whether it multiplies e4m3fn, as `dispatch.has_fp8_units` would say.
    """

    backend: str
    arch: int | str
    warp_size: int
    kilobytes: int
    matrix_instruction: str
    fp8_units: bool

    def __str__(self) -> str:
        return f"sm_{self.arch}" if self.backend == "cuda" else str(self.arch)


TARGETS = (
    Target("cuda", 80, 32, 163, "mma.sync", False),
    Target("cuda", 89, 32, 99, "mma.sync", True),
    Target("cuda", 90, 32, 227, "wgmma", True),
    Target("cuda", 100, 32, 227, "tcgen05.mma", True),
    Target("hip", "gfx942", 64, 64, "v_mfma", False),
    Target("hip", "gfx1100", 32, 64, "v_wmma", False),
)


HOPPER = TARGETS[2]


@dataclass(frozen=True)
class Compilation:
    """What `triton.compile` is asked for: a kernel as its launcher would specialise it."""

    kernel: Any
    constants: dict[str, Any]
    options: dict[str, int]
    pointers: dict[str, str]

    def run(self, target: Target) -> dict[str, Any]:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        from mot_kernels._triton.launcher import OPTIONS

        signature, attributes = {}, {}
        for index, name in enumerate(self.kernel.arg_names):
            if name in self.constants:
                signature[name] = "constexpr"
                continue
            if name.endswith("_ptr"):
                signature[name] = f"*{self.pointers.get(name, 'bf16')}"
            else:
                signature[name] = "fp32" if name == "eps" else "i32"
            # As for a model's sizes: without this no load is wide or asynchronous, and the
            # pipeline's shared memory would not show.
            if name not in ("eps", "num_tiles", "num_rows"):
                attributes[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, self.constants, attributes)
        gpu = GPUTarget(target.backend, target.arch, target.warp_size)
        compiled = triton.compile(source, target=gpu, options=self.options | OPTIONS)
        return findings(compiled, target)


def findings(compiled: Any, target: Target) -> dict[str, Any]:
    """What the tests look at."""
    assembly = compiled.asm["ptx" if target.backend == "cuda" else "amdgcn"]
    return {
        "shared": compiled.metadata.shared,
        "matrix_instruction": target.matrix_instruction in assembly,
        "fp8_instruction": any(mark in assembly for mark in ("e4m3.e4m3", "kind::f8f6f4")),
        "int8_instruction": any(
            mark in assembly for mark in (".s8.s8", "kind::i8", "_i8 ", "_iu8 ")
        ),
    }


def linear(
    target: Target, epilogue: str, gen_rows: int, *, columns: int | None = None
) -> Compilation:
    """The QKV, output and MLP projections, with the tiles an untuned GPU gets.

    `columns`: N_OUT, if it is small enough to be specialised (Triton makes a constant of 1).
    """
    from mot_kernels._triton.linear import _mot_linear_kernel

    problem = Problem(4608, 3584, torch.bfloat16, epilogue, (2, gen_rows))
    config = default_config(problem, target.kilobytes * 1024)
    number = ["none", "silu_mul", "add_residual"].index(epilogue)
    constants = {
        "HAS_BIAS": epilogue == "none",
        "EPILOGUE": number,
        "EVEN_K": True,
        "PRECISION": None,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
        "stride_out_n": 1,
        "stride_x_k": 1,
        "stride_w_k": 1,
        "stride_bias_n": 1,
    }
    if epilogue != "none":
        constants["bias_ptr"] = None
    if epilogue == "add_residual":
        constants["stride_residual_n"] = 1
    else:
        constants["residual_ptr"] = None
    if columns is not None:
        constants["N_OUT"] = columns
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    pointers = {"row_ids_ptr": "i32", "tiles_ptr": "i32"}
    return Compilation(_mot_linear_kernel, constants, options, pointers)


def rms_norm(target: Target, *, residual: bool) -> Compilation:
    from mot_kernels._triton.norm import _mot_rms_norm_kernel

    constants: dict[str, Any] = {"HAS_PLAN": residual, "HAS_RESIDUAL": residual, "BLOCK_D": 4096}
    constants |= {"HAS_STATIC": False, "OUT_KIND": 0, "UNITS": target.fp8_units}
    constants |= {"out_scales_ptr": None, "static_ptr": None}
    if not residual:
        constants |= {"expert_ids_ptr": None, "residual_ptr": None, "residual_out_ptr": None}
    pointers = {"expert_ids_ptr": "i32"}
    return Compilation(_mot_rms_norm_kernel, constants, {"num_warps": 4}, pointers)


def silu_mul(target: Target) -> Compilation:
    from mot_kernels._triton.activation import _silu_mul_kernel

    constants = {"BLOCK": 1024, "stride_out_n": 1}
    return Compilation(_silu_mul_kernel, constants, {"num_warps": 4}, {})


def qk_norm_rope(target: Target, *, rounds_q: bool = False) -> Compilation:
    from mot_kernels._triton.norm import _mot_qk_norm_rope_kernel
    from mot_kernels._triton.rounding import _E4M3, _KEEP

    constants = {
        "HEADS": 28,
        "KV_HEADS": 4,
        "D": 128,
        "HAS_PLAN": True,
        "HAS_KV_ROWS": True,
        "BLOCK_HEADS": 32,
        "BLOCK_KV_HEADS": 4,
        "BLOCK_HALF": 64,
        "EXPERTS": 2,
        "BLOCK_WEIGHT": 256,
        "Q_KIND": (_E4M3 if rounds_q else _KEEP).value,
        "UNITS": target.fp8_units,
    }
    if not rounds_q:
        constants["q_scale_ptr"] = None
    pointers = {
        "rope_ptr": "fp32",
        "positions_ptr": "i64",
        "kv_rows_ptr": "i64",
        "expert_ids_ptr": "i32",
    }
    if rounds_q:
        pointers |= {"q_scale_ptr": "fp32", "q_ptr": "fp8e4nv" if target.fp8_units else "u8"}
    return Compilation(_mot_qk_norm_rope_kernel, constants, {"num_warps": 4}, pointers)


KERNELS: dict[str, Callable[[Target], Compilation]] = {
    "linear-gen4096-none": lambda target: linear(target, "none", 4096),
    "linear-gen4096-silu_mul": lambda target: linear(target, "silu_mul", 4096),
    "linear-gen4096-add_residual": lambda target: linear(target, "add_residual", 4096),
    "linear-gen20-silu_mul": lambda target: linear(target, "silu_mul", 20),
    "linear-gen20-silu_mul-one_column": lambda target: linear(target, "silu_mul", 20, columns=1),
    "rms_norm": lambda target: rms_norm(target, residual=False),
    "rms_norm-residual": lambda target: rms_norm(target, residual=True),
    "qk_norm_rope": qk_norm_rope,
    "qk_norm_rope-rounds_q": lambda target: qk_norm_rope(target, rounds_q=True),
    "silu_mul": silu_mul,
}


def linear_format(name: str) -> Callable[[Target], recorded_launches.Launch]:
    """From "FORMAT-genROWS-EPILOGUE", then what `recorded_launches.linear` is to vary."""
    format, rows, epilogue, *more = name.split("-")

    def launch(target: Target) -> recorded_launches.Launch:
        return recorded_launches.linear(
            format,
            epilogue,
            int(rows.removeprefix("gen")),
            shared_memory=target.kilobytes * 1024,
            fp8_units=target.fp8_units,
            ptx=target.backend == "cuda",
            quantize="quantize" in more,
            groups="groups" in more,
            dtype=torch.float32 if "float32" in more else torch.bfloat16,
            odd="odd" in more,
        )

    return launch


def few_rows(target: Target, epilogue: str, *, odd: bool = False) -> recorded_launches.Launch:
    return recorded_launches.few_rows(
        epilogue, shared_memory=target.kilobytes * 1024, ptx=target.backend == "cuda", odd=odd
    )


FORMAT_KERNELS: dict[str, Callable[[Target], recorded_launches.Launch]] = {
    name: linear_format(name)
    for name in (
        "fp8_w8a8_per_channel-gen4096-silu_mul-quantize",
        "fp8_w8a8_per_channel-gen14-none",
        "fp8_w8a8_per_channel-gen4096-add_residual-groups",
        "fp8_w8a8_block-gen4096-add_residual",
        "int8_w8a8-gen4096-silu_mul",
        "int8_w8a16-gen4096-none",
        "int8_w8a16-gen14-silu_mul",
        "int4_w4a16_group128-gen4096-none",
        "int4_w4a16_group32_zero_points-gen14-silu_mul",
        "int4_w4a16_group128-gen14-add_residual",
        "int8_w8a16-gen14-none-odd",
        "fp8_w8a8_block-gen200-silu_mul-float32",
        "fp8_w8a8_block-gen200-silu_mul-odd",
        "int4_w4a16_group128-gen200-none-float32",
    )
} | {
    "dequantize-int8": lambda target: recorded_launches.dequantize("int8_w8a16"),
    "dequantize-int4": lambda target: recorded_launches.dequantize("int4_w4a16_group128"),
    "dequantize-int4-zeros": lambda target: recorded_launches.dequantize(
        "int4_w4a16_group32_zero_points"
    ),
    "quantize_rows-fp8": lambda target: recorded_launches.quantize_rows(
        torch.float8_e4m3fn, fp8_units=target.fp8_units
    ),
    "quantize_rows-fp8-groups": lambda target: recorded_launches.quantize_rows(
        torch.float8_e4m3fn, fp8_units=target.fp8_units, groups=True
    ),
    "few_rows-none": lambda target: few_rows(target, "none"),
    "few_rows-none-odd": lambda target: few_rows(target, "none", odd=True),
    "few_rows-silu_mul": lambda target: few_rows(target, "silu_mul"),
    "few_rows-add_residual": lambda target: few_rows(target, "add_residual"),
    "rms_norm-int8": lambda target: recorded_launches.rms_norm(
        torch.int8, static=False, fp8_units=target.fp8_units
    ),
}

# (dtype, epilogue, HAS_BIAS, HAS_GATHERED) of the kernel that is only for sm_90; "long" sums of FP8
# leave the matrix unit. "xgroups" and "outgroups": scales of 128 columns of a row;
# "wblocks": of blocks of the weight.
HOPPER_KERNELS = {
    "hopper-none": ("bf16", 0, False, False),
    "hopper-none-bias-gathered": ("bf16", 0, True, True),
    "hopper-silu_mul-bias-gathered": ("bf16", 1, True, True),
    "hopper-add_residual-gathered": ("bf16", 2, False, True),
    "hopper-fp8-none": ("fp8e4nv", 0, False, False),
    "hopper-fp8-silu_mul-bias-gathered": ("fp8e4nv", 1, True, True),
    "hopper-fp8-add_residual-gathered": ("fp8e4nv", 2, False, True),
    "hopper-fp8-long-none": ("fp8e4nv", 0, False, False),
    "hopper-fp8-long-silu_mul-bias-gathered": ("fp8e4nv", 1, True, True),
    "hopper-fp8-long-add_residual-gathered": ("fp8e4nv", 2, False, True),
    "hopper-fp8-long-xgroups-add_residual": ("fp8e4nv", 2, False, False),
    "hopper-fp8-long-xgroups-add_residual-gathered": ("fp8e4nv", 2, False, True),
    "hopper-fp8-long-xgroups-none-bias-gathered": ("fp8e4nv", 0, True, True),
    "hopper-fp8-long-wblocks-add_residual": ("fp8e4nv", 2, False, False),
    "hopper-fp8-long-wblocks-xgroups-none-bias-gathered": ("fp8e4nv", 0, True, True),
    "hopper-fp8-long-wblocks-xgroups-outgroups-silu_mul": ("fp8e4nv", 1, False, False),
    "hopper-fp8-outgroups-silu_mul": ("fp8e4nv", 1, False, False),
    "hopper-fp8-outgroups-uneven-silu_mul": ("fp8e4nv", 1, False, False),
    "hopper-fp8-long-xgroups-outgroups-silu_mul-bias-gathered": ("fp8e4nv", 1, True, True),
    "hopper-int8-none-bias-gathered": ("i8", 0, True, True),
    "hopper-int8-silu_mul": ("i8", 1, False, False),
    "hopper-int8-outgroups-silu_mul": ("i8", 1, False, False),
}


def compile_hopper(name: str) -> dict[str, Any]:
    """As `Compilation.run`; Gluon has another kind of source."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.experimental.gluon.language import NVMMASharedLayout

    from mot_kernels._triton.hopper import _mot_linear_hopper_kernel as kernel
    from mot_kernels._triton.launcher import OPTIONS

    dtype, epilogue, has_bias, has_gathered = HOPPER_KERNELS[name]
    bits = 16 if dtype == "bf16" else 8
    format = {"bf16": None, "fp8e4nv": "fp8_w8a8_per_channel", "i8": "int8_w8a8"}[dtype]
    problem = Problem(4608, 3584, torch.bfloat16, "none", (2, 4096), format)
    config = default_config(problem, 227 * 1024, hopper=True)
    constants: dict[str, Any] = {
        "HAS_BIAS": has_bias,
        "HAS_X_SCALES": bits == 8 and "-xgroups" not in name,
        "X_GROUPS": "-xgroups" in name,
        "HAS_W_SCALES": bits == 8 and "-wblocks" not in name,
        "W_BLOCKS": "-wblocks" in name,
        "EPILOGUE": epilogue,
        "HAS_GATHERED": has_gathered,
        "LEAVES_UNIT": "-long" in name,
        "OUT_GROUPS": "-outgroups" in name,
        "DTYPE": tl.bfloat16,
        "EVEN_N": "-uneven" not in name,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "STAGES": config.num_stages,
        "LOADING_WARPS": 4,
    }
    if not has_bias:
        constants["bias_ptr"] = None
    if not constants["OUT_GROUPS"]:
        constants["out_scales_ptr"] = None
    if epilogue != 2:
        constants |= {"residual_ptr": None, "residual_desc": None}
    if bits == 16:
        constants |= {"x_scales_ptr": None, "w_scales_ptr": None}
    w_rows = config.block_n // 2 if epilogue == 1 else config.block_n
    descriptors = {
        "x_desc": (dtype, config.block_m, config.block_k, bits),
        "w_desc": (dtype, w_rows, config.block_k, bits),
        "residual_desc": ("bf16", config.block_m, 64, 16),
    }
    pointers = {
        "out_ptr": "fp8e4nv" if constants["OUT_GROUPS"] else "bf16",
        "out_scales_ptr": "fp32",
        "x_ptr": dtype,
        "x_scales_ptr": "fp32",
        "w_scales_ptr": "fp32",
        "partials_ptr": "i32" if dtype == "i8" else "fp32",
        "flags_ptr": "i32",
        "row_ids_ptr": "i32",
        "tiles_ptr": "i32",
    }
    signature, attributes = {}, {}
    for index, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in descriptors:
            kind, height, width, element = descriptors[argument]
            layout = NVMMASharedLayout(128, element, 2)
            signature[argument] = f"tensordesc<{kind}[{height},{width}],{layout!r}>"
        else:
            is_pointer = argument.endswith("_ptr")
            signature[argument] = f"*{pointers.get(argument, 'bf16')}" if is_pointer else "i32"
            if not argument.startswith("num_"):
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = GluonASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": config.num_warps} | OPTIONS
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return {
        "shared": compiled.metadata.shared,
        "matrix_instruction": "wgmma.mma_async" in compiled.asm["ptx"],
    }


Results = dict[str, dict[str, Any]]


def compile_everything() -> Results:
    """Called in the script's process."""

    def attempt(case: tuple[Target, str]) -> dict[str, Any]:
        target, name = case
        try:
            if name in HOPPER_KERNELS:
                return compile_hopper(name)
            if name in FORMAT_KERNELS:
                launch = launches[target, name]
                gpu = target.backend, target.arch, target.warp_size
                return findings(launch.compile(*gpu), target)
            return KERNELS[name](target).run(target)
        except Exception as error:  # reported by the test of this very case
            return {"error": f"{type(error).__name__}: {error}"}

    # Beforehand: catching launches is not for several threads.
    launches = {(t, name): make(t) for t in TARGETS for name, make in FORMAT_KERNELS.items()}
    cases = [(target, name) for target in TARGETS for name in (*KERNELS, *FORMAT_KERNELS)]
    cases += [(HOPPER, name) for name in HOPPER_KERNELS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(attempt, cases)
        return {
            f"{target}-{name}": result
            for (target, name), result in zip(cases, results, strict=True)
        }


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """From one process for the whole session, also where test workers share the cases."""
    pytest.importorskip("triton")
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    output = folder / "cross_compile.json"
    with (folder / "cross_compile.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not output.exists():
            environment = os.environ | {"TRITON_CACHE_DIR": str(folder / "triton")}
            environment.pop("TRITON_INTERPRET", None)
            command = [sys.executable, __file__, str(output)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        return json.loads(output.read_text())


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_cross_compile(target: Target, name: str, results: Results) -> None:
    result = results[f"{target}-{name}"]
    assert "error" not in result, result["error"]
    assert result["shared"] <= target.kilobytes * 1024
    if "gen4096" in name:
        assert result["matrix_instruction"], f"no {target.matrix_instruction}: slow on {target}"


@pytest.mark.parametrize("name", FORMAT_KERNELS)
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_cross_compile_formats(target: Target, name: str, results: Results) -> None:
    result = results[f"{target}-{name}"]
    assert "error" not in result, result["error"]
    assert result["shared"] <= target.kilobytes * 1024
    if "gen4096" in name:
        assert result["fp8_instruction"] == (name.startswith("fp8") and target.fp8_units)
        assert result["int8_instruction"] == name.startswith("int8_w8a8")
        # Triton 3.6 multiplies int8 on sm_100 by the instruction of older GPUs.
        if not name.startswith("int8_w8a8"):
            assert result["matrix_instruction"], f"no {target.matrix_instruction}: slow on {target}"


@pytest.mark.parametrize("name", HOPPER_KERNELS)
def test_cross_compile_hopper(name: str, results: Results) -> None:
    result = results[f"{HOPPER}-{name}"]
    assert "error" not in result, result["error"]
    assert result["shared"] <= HOPPER.kilobytes * 1024
    assert result["matrix_instruction"]


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(compile_everything(), indent=1))
