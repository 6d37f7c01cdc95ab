"""One mixture-of-experts block of a checkpoint: planned from headers, then read.

A plan checks everything that headers show, so that whatever can be refused is refused before the
first value is read.
"""

import dataclasses

import numpy as np
from jaxtyping import Array

from jax_nvfp4_moe.checkpoint.errors import (
    MissingInputScaleError,
    TensorError,
    UnsupportedCheckpointError,
)
from jax_nvfp4_moe.checkpoint.matrices import FLOATS, ExpertTensors, listed, mismatch, missing
from jax_nvfp4_moe.checkpoint.options import Advance, Options
from jax_nvfp4_moe.checkpoint.scheme import MODELOPT
from jax_nvfp4_moe.checkpoint.source import Source
from jax_nvfp4_moe.experts import ActivationScheme, ExpertWeights, check_experts
from jax_nvfp4_moe.layer import Mlp, MoeLayer, Router
from jax_nvfp4_moe.nvfp4_array import Nvfp4Array


class QuantizedExperts:
    """The plan of `ExpertWeights`.

    Attributes:
        names: the tensors it takes.
        nbytes: their bytes.
    """

    def __init__(
        self, source: Source, tensors: ExpertTensors, options: Options, *, alone: bool = False
    ) -> None:
        """Plans.

        Args:
            source: the checkpoint.
            tensors: the experts.
            options: how to load them.
            alone: whether this is a shared expert, which every device holds whole.

        Raises:
            CheckpointError: the tensors are not what they should be.
            ValueError: the experts cannot be split as the options say.
        """
        self._tensors = tensors
        self._options = dataclasses.replace(options, expert_axis=None) if alone else options
        self._options.check_split(tensors.num_experts)
        says = source.activation_scheme(tensors)
        if says is None:
            raise UnsupportedCheckpointError(
                f"{tensors.block} has experts that are not quantised: "
                "`python -m jax_nvfp4_moe quantize` makes a checkpoint whose experts are"
            )
        tensors.check_quantized()
        self._scheme: ActivationScheme = self._activation_scheme(says)
        parts = tensors.parts
        every = [parts.data, parts.scale, parts.global_scale, parts.input_scale, "bias"]
        found = (name for part in every for name in tensors.tensors(tensors.roles, part))
        self.names = {name for name in found if name in tensors.files}
        self.nbytes = sum(tensors.files[name].nbytes for name in self.names)
        bulk = {name for part in every[:2] for name in tensors.tensors(tensors.roles, part)}
        self._rest = sum(tensors.files[name].nbytes for name in self.names - bulk)
        if beside := [name for name in tensors.beside() if name not in self.names]:
            raise UnsupportedCheckpointError(
                f"{listed(beside)} {'are' if len(beside) > 1 else 'is'} beside the experts' "
                "matrices: this is not plain NVFP4"
            )

    def _activation_scheme(self, says: ActivationScheme) -> ActivationScheme:
        """Which one is loaded: what the checkpoint says or what was asked for instead."""
        tensors, options = self._tensors, self._options
        wanted = options.activation_scheme or says
        if wanted != "static":
            return wanted
        part = tensors.parts.input_scale
        if absent := tensors.absent(part):
            if options.on_missing_input_scale != "error":
                return options.on_missing_input_scale
            raise MissingInputScaleError(
                f"{listed(absent)} {'are' if len(absent) > 1 else 'is'} missing, without which "
                "activations have no calibrated scale: on_missing_input_scale='per_token' takes "
                "each token's own instead, 'none' does not quantise activations (W4A16)"
            )
        tensors.check_scalars(part)
        return "static"

    def read(self, advance: Advance) -> ExpertWeights:
        """Reads, and checks values.

        Raises:
            CheckpointError: a scale or a bias has a value that it cannot have.
        """
        tensors, roles = self._tensors, self._tensors.w13_roles
        # Scalars first: they are small, and what is wrong with them ends the reading early.
        w13_scale = tensors.scalars(roles, tensors.parts.global_scale)
        w2_scale = tensors.scalars(("down",), tensors.parts.global_scale)[:, 0]
        w13_input_scale = w2_input_scale = None
        if self._scheme == "static":
            w13_input_scale = self._input_scale(tensors.scalars(roles, tensors.parts.input_scale))
            down = tensors.scalars(("down",), tensors.parts.input_scale)[:, 0]
            w2_input_scale = self._input_scale(down)
        experts = ExpertWeights(
            w13=self._matrices(roles, self._placed(_shared(w13_scale)), advance),
            w2=self._matrices(("down",), self._placed(w2_scale), advance),
            w13_input_scale=w13_input_scale,
            w2_input_scale=w2_input_scale,
            w13_bias=self._biases(roles),
            w2_bias=self._biases(("down",)),
            hidden_size=tensors.hidden_size,
            intermediate_size=tensors.intermediate_size,
            activation_scheme=self._scheme,
            layout="linear",
        )
        advance(self._rest)
        check_experts(experts)
        return experts

    def _matrices(
        self, roles: tuple[str, ...], global_scale: Array, advance: Advance
    ) -> Nvfp4Array:
        def array(part: str) -> Array:
            tensors = self._tensors
            rows, columns = tensors.matrix(roles[0], part, 0).shape
            return self._options.split(
                (tensors.num_experts, len(roles) * rows, columns),
                tensors.files[tensors.tensor(roles[0], part)].numpy_dtype,
                lambda index: tensors.stack(roles, part, index, advance),
            )

        parts = self._tensors.parts
        return Nvfp4Array(array(parts.data), array(parts.scale), global_scale)

    def _input_scale(self, scales: np.ndarray) -> Array:
        if self._options.input_scale == "global_max":
            return self._options.whole(scales.max())
        return self._placed(scales)

    def _placed(self, values: np.ndarray) -> Array:
        return self._options.split(values.shape, values.dtype, lambda index: values[index])

    def _biases(self, roles: tuple[str, ...]) -> Array | None:
        biases = self._tensors.biases(roles)
        return None if biases is None else self._placed(biases)


