# SPDX-License-Identifier: GPL-2.0
"""Benchmarks: each case is run in an L1 of its own, several times; what it prints becomes figures, tables and charts.

One way through: cases/ (in L1, on `inside`) -> `run` (repeats, results.json) -> `figures` (what is derived) ->
`report` (docs/performance.md).
"""
