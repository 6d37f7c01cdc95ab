"""One call of FlashInfer's `trtllm_fp4_block_scale_moe` with labelled NVFP4 operands.

What it takes, what it allocates, in data/csrc/trtllm_fused_moe_kernel_launcher.cu of
flashinfer-python 0.6.13, lines 2384-2398 and 1763-1934, and of 0.7.2.post1, lines 6001-6018,
1431-1474, 1589-1593 and 5192-5237. RELEASES has what differs.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from .buffers import Buffers
from .launches import Launch
from .tvm_ffi import Tensor

SYMBOL = "__tvm_ffi_trtllm_fp4_block_scale_moe"

# What the 36 arguments are called, in order.
ARGUMENTS = (
    "routing_input_mode",
    "routing_logits",
    "topk_ids",
    "topk_weights",
    "routing_bias",
    "hidden_states",
    "hidden_states_scale",
    "gemm1_weights",
    "gemm1_weights_scale",
    "gemm1_bias",
    "gemm1_alpha",
    "gemm1_beta",
    "gemm1_clamp_limit",
    "gemm2_weights",
    "gemm2_weights_scale",
    "gemm2_bias",
    "output1_scales_scalar",
    "output1_scales_gate_scalar",
    "output2_scales_scalar",
    "per_token_scales",
    "num_experts",
    "top_k",
    "n_group",
    "topk_group",
    "intermediate_size",
    "local_expert_offset",
    "local_num_experts",
    "routed_scaling_factor",
    "routing_method_type",
    "do_finalize",
    "enable_pdl",
    "act_type",
    "output",
    "config_index",
    "norm_topk_prob",
    "routing_replay_out",
)

ARGUMENTS_0_7_2 = (
    *ARGUMENTS[:10],
    "gemm1_lora_delta",
    *ARGUMENTS[10:22],
    "num_fused_shared_experts",
    *ARGUMENTS[22:],
    "da_routing_metadata",
    "da_body_workspace",
    "is_da_body_preparation",
    "valid_hidden_size",
    "valid_intermediate_size",
)

# Those of its tensors that a call may leave out, whatever its mode.
OPTIONAL = (
    "routing_bias",
    "gemm1_bias",
    "gemm1_alpha",
    "gemm1_beta",
    "gemm1_clamp_limit",
    "gemm2_bias",
    "per_token_scales",
)

FROM_LOGITS, PACKED, UNPACKED = 0, 1, 2  # routing_input_mode
RENORMALIZE, DEEPSEEK_V3 = 1, 2  # RoutingMethodType
SWIGLU, GEGLU, RELU2 = 3, 4, 6  # ActivationType


@dataclass(frozen=True)
class Shape:
    """A call's sizes.

    Attributes:
        tokens: T.
        top_k: k.
        experts: E, all of them.
        hidden: H.
        intermediate: I.
        local_experts: how many of E are here; None means all.
        gated: whether the first GEMM has gate and up halves.
    """

    tokens: int
    top_k: int
    experts: int
    hidden: int
    intermediate: int
    local_experts: int | None = None
    gated: bool = True

    @property
    def here(self) -> int:
        return self.experts if self.local_experts is None else self.local_experts


def operands(shape: Shape, buffers: Buffers, optional: Collection[str] = ()) -> dict[str, Tensor]:
    """Returns a call's required tensors and some of OPTIONAL, on pages that cannot be accessed."""
    t, k, h, i = shape.tokens, shape.top_k, shape.hidden, shape.intermediate
    e, rows = shape.here, (2 if shape.gated else 1) * i
    wanted = {
        "routing_logits": ((t, shape.experts), "bfloat16"),
        "topk_ids": ((t, k), "int32"),
        "topk_weights": ((t, k), "bfloat16"),
        "hidden_states": ((t, h // 2), "uint8"),
        "hidden_states_scale": ((t, h // 16), "float8_e4m3fn"),
        "gemm1_weights": ((e, rows, h // 2), "uint8"),
        "gemm1_weights_scale": ((e, rows, h // 16), "float8_e4m3fn"),
        "gemm2_weights": ((e, h, i // 2), "uint8"),
        "gemm2_weights_scale": ((e, h, i // 16), "float8_e4m3fn"),
        "output1_scales_scalar": ((e,), "float32"),
        "output1_scales_gate_scalar": ((e,), "float32"),
        "output2_scales_scalar": ((e,), "float32"),
        "output": ((t, h), "bfloat16"),
    }
    more = {
        "routing_bias": ((shape.experts,), "bfloat16"),
        "gemm1_bias": ((e, rows), "float32"),
        "gemm1_alpha": ((e,), "float32"),
        "gemm1_beta": ((e,), "float32"),
        "gemm1_clamp_limit": ((e,), "float32"),
        "gemm2_bias": ((e, h), "float32"),
        "per_token_scales": ((t,), "float32"),
    }
    wanted |= {label: more[label] for label in optional}
    return {
        label: Tensor.reserve(buffers, label, dims, dtype)
        for label, (dims, dtype) in wanted.items()
    }


def arguments(
    shape: Shape,
    tensors: dict[str, Tensor],
    mode: int = PACKED,
    activation: int = SWIGLU,
    enable_pdl: bool = True,
    local_expert_offset: int = 0,
    config: tuple[int, int] = (-1, -1),
    version: str = "0.6.13",
    **others: object,
) -> list[object]:
    """The positional arguments, in a version's order; `others` are of its own."""
    release = RELEASES[version]
    values: dict[str, object] = tensors | release.plain
    values |= {
        "routing_input_mode": mode,
        "routing_logits": tensors["routing_logits"] if mode == FROM_LOGITS else None,
        "num_experts": shape.experts,
        "top_k": shape.top_k,
        "intermediate_size": shape.intermediate,
        "local_expert_offset": local_expert_offset,
        "local_num_experts": shape.here,
        "routing_method_type": RENORMALIZE,
        "do_finalize": True,
        "enable_pdl": enable_pdl,
        "act_type": activation,
        "config_index": list(config),
        "norm_topk_prob": True,
        **others,
    }
    return [values.get(name) for name in release.arguments]


def default_tile(shape: Shape) -> int:
    """The tile of tokens that config (-1, -1) chooses: lines 120-202."""
    mean = -(-shape.tokens * shape.top_k // shape.here)
    power = 1 << (max(mean, 1) - 1).bit_length()
    return max(8, min(max(power, 8), 256) // 2)


def default_tile_0_7_2(shape: Shape) -> int:
    """The same of 0.7.2.post1: lines 1050-1125 and 4971-4992.

    The largest below the first that is no smaller than an expert's share of the tokens.
    """
    tiles = (8, 16, 32, 64, 128, 192, 256)
    share = shape.tokens * shape.top_k / shape.here
    smaller = [tile for tile in tiles[:-1] if tile < share]
    return smaller[-1] if smaller else tiles[0]


# What the buffers that a call allocates are called, in order; and with per_token_scales.
WORKSPACE = (
    "num_tokens_per_expert",
    "total_num_padded_tokens",
    "expanded_idx_to_permuted_idx",
    "permuted_idx_to_token_idx",
    "expert_count_histogram",
    "cta_idx_xy_to_batch_idx",
    "cta_idx_xy_to_mn_limit",
    "num_non_exiting_ctas",
    "workspace_fc1",
    "workspace_fc2",
    "gemm1_output_scale",
    "gemm1_output",
    "gemm2_output",
)
PER_TOKEN_WORKSPACE = (*WORKSPACE[:12], "gemm2_input", "gemm2_input_token_scale", "gemm2_output")


def workspace(shape: Shape, per_token: bool = False) -> dict[str, int]:
    """The bytes of each buffer that a call allocates, in order."""
    return _workspace(shape, default_tile(shape), per_token)


def workspace_0_7_2(shape: Shape, per_token: bool = False) -> dict[str, int]:
    """The same of 0.7.2.post1: other tiles, one row number and one buffer more."""
    sizes = _workspace(shape, default_tile_0_7_2(shape), per_token)
    sizes["permuted_idx_to_token_idx"] += 4
    at = list(sizes).index("expert_count_histogram")
    items = list(sizes.items())
    # Allocated, and of no use: this function's callers bring ids.
    items.insert(at, ("expert_indexes", 4 * shape.tokens * shape.top_k))
    return dict(items)


def _workspace(shape: Shape, tile: int, per_token: bool) -> dict[str, int]:
    expanded = shape.tokens * shape.top_k
    first = min(shape.experts, expanded)
    ctas = first + (expanded - first) // tile
    rows = ctas * tile
    # At least so many, whatever the tokens: maybeGetMinTokenCount, trtllm/fused_moe/runner.h.
    rows1 = max(rows, _divided(2**20, 4 * shape.intermediate))
    rows2 = max(rows, _divided(2**20, 16 * shape.hidden))
    scales = 128 * _divided(rows1, 128) * 4 * _divided(shape.intermediate // 16, 4)
    sizes = {
        "num_tokens_per_expert": 4 * shape.experts,
        "total_num_padded_tokens": 4,
        "expanded_idx_to_permuted_idx": 4 * expanded,
        "permuted_idx_to_token_idx": 4 * rows,
        "expert_count_histogram": 4 * max(2 * shape.experts, 512),
        "cta_idx_xy_to_batch_idx": 4 * ctas,
        "cta_idx_xy_to_mn_limit": 4 * ctas,
        "num_non_exiting_ctas": 4,
        "workspace_fc1": 0,
        "workspace_fc2": 0,
        "gemm1_output_scale": scales,
    }
    packed = rows1 * shape.intermediate // 2
    if per_token:
        sizes["gemm1_output"] = 2 * rows1 * shape.intermediate
        sizes["gemm2_input"] = packed
        sizes["gemm2_input_token_scale"] = 4 * rows1
    else:
        sizes["gemm1_output"] = packed
    return sizes | {"gemm2_output": 2 * rows2 * shape.hidden}


def _divided(value: int, by: int) -> int:
    return -(-value // by)


@dataclass(frozen=True)
class Release:
    """What differs between versions of the function.

    Attributes:
        arguments: what they are called, in order.
        workspace: the bytes of each buffer that a call allocates, in order.
        default_tile: the tile of tokens that config (-1, -1) chooses.
        tiles: the tiles of the prebuilt kernels here.
        plain: what arguments that not all versions have get in a plain call.
    """

    arguments: tuple[str, ...]
    workspace: Callable[[Shape, bool], dict[str, int]]
    default_tile: Callable[[Shape], int]
    tiles: tuple[int, ...] = (8, 16, 32, 64, 128, 256)
    plain: dict[str, object] = field(default_factory=dict)

    def has_kernels(self, shape: Shape) -> bool:
        """Whether there are prebuilt kernels here for what a call chooses by itself.

        0.7.2 has its own, which are on no package index; it is built with 0.6.13's (build.py).
        """
        return self.default_tile(shape) in self.tiles


RELEASES = {
    "0.6.13": Release(ARGUMENTS, workspace, default_tile),
    "0.7.2.post1": Release(
        ARGUMENTS_0_7_2,
        workspace_0_7_2,
        default_tile_0_7_2,
        plain={"da_routing_metadata": [], "da_body_workspace": [], "is_da_body_preparation": False},
    ),
}


def family(launch: Launch) -> str:
    """Which of a call's steps a launch is: "routing", "gemm", "quantize" or "finalize"."""
    if launch.kernel.startswith("routing"):
        return "routing"
    if launch.kernel.startswith("bmm_"):
        return "gemm"
    if launch.kernel.startswith("finalizeKernel"):
        return "finalize"
    if "Quant" in launch.kernel:
        return "quantize"
    raise ValueError(f"{launch.kernel} is no step of this call")


_TILES = {
    "ptrNumNonExitingCtas": "num_non_exiting_ctas",
    "ptrTotalNumPaddedTokens": "total_num_padded_tokens",
    "ptrCtaIdxXyToBatchIdx": "cta_idx_xy_to_batch_idx",
    "ptrCtaIdxXyToMnLimit": "cta_idx_xy_to_mn_limit",
}
# Which buffer each field of a GEMM's parameters (gemm_parameters.KernelParams) has to point to. A
# kernel reads an operand through a tensor map, through a pointer or both.
GEMM1 = _TILES | {
    "tmaA": "gemm1_weights",
    "ptrA": "gemm1_weights",
    "tmaB": "hidden_states",
    "ptrB": "hidden_states",
    "tmaC": "gemm1_output",
    "ptrC": "gemm1_output",
    "tmaSfA": "gemm1_weights_scale",
    "ptrSfA": "gemm1_weights_scale",
    "tmaSfB": "hidden_states_scale",
    "ptrSfB": "hidden_states_scale",
    "ptrSfC": "gemm1_output_scale",
    "ptrScaleC": "output1_scales_scalar",
    "ptrScaleAct": "output1_scales_gate_scalar",
    "ptrScaleGate": "output1_scales_gate_scalar",
    "ptrRouteMap": "permuted_idx_to_token_idx",
}
GEMM2 = _TILES | {
    "tmaA": "gemm2_weights",
    "ptrA": "gemm2_weights",
    "tmaB": "gemm1_output",
    "ptrB": "gemm1_output",
    "tmaC": "gemm2_output",
    "ptrC": "gemm2_output",
    "tmaSfA": "gemm2_weights_scale",
    "ptrSfA": "gemm2_weights_scale",
    "tmaSfB": "gemm1_output_scale",
    "ptrSfB": "gemm1_output_scale",
    "ptrScaleC": "output2_scales_scalar",
}
_ALWAYS = {*_TILES, "ptrA", "ptrB", "ptrSfA", "ptrSfB", "ptrScaleC"}
_ALWAYS1 = _ALWAYS | {"ptrSfC", "ptrRouteMap"}

# The same for optional operands: which field of which GEMM.
_OPTIONAL1 = {
    "gemm1_bias": "ptrBias",
    "gemm1_alpha": "ptrGatedActAlpha",
    "gemm1_beta": "ptrGatedActBeta",
    "gemm1_clamp_limit": "ptrClampLimit",
    "per_token_scales": "ptrPerTokenSfB",
}
_OPTIONAL2 = {"gemm2_bias": "ptrBias"}
# With per_token_scales a kernel between the GEMMs quantises.
_PER_TOKEN2 = {
    "tmaB": "gemm2_input",
    "ptrB": "gemm2_input",
    "ptrPerTokenSfB": "gemm2_input_token_scale",
}
QUANTIZE = {
    "gemm1_output",
    "expanded_idx_to_permuted_idx",
    "gemm2_input",
    "gemm1_output_scale",
    "gemm2_input_token_scale",
}

ROUTING = {
    "expert_count_histogram",
    "total_num_padded_tokens",
    "expanded_idx_to_permuted_idx",
    "permuted_idx_to_token_idx",
    "cta_idx_xy_to_batch_idx",
    "cta_idx_xy_to_mn_limit",
    "num_non_exiting_ctas",
    "topk_weights",
    "topk_ids",
}
FINALIZE = {
    "gemm2_output",
    "topk_weights",
    "output",
    "expanded_idx_to_permuted_idx",
    "total_num_padded_tokens",
}


def miswired(
    launches: Sequence[Launch], mode: int = PACKED, optional: Collection[str] = ()
) -> list[str]:
    """What about a call's launches is not as it should be; empty if all is well.

    Args:
        launches: one call's, with buffers labelled as in ARGUMENTS and WORKSPACE (with
            per_token_scales: PER_TOKEN_WORKSPACE).
        mode: the routing input mode, FROM_LOGITS or PACKED.
        optional: which of OPTIONAL the call had.
    """
    per_token = "per_token_scales" in optional
    steps = [family(launch) for launch in launches]
    routing = steps.count("routing")
    expected = ["gemm", "quantize", "gemm"] if per_token else ["gemm", "gemm"]
    if steps != ["routing"] * routing + expected + ["finalize"] or not routing:
        return [f"steps: {steps}"]
    wrong = [
        f"{launch.kernel}: {pointer.label} from byte {pointer.distance}, not from its first"
        for launch in launches
        for pointer in launch.pointers
        if pointer.distance
    ]
    wanted = ROUTING
    if mode == FROM_LOGITS:
        wanted = wanted | {"routing_logits"} | ({"routing_bias"} & set(optional))
    got = set().union(*(launch.labels for launch in launches[:routing]))
    wrong += _miswired_kernel("routing", got, wanted)
    gemm1, *_, gemm2 = [launch for launch in launches if family(launch) == "gemm"]
    more = {field: name for name, field in _OPTIONAL1.items() if name in optional}
    wrong += _miswired_gemm("gemm1", gemm1, GEMM1 | more, _ALWAYS1 | more.keys())
    more = {field: name for name, field in _OPTIONAL2.items() if name in optional}
    if per_token:
        more |= _PER_TOKEN2
        wrong += _miswired_kernel("quantize", launches[routing + 1].labels, QUANTIZE)
    wrong += _miswired_gemm("gemm2", gemm2, GEMM2 | more, _ALWAYS | more.keys() - {"tmaB"})
    return wrong + _miswired_kernel("finalize", launches[-1].labels, FINALIZE)


def _miswired_kernel(step: str, got: Collection[str], wanted: Collection[str]) -> list[str]:
    lacks, surplus = sorted(set(wanted) - set(got)), sorted(set(got) - set(wanted))
    return [f"{step}: lacks {lacks}, has {surplus} too"] if lacks or surplus else []


def _miswired_gemm(
    step: str, launch: Launch, wanted: dict[str, str], always: set[str]
) -> list[str]:
    got = {pointer.field: pointer.label for pointer in launch.pointers}
    wrong = [
        f"{step}: {field} is {label}, not {wanted.get(field)}"
        for field, label in got.items()
        if wanted.get(field) != label
    ]
    wrong += [f"{step}: no {field}" for field in sorted(always - got.keys())]
    if not {"tmaC", "ptrC"} & got.keys():
        wrong.append(f"{step}: no output")
    return wrong
