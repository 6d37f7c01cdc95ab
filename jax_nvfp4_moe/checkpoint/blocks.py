"""Plans for reading a block of a checkpoint.

A plan checks everything that headers show, so that errors are raised before the first value is
read where possible. `read` then reads the values and checks them.
"""

import dataclasses

import numpy as np
from jaxtyping import Array

from jax_nvfp4_moe.checkpoint.errors import (
    MissingInputScaleError,
    TensorError,
    UnsupportedCheckpointError,
    first_names,
    mismatch_error,
    missing_error,
)
from jax_nvfp4_moe.checkpoint.matrices import FLOATS, ExpertTensors
from jax_nvfp4_moe.checkpoint.options import Advance, Options
from jax_nvfp4_moe.checkpoint.scheme import MODELOPT
from jax_nvfp4_moe.checkpoint.source import LayerTensors, Source
from jax_nvfp4_moe.checkpoint.values import read_biases, read_matrix, read_scalars, read_stack
from jax_nvfp4_moe.experts import ActivationScheme, ExpertWeights, check_experts
from jax_nvfp4_moe.layer import Mlp, MoeLayer
from jax_nvfp4_moe.nvfp4_array import Nvfp4Array
from jax_nvfp4_moe.router import Router


class ExpertsPlan:
    """The plan for reading `ExpertWeights`.

    Attributes:
        names: the tensors to read.
        nbytes: their size in bytes.
    """

    def __init__(self, tensors: ExpertTensors, options: Options, *, shared: bool = False) -> None:
        """Checks headers.

        Args:
            tensors: the experts.
            options: how to load them.
            shared: whether this is a shared expert, which every device holds in full.

        Raises:
            CheckpointError: a tensor is missing, or contradicts the format or the config.
            ValueError: the experts cannot be split over the mesh.
        """
        self._tensors = tensors
        self._options = dataclasses.replace(options, expert_axis=None) if shared else options
        self._options.check_split(tensors.num_experts)
        if tensors.activation_scheme is None:
            raise UnsupportedCheckpointError(
                f"{tensors.block} has experts that are not quantised: "
                "`python -m jax_nvfp4_moe quantize` makes a checkpoint with experts in NVFP4"
            )
        tensors.check_quantized()
        self._scheme: ActivationScheme = self._activation_scheme(tensors.activation_scheme)
        parts = tensors.parts
        every = [parts.data, parts.scale, parts.global_scale, parts.input_scale, "bias"]
        found = (name for part in every for name in tensors.tensors(tensors.roles, part))
        self.names = {name for name in found if name in tensors.files}
        self.nbytes = sum(tensors.files[name].nbytes for name in self.names)
        bulk = {name for part in every[:2] for name in tensors.tensors(tensors.roles, part)}
        self._rest = sum(tensors.files[name].nbytes for name in self.names - bulk)
        if unknown := [name for name in tensors.same_prefix() if name not in self.names]:
            raise UnsupportedCheckpointError(
                f"{first_names(unknown)} {'belong' if len(unknown) > 1 else 'belongs'} to the "
                "experts, but plain NVFP4 has no such tensor"
            )

    def _activation_scheme(self, stated: ActivationScheme) -> ActivationScheme:
        """The scheme to load: the one that the checkpoint states, unless options override it."""
        tensors, options = self._tensors, self._options
        wanted = options.activation_scheme or stated
        if wanted != "static":
            return wanted
        part = tensors.parts.input_scale
        if absent := tensors.absent(part):
            if options.on_missing_input_scale != "error":
                return options.on_missing_input_scale
            raise MissingInputScaleError(
                f"{first_names(absent)} {'are' if len(absent) > 1 else 'is'} missing, so that "
                "activations have no calibrated scale: on_missing_input_scale='per_token' computes "
                "a scale for each token, 'none' leaves activations unquantised (W4A16)"
            )
        tensors.check_scalars(part)
        return "static"

    def read(self, advance: Advance) -> ExpertWeights:
        """Reads the experts and checks their values.

        Raises:
            CheckpointError: a scale is not a finite number above 0, or a bias is not finite.
        """
        tensors, roles = self._tensors, self._tensors.w13_roles
        # Scalars first: they are small, and a bad one ends the reading early.
        w13_scale = read_scalars(tensors, roles, tensors.parts.global_scale)
        w2_scale = read_scalars(tensors, ("down",), tensors.parts.global_scale)[:, 0]
        w13_input_scale = w2_input_scale = None
        if self._scheme == "static":
            part = tensors.parts.input_scale
            w13_input_scale = self._input_scale(read_scalars(tensors, roles, part))
            down = read_scalars(tensors, ("down",), part)[:, 0]
            w2_input_scale = self._input_scale(down)
        experts = ExpertWeights(
            w13=self._matrices(roles, self._sharded(_shared_scale(w13_scale)), advance),
            w2=self._matrices(("down",), self._sharded(w2_scale), advance),
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
            rows, columns = read_matrix(tensors, roles[0], part, 0).shape
            return self._options.sharded(
                (tensors.num_experts, len(roles) * rows, columns),
                tensors.files[tensors.names.tensor(roles[0], part)].numpy_dtype,
                lambda index: read_stack(tensors, roles, part, index, advance),
            )

        parts = self._tensors.parts
        return Nvfp4Array(array(parts.data), array(parts.scale), global_scale)

    def _input_scale(self, scales: np.ndarray) -> Array:
        if self._options.input_scale == "global_max":
            return self._options.replicated(scales.max())
        return self._sharded(scales)

    def _sharded(self, values: np.ndarray) -> Array:
        return self._options.sharded(values.shape, values.dtype, lambda index: values[index])

    def _biases(self, roles: tuple[str, ...]) -> Array | None:
        biases = read_biases(self._tensors, roles)
        return None if biases is None else self._sharded(biases)


def _shared_scale(scale: np.ndarray) -> np.ndarray:
    """Global scales of gate and up: [E, 1] where all pairs are equal, else [E, G] as given."""
    return scale[:, :1] if (scale == scale[:, :1]).all() else scale


class RouterPlan:
    """The plan for reading a block's router, gates and projections, all in floating point.

    Attributes:
        names: the tensors to read, by their meaning.
    """

    def __init__(self, source: Source, layer: LayerTensors) -> None:
        """Checks headers.

        Raises:
            TensorError: a tensor is missing, or has another dtype or shape.
        """
        self._source = source
        family, sizes, block = source.family, source.sizes, layer.names.block
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
                raise missing_error([full], what.replace("_", " "))
            info = source.files[full]
            if info.dtype not in FLOATS or info.shape != shape:
                raise mismatch_error(full, info.dtype, info.shape, FLOATS, str(shape))
            self.names[what] = full

    def read(self, options: Options, advance: Advance) -> tuple[Router, dict[str, Array]]:
        """Reads the router, and the other tensors by their meaning.

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
    """Reads a floating-point tensor, which every device gets in full.

    Raises:
        TensorError: a value is not finite.
    """
    values = source.files.array(name)
    if not np.isfinite(values).all():
        raise TensorError(f"{name} has NaN or infinite values")
    advance(values.nbytes)
    return options.replicated(values)


class LayerPlan:
    """The plan for reading a `MoeLayer`.

    Attributes:
        names: the tensors to read.
    """

    def __init__(self, source: Source, layer: LayerTensors, options: Options) -> None:
        """Checks headers.

        Raises:
            CheckpointError, ValueError: as `ExpertsPlan` and `RouterPlan`.
        """
        self._source, self._options = source, options
        self._experts = ExpertsPlan(layer.experts, options)
        self._router = RouterPlan(source, layer)
        self._shared = layer.shared
        self._shared_experts = None
        self.names = self._experts.names | set(self._router.names.values())
        if self._shared is None:
            return
        if self._shared.activation_scheme is not None:
            self._shared_experts = ExpertsPlan(self._shared, options, shared=True)
            self.names |= self._shared_experts.names
        else:
            self._shared.check_unquantized()
            self.names |= set(self._shared.tensors(self._shared.roles, MODELOPT.data))

    def read(self, advance: Advance) -> MoeLayer:
        """Reads the layer and checks its values.

        Raises:
            CheckpointError: a scale is not a finite number above 0, or another value not finite.
        """
        router, plain = self._router.read(self._options, advance)
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
                self._source, self._shared.names.tensor(role, MODELOPT.data), self._options, advance
            )
            for role in self._shared.roles
        }
        return Mlp(gate=read.get("gate"), up=read["up"], down=read["down"])
