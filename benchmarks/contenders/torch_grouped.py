"""Layers in torch by `torch._grouped_mm`, for GPUs: sorted tokens, each expert's rows in one call.

`DequantiseAll` is the recipe that vLLM's emulation began with (vllm@0.20.0): every expert to
bfloat16 in every call, then a grouped GEMM. `Bfloat16` has experts that were dequantised before.
"""

import torch

from benchmarks import layers
from benchmarks.contenders.base import RESIDUE, sample
from benchmarks.contenders.torch_recipes import TorchHit, dequantise, quantise_dequantise

AT_ONCE = 1 << 30  # bytes of temporaries while experts are dequantised, 16 for each parameter


def dequantise_in_parts(codes, scale, gain):
    """All experts, some at a time: float32 on the way, they would need eight times the memory."""
    experts, rows, half = codes.shape
    count = max(1, AT_ONCE // (16 * rows * 2 * half))
    out = torch.empty(experts, rows, 2 * half, dtype=torch.bfloat16, device=codes.device)
    parts = (tensor.split(count) for tensor in (out, codes, scale))
    for target, *packed in zip(*parts, strict=True):
        target.copy_(dequantise(*packed, gain))
    return out


class Grouped(TorchHit):
    """Both GEMMs grouped."""

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def matrices(self, copy):
        """w13 [E, 2I, H] and w2 [E, H, I], bfloat16."""
        raise NotImplementedError

    def rounded(self, x, scale):
        """What is multiplied instead of x."""
        raise NotImplementedError

    def layer_of(self, copy, x, ids, weights):
        tokens, top_k = ids.shape
        experts, order = ids.flatten().sort()
        every = torch.arange(self.layer.experts, device=x.device)
        ends = torch.searchsorted(experts, every, right=True, out_int32=True)
        w13, w2 = self.matrices(copy)
        rows = self.rounded(x, layers.INPUT_SCALE)[order // top_k]
        gate, up = torch._grouped_mm(rows, w13.mT, offs=ends).chunk(2, -1)
        hidden = self.rounded(torch.nn.functional.silu(gate) * up, layers.HIDDEN_SCALE)
        products = torch._grouped_mm(hidden, w2.mT, offs=ends)
        unsorted = torch.empty_like(products)
        unsorted[order] = products
        return torch.bmm(weights[:, None].bfloat16(), unsorted.view(tokens, top_k, -1))[:, 0]

    @torch.inference_mode()
    def run(self, copy, batch):
        return self.layer_of(copy, *self.batches[batch]).float().cpu().numpy()

    def chain(self, batches):
        """A layer for each batch, as one program."""
        return TorchChain(self.layer_of, len(self.weights), [self.tensors(b) for b in batches])


class DequantiseAll(Grouped):
    def matrices(self, copy):
        return (
            dequantise_in_parts(*self.weights[copy][role], self.layer.gain(role))
            for role in layers.ROLES
        )

    def rounded(self, x, scale):
        return quantise_dequantise(x, 1 / scale)


class Bfloat16(Grouped):
    reference = "w4a16"

    def stored(self, role):
        return (dequantise_in_parts(*super().stored(role), self.layer.gain(role)),)

    def matrices(self, copy):
        return (self.weights[copy][role][0] for role in layers.ROLES)

    def rounded(self, x, scale):
        return x


class TorchChain:
    """Layers one after another: one CUDA graph, or on a CPU as many calls."""

    def __init__(self, layer_of, copies, batches):
        self.layer_of, self.copies, self.batches = layer_of, copies, batches
        self.results, self.facts = [], {}
        self.enqueue = self._run
        if torch.cuda.is_available():
            self._capture()

    def wait(self):
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def samples(self):
        return [sample(result).float().cpu().numpy() for result in self.results]

    @torch.inference_mode()
    def _run(self):
        results = []
        for index, (x, *routing) in enumerate(self.batches):
            after = torch.add(x, results[-1], alpha=RESIDUE) if results else x
            results.append(self.layer_of(index % self.copies, after, *routing))
        self.results = results

    def _capture(self):
        torch.cuda.empty_cache()  # what the last one's graph had
        torch.cuda.reset_peak_memory_stats()
        before, stream = torch.cuda.memory_allocated(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what is made on the first call cannot be captured
            self._run()
        torch.cuda.synchronize()
        temporary = torch.cuda.max_memory_allocated() - before
        torch.cuda.empty_cache()  # a graph has memory of its own
        self.facts = {"temp_mb": round(temporary / 1e6, 1), "cuda_graph": True}
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._run()
        except RuntimeError as error:  # it is timed all the same, and says so
            torch.cuda.synchronize()
            self.facts["cuda_graph"] = str(error).splitlines()[0]
        else:
            self.enqueue = graph.replay
