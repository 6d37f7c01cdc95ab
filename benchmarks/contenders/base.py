"""What a contender is."""

import abc

# Of a layer's result, added to the tokens of the next one in a chain: it cannot begin before.
RESIDUE = 2.0**-10
SAMPLES = 256  # tokens of a large result that are compared, spread over all


def sample(result):
    return result[:: max(1, len(result) // SAMPLES)]


class Unavailable(Exception):
    """A contender cannot take part here; the message says why."""


class Contender(abc.ABC):
    """One way to compute a layer, with its weights ready.

    Attributes:
        reference: what it is compared with: "layer", the emulation of the scheme asked for; "vllm",
            that with vLLM's numerics; "w4a16", that without quantised activations.
        bound: the relative L2 difference from it above which the contender is wrong.
        weights_nbytes: of the weights it keeps, all copies of the layer.
    """

    reference: str
    bound: float
    weights_nbytes: int

    def __init__(self, layer, copies, scheme):
        """Makes the weights, as many times as there are copies of the layer."""
        self.layer = layer
        self.copies = copies
        self.scheme = scheme
        self.batches = []

    @classmethod
    def bytes_per_parameter(cls):
        """Of the weights as it keeps them."""
        return 9 / 16

    @classmethod
    def temporary_bytes_per_parameter(cls):
        """Of what one call makes of the weights of one copy."""
        return 0

    @abc.abstractmethod
    def prepare(self, batches):
        """Gets ready for these batches, and returns what is worth noting, a dict."""

    @abc.abstractmethod
    def run(self, copy, batch):
        """The whole layer, for a batch by its number: an array [T, H] of any floating type."""
