"""This package: the native kernels and the emulation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

import jax_nvfp4_moe as nvm
from benchmarks import layers
from benchmarks.contenders.jax_call import JaxContender


def random_experts(layer, scheme):
    """The layer's weights as this package takes them."""

    def matrix(role, groups):
        codes, scale = layers.matrices(layer, role)
        return nvm.Nvfp4Array(
            jnp.asarray(codes),
            jnp.asarray(scale.view(jnp.float8_e4m3fn)),
            jnp.full(groups, layer.gain(role), jnp.float32),
        )

    static = scheme == "static"
    return nvm.ExpertWeights(
        w13=matrix("w13", (layer.experts, 1)),
        w2=matrix("w2", (layer.experts,)),
        w13_input_scale=jnp.float32(layers.INPUT_SCALE) if static else None,
        w2_input_scale=jnp.float32(layers.HIDDEN_SCALE) if static else None,
        activation_scheme=scheme,
    )


class Ours(JaxContender):
    reference = "layer"
    bound = 1e-2  # bfloat16 results, and rare codes on the other side of a rounding boundary
    implementation: str

    def __init__(self, layer, copies, scheme):
        super().__init__(layer, copies, scheme)
        experts = random_experts(layer, scheme)
        self.weights = [(experts,)]
        self.weights += [(jax.tree.map(jnp.copy, experts),) for _ in range(copies - 1)]
        self.weights_nbytes = copies * experts.nbytes

    @classmethod
    def bytes_per_parameter(cls):
        return 9 / 16 * (1 + 2 / 3)  # while gate and up are copied to the device

    def function(self, *arguments, **options):
        return nvm.nvfp4_moe_routed(*arguments, implementation=self.implementation, **options)


class Cpu(Ours):
    implementation = "cpu"


class Triton(Ours):
    """The GPU kernels; where there is no GPU, by JAX's interpreter, only to see that they run."""

    def __init__(self, layer, copies, scheme):
        super().__init__(layer, copies, scheme)
        self.implementation = nvm.Triton(interpret=jax.default_backend() != "gpu")


class Emulation(Ours):
    implementation = "emulation"

    def expected(self, reference):
        """The first batch's result, with which the others' are compared."""
        if reference == "layer":
            return self.run(0, 0)
        function, weights = self.computing(reference)
        arguments = *self.batches[0], *weights[0]
        compiled, _ = self.compile(function, arguments)
        return np.asarray(compiled(*arguments))

    def computing(self, reference):
        """The function that computes a reference, and its weights of each copy of the layer."""
        if reference == "layer":
            return self.function, self.weights
        if reference == "vllm":
            vllm = nvm.Emulation(numerics="vllm")
            return functools.partial(nvm.nvfp4_moe_routed, implementation=vllm), self.weights
        unquantised = [
            dataclasses.replace(
                experts, activation_scheme="none", w13_input_scale=None, w2_input_scale=None
            )
            for (experts,) in self.weights
        ]
        return self.function, [(experts,) for experts in unquantised]
