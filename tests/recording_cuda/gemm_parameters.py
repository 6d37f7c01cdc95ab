"""What the parameters of TRTLLM-Gen's batched GEMMs are called, and which of them say nothing.

The layout is that of `KernelParams` in trtllmGen_bmm_export/KernelParamsDecl.h of flashinfer-cubin
0.6.13. The launcher builds it on the stack and leaves parts uninitialised: the tensor maps that a
kernel does not use, and the two arrays, which are for batches whose sizes the host knows. Whatever
lies there, labelled pointers of earlier launches among it, is no parameter.
"""

import ctypes

_MAX_CTAS = 2048


class TensorMap(ctypes.Structure):
    """CUtensorMap, cuda.h."""

    _fields_ = (("opaque", ctypes.c_uint64 * 16),)


class KernelParams(ctypes.Structure):
    _fields_ = (
        ("tmaA", TensorMap),
        ("tmaB", TensorMap),
        ("tmaC", TensorMap),
        ("tmaSfA", TensorMap),
        ("tmaSfB", TensorMap),
        ("tmaSparsityInfoA", TensorMap),
        ("ptrA", ctypes.c_void_p),
        ("strideInBytesA", ctypes.c_uint64),
        ("ptrB", ctypes.c_void_p),
        ("strideInBytesB", ctypes.c_uint64),
        ("ptrC", ctypes.c_void_p),
        ("ptrScaleC", ctypes.c_void_p),
        ("ptrScaleAct", ctypes.c_void_p),
        ("ptrScaleGate", ctypes.c_void_p),
        ("ptrClampLimit", ctypes.c_void_p),
        ("ptrGatedActAlpha", ctypes.c_void_p),
        ("ptrGatedActBeta", ctypes.c_void_p),
        ("k", ctypes.c_int32),
        ("nm", ctypes.c_int32),
        ("tileStridePerBatch", ctypes.c_int32),
        ("ptrDqSfsC", ctypes.c_void_p),
        ("ptrSfA", ctypes.c_void_p),
        ("ptrSfB", ctypes.c_void_p),
        ("ptrPerTokenSfA", ctypes.c_void_p),
        ("ptrPerTokenSfB", ctypes.c_void_p),
        ("ptrBias", ctypes.c_void_p),
        ("ptrPermutedIdxToBiasRowIdx", ctypes.c_void_p),
        ("ptrSfC", ctypes.c_void_p),
        ("ptrRouteMap", ctypes.c_void_p),
        ("numTokens", ctypes.c_int32),
        ("numBatches", ctypes.c_int32),
        ("ptrNumNonExitingCtas", ctypes.c_void_p),
        ("ptrTotalNumPaddedTokens", ctypes.c_void_p),
        ("ptrCtaIdxXyToBatchIdx", ctypes.c_void_p),
        ("ptrCtaIdxXyToMnLimit", ctypes.c_void_p),
        ("totalNumPaddedTokens", ctypes.c_int32),
        ("totalNumOutputPaddedTokens", ctypes.c_int32),
        ("ctaIdxXyToBatchIdx", ctypes.c_int32 * _MAX_CTAS),
        ("ctaIdxXyToMnLimit", ctypes.c_int32 * _MAX_CTAS),
        ("ctasInTokenDimPerBatch", ctypes.c_int32),
        ("batchStrideInCtas", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("tpGrpSize", ctypes.c_int32),
        ("ptrPartialRowMax", ctypes.c_void_p),
        ("ptrRowMaxCompletionBars", ctypes.c_void_p),
        ("ptrDynamicTileCounter", ctypes.c_void_p),
    )


# The C++ structure is aligned like a CUtensorMap, to 128 or 64 bytes.
_SIZE = -(-ctypes.sizeof(KernelParams) // 64) * 64


def describes(kernel: str, size: int) -> bool:
    """Whether a kernel's parameters are these.

    Raises:
        ValueError: it is a batched GEMM, and its parameters are not.
    """
    if not kernel.startswith("bmm_"):
        return False
    if size != _SIZE:
        raise ValueError(f"{kernel} has {size} bytes of parameters, not {_SIZE}: another version?")
    return True


def field_at(offset: int) -> str | None:
    """The field that begins at an offset and has a meaning, or None."""
    return _POINTERS.get(offset)


_POINTERS = {
    getattr(KernelParams, name).offset: name
    for name, kind, *_ in KernelParams._fields_
    if kind in (ctypes.c_void_p, TensorMap)
}