def _shared(scale: np.ndarray) -> np.ndarray:
    """Gate's and up's global scales [E, G] as [E, 1] where all pairs are equal."""
    return scale[:, :1] if (scale == scale[:, :1]).all() else scale


class PlainTensors:
    """The plan of a block's tensors that are no expert's: all floating point.

    Attributes:
        names: the tensors it takes, by what they are.
    """

    def __init__(self, source: Source, layer: int) -> None:
        """Plans.

        Raises:
            TensorError: one is missing, or of another dtype or shape.
        """
        self._source = source
        family, sizes, block = source.family, source.sizes, source.place(layer)[0]
        experts, hidden, latent = sizes.num_experts, sizes.hidden_size, sizes.expert_hidden_size
        to_latent, from_latent = family.latent or (None, None)
        in_latent = latent != hidden
        wanted = {
            "router": (family.router, (experts, hidden)),
            "router_bias": (family.router_bias, (experts,)),
            "selection_bias": (family.selection_bias, (experts,)),
            "router_scale": (family.router_scale, (hidden,)),
            "expert_scale": (family.expert_scale, (experts,)),
            "shared_gate": (family.shared_gate, (1, hidden)),
            "to_latent": (to_latent if in_latent else None, (latent, hidden)),
            "from_latent": (from_latent if in_latent else None, (hidden, latent)),
        }
        self.names = {}
        for what, (name, shape) in wanted.items():
            if name is None:
                continue
            full = f"{block}.{name}"
            if full not in source.files:
                raise missing([full], what.replace("_", " "))
            info = source.files[full]
            if info.dtype not in FLOATS or info.shape != shape:
                raise mismatch(full, info, FLOATS, str(shape))
            self.names[what] = full

    def read(self, options: Options, advance: Advance) -> tuple[Router, dict[str, Array]]:
        """The router, and the rest by what it is.

        Raises:
            TensorError: a value is not finite.
        """
        source = self._source
        read = {
            what: read_plain(source, name, options, advance) for what, name in self.names.items()
        }
        router = Router(
            weight=read.pop("router"),
            routing=source.routing,
            bias=read.pop("router_bias", None),
            selection_bias=read.pop("selection_bias", None),
            norm_eps=source.norm_eps,
            input_scale=read.pop("router_scale", None),
            expert_scale=read.pop("expert_scale", None),
        )
        return router, read


def read_plain(source: Source, name: str, options: Options, advance: Advance) -> Array:
    """A floating-point tensor, on every device.

    Raises:
        TensorError: a value is not finite.
    """
    values = source.files.array(name)
    if not np.isfinite(values).all():
        raise TensorError(f"{name} has NaN or infinite values")
    advance(values.nbytes)
    return options.whole(values)


class Block:
    """The plan of a `MoeLayer`.

    Attributes:
        names: the tensors it takes.
    """

    def __init__(self, source: Source, layer: int, options: Options) -> None:
        """Plans.

        Raises:
            CheckpointError, ValueError: as `QuantizedExperts`; or a tensor of the router or of the
                shared expert is not what it should be.
        """
        self._source, self._options = source, options
        self._experts = QuantizedExperts(source, source.experts(layer), options)
        self._plain = PlainTensors(source, layer)
        self._shared = source.shared(layer)
        self._shared_experts = None
        self.names = self._experts.names | set(self._plain.names.values())
        if self._shared is None:
            return
        if source.activation_scheme(self._shared) is not None:
            self._shared_experts = QuantizedExperts(source, self._shared, options, alone=True)
            self.names |= self._shared_experts.names
        else:
            self._shared.check_unquantized()
            self.names |= set(self._shared.tensors(self._shared.roles, MODELOPT.data))

    def read(self, advance: Advance) -> MoeLayer:
        """Reads, and checks values.

        Raises:
            CheckpointError: a value is not what it can be.
        """
        router, plain = self._plain.read(self._options, advance)
        return MoeLayer(
            router=router,
            experts=self._experts.read(advance),
            activation=self._source.activation,
            shared=self._read_shared(advance),
            router_weight_on_input=self._source.family.router_weight_on_input,
            **plain,
        )

    def _read_shared(self, advance: Advance) -> Mlp | ExpertWeights | None:
        if self._shared_experts is not None:
            return self._shared_experts.read(advance)
        if self._shared is None:
            return None
        read = {
            role: read_plain(
                self._source, self._shared.tensor(role, MODELOPT.data), self._options, advance
            )
            for role in self._shared.roles
        }
        return Mlp(gate=read.get("gate"), up=read["up"], down=read["down"])
