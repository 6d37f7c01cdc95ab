"""Programs for a GPU that is not there, named by an abstract device, and their calls."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

import jax_nvfp4_moe as nvm
from jax_nvfp4_moe.bridge.library import TARGET

B200, B300 = "NVIDIA B200", "NVIDIA GB300"
T, K, E, H = 16, 4, 8, 272
INTERMEDIATE = 80


def on(kind, sizes=(), names=()):
    device = AbstractDevice(device_kind=kind, num_cores=None, platform="cuda")
    return use_abstract_mesh(AbstractMesh(sizes, names, abstract_device=device))


def layer(scheme="static", gated=True, experts=E, seed=0, separate_scales=False):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape) * shape[-1] ** -0.5 * 2, jnp.float32)

    shapes = [(experts, INTERMEDIATE, H)] * 2 + [(experts, H, INTERMEDIATE)]
    weights = [normal(*shape) for shape in shapes]
    weights[0] = weights[0] if gated else None
    scales = (4 / 2688, 30 / 2688) if scheme == "static" else ()
    return nvm.quantize_experts(
        *weights, *scales, activation_scheme=scheme, separate_scales=separate_scales
    )


def tokens(seed=1, experts=E):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(T, H)), jnp.bfloat16)
    return x, jnp.asarray(rng.normal(size=(T, experts)) * 2, jnp.float32)


@dataclasses.dataclass(frozen=True)
class CustomCall:
    """One call of the bridge's target in a program."""

    module: str
    function: str
    values: dict  # by the parameters' names: an operand's or a result's type, or a constant
    workspace: str
    updated: tuple = ()  # the parameters that are read and written


_ALIASES = re.compile(r", output_operand_aliases = \[(?:#stablehlo[^>]*>(?:, )?)+\]")
_ALIAS = re.compile(
    r"output_tuple_indices = \[(?P<result>\d+)\], operand_index = (?P<operand>\d+),"
)

_CALL = re.compile(
    rf"custom_call @{TARGET}\((?P<operands>[^)]*)\) \{{mhlo.backend_config = \{{"
    r'arguments = "(?P<arguments>[^"]*)", function = "(?P<function>\w+)", '
    r'module = "(?P<module>[^"]+)", program = dense<\[(?P<program>[^]]*)\]> : tensor<\d+xi64>\}'
    r"(?P<rest>.*)\} : \((?P<types>[^)]*)\) -> \((?P<results>[^)]*)\)"
)


def calls_of(exported):
    """The calls of a program, in order."""
    text = exported.mlir_module()
    found = [call_of(match) for match in _CALL.finditer(text)]
    assert len(found) == text.count(TARGET)
    return found


def call_of(match):
    words = iter([int(word) for word in match["program"].split(",")])
    operands = match["types"].split(", ")
    *results, workspace = match["results"].split(", ")
    assert len(match["operands"].split(", ")) == len(operands)
    # Beside layouts, all of them row-major, operands that are results too; no side effects.
    rest, aliases = _ALIASES.sub("", match["rest"]), {}
    for found in _ALIAS.finditer(match["rest"]):
        aliases[int(found["operand"])] = int(found["result"])
    assert re.findall(r"(\w+) = ", rest) == ["operand_layouts", "result_layouts"]
    for layout in re.findall(r"dense<\[?([\d, ]+)\]?>", rest):
        order = [int(axis) for axis in layout.split(",")]
        assert order == sorted(order, reverse=True)
    values, used, results_of = {}, [], {}
    for name in match["arguments"].split(","):
        match next(words):
            case 0:
                values[name] = None
            case 1:
                used.append(("operand", index := next(words)))
                values[name] = operands[index]
            case 2:
                used.append(("result", index := next(words)))
                values[name] = results[index]
                results_of[name] = index
            case 6:
                values[name] = tuple(next(words) for _ in range(next(words)))
            case 4:
                values[name] = float(np.int64(next(words)).view(np.float64))
            case 3 | 5:
                values[name] = next(words)
    used += [("operand", operand) for operand in aliases]
    # Each once, and none left over.
    every = [("operand", i) for i in range(len(operands))]
    every += [("result", i) for i in range(len(results))]
    assert sorted(used) == sorted(every)
    written = {index: name for name, index in results_of.items()}
    updated = tuple(written[index] for index in aliases.values())
    return CustomCall(match["module"], match["function"], values, workspace, updated)


def exported_for(kind, function, *arguments):
    with on(kind):
        made = export.export(
            jax.jit(function), platforms=("cuda",), disabled_checks=nvm.EXPORT_CHECKS
        )
        return made(*arguments)
