"""What the Flax layers refuse when they are made: parts that do not fit, and meshes."""

from typing import Any

from jax.sharding import Mesh

from jax_nvfp4_moe._messages import described
from jax_nvfp4_moe.activations import Activation
from jax_nvfp4_moe.experts import ExpertWeights, check_experts
from jax_nvfp4_moe.layer import Mlp, MoeLayer, Router
from jax_nvfp4_moe.routing import check_fits


def check_layer(layer: MoeLayer) -> None:
    """Checks that the parts of a layer, arrays or shapes, fit each other.

    Raises:
        TypeError: not a `MoeLayer`, or a part of it is of the wrong type or dtype.
        ValueError: a shape does not fit.
    """
    if not isinstance(layer, MoeLayer):
        raise TypeError(f"layer is {described(layer)}, expected MoeLayer(router, experts, ...)")
    check_experts(layer.experts)
    if not isinstance(layer.router, Router):
        raise TypeError(f"router is {described(layer.router)}, expected Router(weight, routing)")
    if not isinstance(layer.activation, Activation):
        raise TypeError(f"activation is {described(layer.activation)}, expected Activation(name)")
    if layer.activation.gated != layer.experts.gated:
        have = "gate and up rows" if layer.experts.gated else "up rows alone"
        raise ValueError(
            f"activation is {layer.activation.name!r}, which is "
            f"{'' if layer.activation.gated else 'not '}gated, but the experts have {have}"
        )
    num_experts = layer.experts.num_experts
    check_fits(layer.router.routing, num_experts, "the layer")
    hidden = _check_latent(layer)
    wanted = {
        "weight": (num_experts, hidden),
        "bias": (num_experts,),
        "selection_bias": (num_experts,),
        "input_scale": (hidden,),
        "expert_scale": (num_experts,),
    }
    for field, shape in wanted.items():
        array = getattr(layer.router, field)
        if array is not None or field == "weight":
            _check_shape(f"router.{field}", array, shape)
    _check_shared(layer, hidden)


def _check_latent(layer: MoeLayer) -> int:
    """The size of tokens, which is that of the experts unless there are projections."""
    inner = layer.experts.hidden_size
    if layer.to_latent is None and layer.from_latent is None:
        return inner
    for name in ("to_latent", "from_latent"):
        if getattr(layer, name) is None:
            raise ValueError(f"{name} is None, expected to_latent and from_latent or neither")
    hidden = layer.router.weight.shape[-1]
    _check_shape("to_latent", layer.to_latent, (inner, hidden))
    _check_shape("from_latent", layer.from_latent, (hidden, inner))
    return hidden


def _check_shared(layer: MoeLayer, hidden: int) -> None:
    if layer.shared_gate is not None:
        if layer.shared is None:
            raise ValueError("shared_gate was given, but shared is None: expected both")
        _check_shape("shared_gate", layer.shared_gate, (1, hidden))
    if layer.shared is None:
        return
    if isinstance(layer.shared, ExpertWeights):
        check_experts(layer.shared)
        got = (layer.shared.num_experts, layer.shared.hidden_size)
        if got != (1, hidden):
            raise ValueError(
                f"shared has {got[0]} experts of hidden_size {got[1]}, expected 1 of {hidden}"
            )
        return
    if not isinstance(layer.shared, Mlp):
        raise TypeError(f"shared is {described(layer.shared)}, expected Mlp or ExpertWeights")
    if (layer.shared.gate is not None) != layer.activation.gated:
        wanted = "an array" if layer.activation.gated else "None"
        raise ValueError(
            f"shared.gate is {described(layer.shared.gate)}, expected {wanted}: activation "
            f"{layer.activation.name!r} is {'' if layer.activation.gated else 'not '}gated"
        )
    up = getattr(layer.shared.up, "shape", ())
    size = up[0] if len(up) == 2 else "I"
    _check_shape("shared.up", layer.shared.up, (size, hidden))
    _check_shape("shared.down", layer.shared.down, (hidden, size))
    if layer.shared.gate is not None:
        _check_shape("shared.gate", layer.shared.gate, (size, hidden))


def _check_shape(name: str, array: Any, shape: tuple[int | str, ...]) -> None:
    if getattr(array, "shape", None) != shape:
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"{name} is {described(array)}, expected shape [{wanted}]")


def check_mesh(
    mesh: Mesh | None, expert_axis: str | None, data_axis: str | None, size: int
) -> None:
    """Checks where experts are to be split; `size` is how many there are.

    Raises:
        ValueError: the mesh lacks an axis, or does not divide the experts.
    """
    if mesh is None:
        if data_axis is not None:
            raise ValueError(f"data_axis is {data_axis!r}, but mesh is None: expected both")
        return
    if expert_axis is None:
        raise ValueError("expert_axis is None, but mesh was given: name the axis to split over")
    for name, axis in (("expert_axis", expert_axis), ("data_axis", data_axis)):
        if axis is not None and axis not in mesh.shape:
            raise ValueError(f"{name} is {axis!r}, but the mesh has axes {tuple(mesh.shape)}")
    if size % mesh.shape[expert_axis]:
        raise ValueError(
            f"expert_axis {expert_axis!r} has {mesh.shape[expert_axis]} devices, which do not "
            f"divide {size} experts"
        )
