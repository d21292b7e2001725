# SPDX-License-Identifier: GPL-2.0
"""docs/performance.md and its charts, from the figures and bench/performance.md.in."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import pygal
from vm.machine import REPOSITORY

from .figures import BATCHES, LOADS, ORDERS, REPORTERS, Figure, number

TEMPLATE = REPOSITORY / "bench/performance.md.in"
PAGE = REPOSITORY / "docs/performance.md"
CHARTS = REPOSITORY / "docs/performance"
_FIGURE = re.compile(r"\{\{(?:(\w+):)?([a-z0-9_]+)\}\}")
_NAMES = {"dlh": "ours", "balloon": "virtio-balloon"}
_VARIANTS = [(f"{_NAMES[reporter]}, order {order}", f"{reporter}_o{order}") for reporter in REPORTERS for order in ORDERS]

Figures = Mapping[str, Figure]


def write(figures: Figures, environment: Mapping[str, str]) -> list[str]:
    """Renews the page and the charts. If figures are missing nothing is written, and they are returned."""
    text = TEMPLATE.read_text()
    wanted = [name for kind, name in _FIGURE.findall(text) if kind in ("", "ratio")]
    missing = [name for name in dict.fromkeys(wanted) if name not in figures and name not in environment]
    if missing:
        return missing
    try:
        charts = {"calls": _calls(figures), "reclaim": _reclaim(figures), "churn": _churn(figures)}
        tables = {
            "figures": _all(figures),
            "reclaim": _reclaim_table(figures),
            "reclaim_busy": _reclaim_busy_table(figures),
            "churn": _churn_table(figures),
        }
    except KeyError as error:
        return [str(error.args[0])]
    CHARTS.mkdir(exist_ok=True)
    for name, chart in charts.items():
        (CHARTS / f"{name}.svg").write_text(chart)

    def fill(match: re.Match[str]) -> str:
        kind, name = match.groups()
        if kind == "table":
            return tables[name]
        if name in environment:
            return environment[name]
        # The longest is the longest of all runs.
        return number(max(figures[name].values) if "_max" in name else figures[name].median)

    PAGE.write_text(_FIGURE.sub(fill, text))
    return []


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def _all(figures: Figures) -> str:
    rows = []
    for name, figure in figures.items():
        low, high = number(min(figure.values)), number(max(figure.values))
        spread = low if low == high else f"{low} to {high}"
        rows.append((f"`{name}`", number(figure.median), spread, str(len(figure.values)), figure.unit))
    return _table(("figure", "median", "spread", "runs", "unit"), rows)


def _reclaim_table(figures: Figures) -> str:
    parts = ("exits", "all_exits", "host_insns", "guest_insns")
    rows = [
        (label, number(figures[f"reclaim_returned_mib_{name}"].median),
         *(number(figures[f"reclaim_{part}_per_gib_{name}"].median) for part in parts),
         *(number(figures[f"reclaim_latency_s_{name}_{p}"].median) for p in ("p50", "p99")))
        for label, name in _VARIANTS
    ]  # fmt: skip
    head = (
        "",
        "returned of 128 MiB",
        "exits asked for",
        "all exits",
        "host instructions",
        "guest instructions",
        "50 % of that, s",
        "99 % of that, s",
    )
    return _table(head, rows)


def _reclaim_busy_table(figures: Figures) -> str:
    rows = [
        (f"{_NAMES[reporter]}, order 0",
         *(number(figures[f"reclaim_busy_{part}_per_gib_{reporter}_o0"].median) for part in ("other_exits", "interrupt_exits")),
         *(number(figures[f"reclaim_busy_latency_s_{reporter}_o0_{p}"].median) for p in ("p50", "p99")))
        for reporter in REPORTERS
    ]  # fmt: skip
    head = ("busy guest", "exits, not for interrupts", "for interrupts", "50 % of that, s", "99 % of that, s")
    return _table(head, rows)


def _churn_table(figures: Figures) -> str:
    none = [number(figures[f"refault_mean_rss_mib_{load}_none"].median) for load in LOADS]
    rows = [("no reports", "", none[0], "", none[1])]
    for label, name in _VARIANTS:
        row = [label]
        for load in LOADS:
            row.append(f"{figures[f'refault_slowdown_pct_{load}_{name}'].median:+.1f} %")
            row.append(number(figures[f"refault_mean_rss_mib_{load}_{name}"].median))
        rows.append(tuple(row))
    return _table(("", "page faults", "mean RSS, MiB", "build-like", "mean RSS, MiB"), rows)


def _chart(kind: type[pygal.Bar], title: str, labels: Sequence[str], **options: object) -> pygal.Bar:
    style = pygal.style.CleanStyle(font_family="sans-serif")
    chart = kind(title=title, style=style, width=900, height=420, legend_at_bottom=True, no_prefix=True, js=[], **options)
    chart.x_labels = labels
    return chart


def _render(chart: pygal.Bar) -> str:
    return str(chart.render(is_unicode=True, disable_xml_declaration=True))


def _calls(figures: Figures) -> str:
    chart = _chart(pygal.Bar, "Instructions a call, guest and host", [f"{n} an exit" for n in BATCHES], logarithmic=True)
    chart.add("deferred", [figures[f"deferred_total_insns_b{n}"].median for n in BATCHES])
    for label, name in (
        ("hypercall", "sync_hypercall_insns"),
        ("coalesced MMIO", "coalesced_mmio_insns"),
    ):
        chart.add(label, [figures[name].median] * len(BATCHES))
    return _render(chart)


def _reclaim(figures: Figures) -> str:
    labels = [label for label, _ in _VARIANTS]
    chart = _chart(pygal.HorizontalStackedBar, "Millions of instructions to return 1 GiB", labels)
    for label, part in (("host", "host_insns"), ("guest", "guest_insns")):
        values = [figures[f"reclaim_{part}_per_gib_{name}"].median / 1e6 for _, name in _VARIANTS]
        chart.add(label, [round(value, 1) for value in values])
    return _render(chart)


def _churn(figures: Figures) -> str:
    chart = _chart(pygal.XY, "Slowdown in % by mean footprint in MiB", [], stroke=False)
    chart.x_labels = None
    for load in LOADS:
        for reporter in REPORTERS:
            points = []
            for order in ORDERS:
                name = f"{load}_{reporter}_o{order}"
                place = (figures[f"refault_mean_rss_mib_{name}"].median, figures[f"refault_slowdown_pct_{name}"].median)
                points.append({"value": place, "label": f"order {order}"})
            chart.add(f"{load}, {_NAMES[reporter]}", points)
    return _render(chart)
