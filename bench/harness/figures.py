# SPDX-License-Identifier: GPL-2.0
"""From what the cases print to the figures that are published: what is subtracted from what, once for each repeat."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from statistics import median
from typing import NamedTuple

ORDERS = (9, 4, 0)
REPORTERS = ("dlh", "balloon")
BATCHES = (1, 8, 32, 512)
PRODUCERS = (1, 2, 4, 8)
PERCENTILES = ("p50", "p99", "max")
LOADS = ("faults", "build")
# Units: ticks of the time-stamp counter, and run time. Where instructions are counted both are those.
TICKS, RUN_NS = "ticks", "ns"
COUNTED = "instructions"
# Keys and figures of runs by the clock, where there is real virtualisation.
WALL = "wall"
# What the guest of the calibration executes between two exits: xor, xor, cpuid, dec, jnz.
CALIBRATION_INSNS = 5

Raw = Mapping[str, float]


class Figure(NamedTuple):
    """What several repeats came to."""

    unit: str
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.values)

    def __str__(self) -> str:
        spread = f"{number(min(self.values))} to {number(max(self.values))}"
        same = min(self.values) == max(self.values)
        return f"{number(self.median)} {self.unit}" + (f" (all {len(self.values)})" if same else f" ({spread})")

    def as_json(self) -> dict[str, object]:
        values = [min(self.values), max(self.values)]
        return {"unit": self.unit, "median": self.median, "spread": values, "values": list(self.values)}


def number(value: float) -> str:
    """As many digits as mean something."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:,.1f} M"
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def derive_all(raw: Mapping[str, list[dict[str, float]]]) -> dict[str, Figure]:
    """All figures that the repeats allow, each from what belongs to the same repeat."""
    prefix = f"{WALL}/"
    counted = {key: runs for key, runs in raw.items() if not key.startswith(prefix)}
    clocked = {key.removeprefix(prefix): runs for key, runs in raw.items() if key.startswith(prefix)}
    figures = {}
    for name, figure in _derive(counted).items():
        figures[name] = figure._replace(unit=COUNTED) if figure.unit in (TICKS, RUN_NS) else figure
    for name, figure in _derive(clocked).items():
        figures[f"{WALL}_{name.replace('insns', figure.unit)}"] = figure
    return figures


def _derive(raw: Mapping[str, list[dict[str, float]]]) -> dict[str, Figure]:
    collected: dict[str, tuple[str, list[float]]] = {}
    for repeat in range(max(map(len, raw.values()), default=0)):
        one = {key: runs[repeat] for key, runs in raw.items() if repeat < len(runs) and runs[repeat]}
        for part in (_calls, _latency, _tickless, _reclaim, _reclaim_busy, _madvise, _churn, _ksm, _vms):
            for name, unit, value in _if_there(part, one):
                collected.setdefault(name, (unit, []))[1].append(value)
    return {name: Figure(unit, tuple(values)) for name, (unit, values) in collected.items()}


Derived = Iterator[tuple[str, str, float]]


def _if_there(part: Callable[[Mapping[str, Raw]], Derived], raw: Mapping[str, Raw]) -> Derived:
    """What a part makes of a repeat, up to the first case that was not run, or has nothing to divide by."""
    try:
        yield from part(raw)
    except (KeyError, ZeroDivisionError):
        return


def _calls(raw: Mapping[str, Raw]) -> Derived:
    calls = raw["calls"]
    yield "sync_hypercall_insns", TICKS, calls["stock_hypercall"]
    added = calls["hypercall"] - calls["stock_hypercall"]
    yield "hook_other_hypercall_overhead_insns", TICKS, added
    for name, measured in (
        ("no_vm", "exit"),
        ("other_vm", "exit_other_vm"),
        ("other_vcpu", "exit_other_vcpu"),
        ("ring_empty", "exit_ring_empty"),
        ("all_gone", "exit_after_all"),
    ):
        yield f"exit_overhead_unused_insns_{name}", TICKS, calls[measured] - calls["stock_exit"]
    yield "exit_insns", TICKS, calls["stock_exit"]
    yield "enqueue_insns", TICKS, calls["deferred_guest_b32"]
    for batch in BATCHES:
        yield f"deferred_total_insns_b{batch}", TICKS, calls[f"deferred_total_b{batch}"]
    yield "coalesced_mmio_insns", TICKS, calls["stock_coalesced_mmio"]
    for batch in (1, 32):
        yield f"inserted_call_insns_b{batch}", TICKS, calls[f"inserted_b{batch}"]
    for vcpus in PRODUCERS:
        yield f"vcpus_{vcpus}_insns", TICKS, calls[f"producers_{vcpus}"]
    for load in ("nop", "trace"):
        for percentile in ("p99", "max"):
            ticks = calls[f"exit_flood_{load}_{percentile}"] - calls["exit_empty_p50"]
            yield f"drain_{percentile}_us_{load}", "µs", _us(ticks, calls)


def _us(ticks: float, run: Raw) -> float:
    return ticks * 1000 / run["tsc_khz"]


def _latency(raw: Mapping[str, Raw]) -> Derived:
    run = raw["latency"]
    for guest in ("busy", "idle"):
        for percentile in PERCENTILES:
            yield f"defer_latency_us_{guest}_{percentile}", "µs", _us(run[f"{guest}_wait_{percentile}"], run)


