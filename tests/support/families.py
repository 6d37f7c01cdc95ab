"""The table of model families in docs/checkpoints.md, made from `FAMILIES`.

python -m tests.support.families
"""

from pathlib import Path

from jax_nvfp4_moe.checkpoint.families import FAMILIES

PAGE = Path(__file__).parents[2] / "docs" / "checkpoints.md"
BEGIN, END = "<!-- families: python -m tests.support.families -->\n", "<!-- end of families -->\n"


def features(family):
    """What an entry has beyond gated experts and a plain router, in words."""
    experts = family.experts[0]
    order = "alternating gate and up rows" if experts.interleaved else "gate and up rows"
    found = {
        "experts without gates": not experts.gated,
        f"all experts in one transposed tensor with {order}": experts.transposed,
        "expert groups": family.n_group is not None,
        "router bias": family.router_bias is not None,
        "selection bias": family.selection_bias is not None,
        "router with its own input, norm and scales": family.router_scale is not None,
        "router weights scale the input": family.router_weight_on_input,
        "shared expert with a gate": family.shared is not None and family.shared_gate is not None,
        "shared expert": family.shared is not None and family.shared_gate is None,
        "latent projections where the config has them": family.latent is not None,
    }
    return ", ".join(words for words, holds in found.items() if holds)


def table():
    """The table's Markdown."""
    rows = ["| family | `model_type` | features |", "|---|---|---|"]
    for family in FAMILIES:
        types = ", ".join(f"`{name}`" for name in family.model_types)
        rows.append(f"| {family.name} | {types} | {features(family)} |")
    return "\n".join(rows) + "\n"


def page():
    """The page with the current table."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
