"""ggml: `mul_mat_id` on NVFP4 weights, activations in int8, as llama.cpp computes such a layer.

The graph: gate and up in one product, the experts' scales, swiglu, down, its scales, the routing
weights, and the sum over a token's experts.
"""

import numpy as np

from benchmarks import layers
from benchmarks.contenders import ggml_blocks
from benchmarks.contenders.base import Contender, Unavailable
from benchmarks.contenders.ggml_library import F32, I32, NVFP4, library
from benchmarks.machine import cores


class Ggml(Contender):
    reference = "w4a16"
    bound = 3e-2  # int8 activations in blocks of 32: about 1e-2

    def __init__(self, layer, copies, scheme):
        super().__init__(layer, copies, scheme)
        if layer.hidden % ggml_blocks.ELEMENTS or layer.intermediate % ggml_blocks.ELEMENTS:
            raise Unavailable(
                f"its blocks are of {ggml_blocks.ELEMENTS} elements, "
                f"H is {layer.hidden}, I {layer.intermediate}"
            )
        self.ggml = library()
        self.backend = self.ggml.backend_cpu_init()
        self.ggml.backend_cpu_set_n_threads(self.backend, cores())
        self.weights = [self._weights() for _ in range(copies)]
        self.weights_nbytes = copies * layer.nbytes
        self.graphs = {}

    def _weights(self):
        context = self.ggml.context()
        tensors = {}
        for role in layers.ROLES:
            rows, columns = self.layer.shape(role)
            experts = self.layer.experts
            tensors[role] = self.ggml.new_tensor_3d(context, NVFP4, columns, rows, experts)
            tensors[f"{role}_scale"] = self.ggml.new_tensor_2d(context, F32, 1, experts)
        if not self.ggml.backend_alloc_ctx_tensors(context, self.backend):
            raise Unavailable("ggml found no memory for its weights")
        for role in layers.ROLES:
            data = self._array(tensors[role], np.uint8).reshape(self.layer.experts, -1)
            for expert in range(self.layer.experts):
                matrix = layers.expert_matrix(self.layer, role, expert)
                data[expert] = ggml_blocks.blocks(*matrix).ravel()
            self._array(tensors[f"{role}_scale"], np.float32)[:] = self.layer.gain(role)
        return tensors

    def _array(self, tensor, dtype):
        return np.frombuffer(self.ggml.bytes_of(tensor), dtype)

    def prepare(self, batches):
        for graph in self.graphs.values():
            graph.free()
        self.graphs = {}  # built in the first call, so that their memory counts as the call's
        self.batches = [(b.x.astype(np.float32), b.ids, b.weights) for b in batches]
        version = self.ggml.version().decode()
        return {"ggml": version, "ggml_compiled_for": self.ggml.extensions}

    def run(self, copy, batch):
        x, ids, weights = self.batches[batch]
        if copy not in self.graphs:
            self.graphs[copy] = Graph(self.ggml, self.layer, self.weights[copy], len(x))
        graph = self.graphs[copy]
        for tensor, values in ((graph.x, x), (graph.ids, ids), (graph.weights, weights)):
            self._array(tensor, values.dtype)[:] = values.ravel()
        if status := self.ggml.backend_graph_compute(self.backend, graph.graph):
            raise RuntimeError(f"ggml_backend_graph_compute returned {status}")
        return self._array(graph.result, np.float32).reshape(x.shape).copy()


class Graph:
    """The layer for so many tokens, with memory for what is between its weights and its result."""

    def __init__(self, ggml, layer, tensors, tokens):
        self.ggml = ggml
        self.context = context = ggml.context()
        k, hidden = layer.top_k, layer.hidden
        self.x = ggml.new_tensor_3d(context, F32, hidden, 1, tokens)
        self.ids = ggml.new_tensor_2d(context, I32, k, tokens)
        self.weights = ggml.new_tensor_3d(context, F32, 1, k, tokens)
        for tensor in (self.x, self.ids, self.weights):
            ggml.set_input(tensor)
        flat_ids = ggml.reshape_1d(context, self.ids, k * tokens)

        def product(role, operand):
            scale = ggml.get_rows(context, tensors[f"{role}_scale"], flat_ids)
            scale = ggml.reshape_3d(context, scale, 1, k, tokens)
            return ggml.mul(
                context, ggml.mul_mat_id(context, tensors[role], operand, self.ids), scale
            )

        rows = product("w2", ggml.swiglu(context, product("w13", self.x)))
        rows = ggml.mul(context, rows, self.weights)
        slots = [
            ggml.view_2d(context, rows, hidden, tokens, 4 * hidden * k, 4 * hidden * slot)
            for slot in range(k)
        ]
        self.result = slots[0]
        for slot in slots[1:]:
            self.result = ggml.add(context, self.result, slot)
        ggml.set_output(self.result)
        self.graph = ggml.new_graph(context)
        ggml.build_forward_expand(self.graph, self.result)
        self.allocator = ggml.gallocr_new(ggml.backend_cpu_buffer_type())
        if not ggml.gallocr_alloc_graph(self.allocator, self.graph):
            raise Unavailable("ggml found no memory for its graph")

    def free(self):
        self.ggml.gallocr_free(self.allocator)
        self.ggml.free(self.context)
