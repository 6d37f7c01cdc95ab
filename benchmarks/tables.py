"""Shows results as a table on the terminal."""

from rich.console import Console
from rich.table import Table


def _short(number):
    return f"{number:.3g}" if number < 1000 else f"{number:.0f}"


COLUMNS = {
    "median ms": lambda line: _short(line["median_ms"]),
    "q1 .. q3": lambda line: f"{_short(line['q1_ms'])} .. {_short(line['q3_ms'])}",
    "min .. max": lambda line: f"{_short(line['min_ms'])} .. {_short(line['max_ms'])}",
    "calls": lambda line: str(line["calls"]),
    "GB/s": lambda line: f"{line['packed_gb_s']:.2f}",
    "GFLOP/s": lambda line: f"{line['gflop_s']:.1f}",
    "of bf16": lambda line: f"{100 * line['of_product']:.1f} %",
    "limit": lambda line: f"{100 * line['of_limit']:.1f} %",
    "differs": lambda line: f"{line['difference']:g}",
    "peak MB": lambda line: f"{line['peak_mb']:.1f}" if "peak_mb" in line else "",
}


GPU_COLUMNS = {
    **{name: COLUMNS[name] for name in ("median ms", "q1 .. q3")},
    "launch ms": lambda line: _short(line["launch_ms"]),
    "GB/s": lambda line: f"{line['gb_s']:.0f}",
    "of copy": lambda line: f"{100 * line['of_copy']:.1f} %",
    "TFLOP/s": lambda line: _short(line["gflop_s"] / 1e3),
    "of bf16": lambda line: f"{100 * line['of_bfloat16']:.1f} %",
    "limit": COLUMNS["limit"],
    "differs": COLUMNS["differs"],
}


def show(lines, layer, columns=COLUMNS):
    """One number of tokens' lines; `limit` is how much of the machine's best they reach."""
    table = Table(title=f"{layer}, T = {lines[0]['tokens']}", title_justify="left")
    table.add_column("", no_wrap=True)
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for line in lines:
        if "unavailable" not in line:
            table.add_row(line["contender"], *(column(line) for column in columns.values()))
    if table.row_count:
        console = Console()
        (console if console.is_terminal else Console(width=130)).print(table)
