"""Compares the emulation and the Triton kernels, run on a GPU, with the float64 oracle.

The roundings of the format are compared bit for bit.

The same tests run on CPUs. XLA compiles other programs for a GPU, which may lose a rounding that is
kept on a CPU, or compute a product in TF32.
"""

import pytest

from tests.core.test_format import (  # noqa: F401
    test_block_scales_at_their_ties,
    test_dequantise_looks_codes_up,
    test_quantise_at_given_scales,
    test_quantise_in_every_mode,
    test_quantise_with_its_own_scale,
)
from tests.core.test_goldens import (  # noqa: F401
    test_block_scales,
    test_dequantize,
    test_layer,
    test_quantise_dequantise,
)
from tests.core.test_rounding import (  # noqa: F401
    test_codes_at_every_boundary,
    test_rounds_at_every_boundary,
)
from tests.implementations.test_conformance import (  # noqa: F401
    test_eager_matches_float64,
    test_every_layout_gives_the_same_bits,
    test_ids_out_of_range_contribute_nothing,
    test_matches_float64,
    test_mistaken_scales_fail,
    test_mistakes_fail,
    test_no_tokens,
    test_output_is_rounded_once,
)

pytestmark = pytest.mark.gpu