def _tickless(raw: Mapping[str, Raw]) -> Derived:
    run = raw["tickless"]
    for percentile in PERCENTILES:
        yield f"defer_latency_us_tickless_{percentile}", "µs", _us(run[f"wait_{percentile}"], run)


def _guest_insns(run: Raw) -> float:
    """What the guest executed, without what is counted around each entry."""
    return run["guest_insns"] - run["guest_entries"] * (run["entry_insns"] - CALIBRATION_INSNS)


def _reclaim(raw: Mapping[str, Raw]) -> Derived:
    for order in ORDERS:
        none = raw[f"reclaim/none-{order}"]
        yield f"reclaim_window_insns_none_o{order}", RUN_NS, none["all_insns"]
        empty = raw[f"reclaim/empty-{order}"]
        # What the guest executes more in a window than without reports.
        guests = {"empty": _guest_insns(empty) - _guest_insns(none)}
        floor = guests["empty"] / (empty["counted_reported_mib"] / 1024)
        yield f"reclaim_guest_insns_per_gib_empty_o{order}", RUN_NS, floor
        for reporter in REPORTERS:
            run, name = raw[f"reclaim/{reporter}-{order}"], f"{reporter}_o{order}"
            gib, counted_gib = run["back_mib"] / 1024, run["counted_back_mib"] / 1024
            guests[reporter] = _guest_insns(run) - _guest_insns(none)
            guest = guests[reporter] / counted_gib
            asked = (run["asked_exits"] - none["asked_exits"]) / counted_gib
            yield f"reclaim_exits_per_gib_{name}", "exits", asked
            yield f"reclaim_all_exits_per_gib_{name}", "exits", (run["all_exits"] - none["all_exits"]) / gib
            host = (run["all_insns"] - none["all_insns"]) / gib - guest
            yield f"reclaim_host_insns_per_gib_{name}", RUN_NS, host
            yield f"reclaim_guest_insns_per_gib_{name}", RUN_NS, guest
            yield f"reclaim_window_insns_{name}", RUN_NS, run["all_insns"]
            yield f"reclaim_returned_mib_{name}", "MiB", run["back_mib"]
            for percentile in ("p50", "p99"):
                yield f"reclaim_latency_s_{name}_{percentile}", "s", run[f"seconds_{percentile}"]
        # Of equal windows, as the guest frees the same each time: what comes back of that varies.
        for who in ("empty", "dlh"):
            yield f"reclaim_guest_ratio_{who}_to_balloon_o{order}", "", guests[who] / guests["balloon"]


def _reclaim_busy(raw: Mapping[str, Raw]) -> Derived:
    none = raw["reclaim/none-0-busy"]
    for reporter in REPORTERS:
        run, name = raw[f"reclaim/{reporter}-0-busy"], f"{reporter}_o0"
        gib = run["back_mib"] / 1024
        interrupts = (run["interrupt_exits"] - none["interrupt_exits"]) / gib
        yield f"reclaim_busy_interrupt_exits_per_gib_{name}", "exits", interrupts
        exits = (run["all_exits"] - none["all_exits"]) / gib - interrupts
        yield f"reclaim_busy_other_exits_per_gib_{name}", "exits", exits
        for percentile in ("p50", "p99"):
            yield f"reclaim_busy_latency_s_{name}_{percentile}", "s", run[f"seconds_{percentile}"]


def _madvise(raw: Mapping[str, Raw]) -> Derived:
    shapes = {"o9_huge": "2m_huge", "o9": "2m_small", "o4": "64k", "o0": "4k", "o0_runs16": "4k_runs16"}
    for name, shape in shapes.items():
        for by in ("madvise", "dlh"):
            measured = raw["madvise"][f"reclaim_{shape}_{by}"]
            yield f"release_host_insns_per_gib_{by}_{name}", TICKS, measured
        yield f"release_ratio_{name}", "", raw["madvise"][f"reclaim_{shape}_ratio"]


def _churn(raw: Mapping[str, Raw]) -> Derived:
    none = raw["churn/none-0"]
    for load in LOADS:
        yield f"refault_mean_rss_mib_{load}_none", "MiB", none[f"{load}_rss_mib"]
        for reporter in REPORTERS:
            for order in ORDERS:
                run, name = raw[f"churn/{reporter}-{order}"], f"{load}_{reporter}_o{order}"
                yield f"refault_slowdown_pct_{name}", "%", 100 * (run[f"{load}_s"] / none[f"{load}_s"] - 1)
                yield f"refault_mean_rss_mib_{name}", "MiB", run[f"{load}_rss_mib"]


def _ksm(raw: Mapping[str, Raw]) -> Derived:
    yield "ksm_zero_insns_per_gib", RUN_NS, raw["ksm"]["zero_insns_per_gib"]
    yield "ksm_zero_seconds_per_gib", "s", raw["ksm"]["zero_seconds_per_gib"]


def _vms(raw: Mapping[str, Raw]) -> Derived:
    vms = raw["vms"]
    yield "vms_1000_kib_a_vm", "KiB", vms["kib_a_vm"]
    for count in ("1", "1000"):
        yield f"vms_{count}_ring_setup_insns", RUN_NS, vms[f"ring_setup_{count}_insns"]
        yield f"vms_{count}_drain_insns_b32", TICKS, vms[f"drain_{count}_b32"]
        yield f"vms_{count}_exit_ring_empty_insns", TICKS, vms[f"exit_ring_empty_{count}"]
