"""Emulations in torch: quantise and dequantise the activations, dequantise experts, multiply.

`torch-all` dequantises every expert, as vLLM's emulation first did (vllm@0.20.0); `torch-hit` those
that a token goes to, one at a time.
"""

import functools

import numpy as np
import torch

from benchmarks import layers
from benchmarks.contenders.base import Contender, Unavailable
from benchmarks.machine import cores

VALUES = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
# Between magnitudes. What lies on one has the even code, which is below it or above it in turns.
BOUNDARIES = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], np.float32)
BOUNDARIES[1::2] = np.nextafter(BOUNDARIES[1::2], np.float32(0))


@functools.cache
def tables(device):
    """The values and the boundaries: there before a graph is captured, which cannot copy them."""
    return torch.tensor(VALUES, device=device), torch.from_numpy(BOUNDARIES).to(device)


def dequantise(codes, scale, gain):
    """Of any number of experts, to bfloat16."""
    nibbles = torch.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:-1], -1)
    table, _ = tables(codes.device)
    blocks = table[nibbles.int()].reshape(*scale.shape, 16)
    values = blocks * (scale.float() * gain)[..., None]
    return values.reshape(nibbles.shape).bfloat16()


def quantise_dequantise(x, gain):
    """Activations, with a static scale."""
    gain, blocks = float(gain), x.float().reshape(len(x), -1, 16)
    scale = (blocks.abs().amax(-1) / 6 * gain).clamp(max=448).to(torch.float8_e4m3fn).float()
    scaled = (blocks * torch.where(scale == 0, 0, gain / scale)[..., None]).clamp(-6, 6)
    table, boundaries = tables(x.device)
    values = table[torch.bucketize(scaled.abs(), boundaries)] * scaled.sign()
    return (values * (scale / gain)[..., None]).reshape(x.shape).bfloat16()


class TorchHit(Contender):
    reference = "vllm"
    bound = 2e-2
    device = torch.device("cpu")

    def __init__(self, layer, copies, scheme):
        super().__init__(layer, copies, scheme)
        if scheme != "static":
            raise Unavailable("the recipe knows static scales only")
        torch.set_num_threads(cores())
        first = {role: self.stored(role) for role in layers.ROLES}
        self.weights = [first]
        for _ in range(copies - 1):
            copied = {role: tuple(t.clone() for t in tensors) for role, tensors in first.items()}
            self.weights.append(copied)
        self.weights_nbytes = copies * sum(t.nbytes for tensors in first.values() for t in tensors)

    def stored(self, role):
        """The tensors that it keeps of all experts' matrices."""
        matrices = layers.matrices(self.layer, role)
        codes, scale = (torch.from_numpy(array).to(self.device) for array in matrices)
        return codes, scale.view(torch.float8_e4m3fn)

    def tensors(self, batch):
        x = torch.from_numpy(batch.x.astype(np.float32)).bfloat16()
        found = x, torch.from_numpy(batch.ids).long(), torch.from_numpy(batch.weights)
        return tuple(tensor.to(self.device) for tensor in found)

    def prepare(self, batches):
        self.batches = [self.tensors(batch) for batch in batches]
        return {}

    def dequantised(self, copy):
        """A function from a role and an expert to its matrix."""

        def matrix(role, expert):
            codes, scale = (tensor[expert] for tensor in self.weights[copy][role])
            return dequantise(codes, scale, self.layer.gain(role))

        return matrix

    @torch.inference_mode()
    def run(self, copy, batch):
        x, ids, weights = self.batches[batch]
        matrix = self.dequantised(copy)
        xq = quantise_dequantise(x, 1 / layers.INPUT_SCALE)
        out = torch.zeros(x.shape)
        for expert in ids.unique().tolist():
            token, slot = (ids == expert).nonzero(as_tuple=True)
            gate, up = (xq[token] @ matrix("w13", expert).T).chunk(2, -1)
            hidden = torch.nn.functional.silu(gate) * up
            product = quantise_dequantise(hidden, 1 / layers.HIDDEN_SCALE) @ matrix("w2", expert).T
            out.index_add_(0, token, product.float() * weights[token, slot][:, None])
        return out.bfloat16().float().numpy()


class TorchAll(TorchHit):
    @classmethod
    def temporary_bytes_per_parameter(cls):
        return 2 + 8  # what is dequantised, and float32 on the way there

    def dequantised(self, copy):
        every = {
            role: dequantise(*self.weights[copy][role], self.layer.gain(role))
            for role in layers.ROLES
        }
        return lambda role, expert: every[role][expert]
