# SPDX-License-Identifier: GPL-2.0
"""The table of docs/compatibility.md: read, compared, written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

_HEAD = """\
# Compatibility

What becomes of the free pages that a guest reports, by its VMM and the kind of its memory. The lines are
what `selftests/tests/38-compatibility.py` has seen, with the versions that it has last seen it with.
`tools/compatibility` runs it and renews this file. The test fails where what it sees is not what is written here.
Lines of a VMM that is not there stay as they are; one without lines has not been run. cloud-hypervisor is
there if `CLOUD_HYPERVISOR` names a binary. `ksm_bridge` has `allow=all,hugetlb`; without `hugetlb` memory of hugetlbfs is kept
(`skipped_hugetlb`).

"merged": the host's copies go. "kept": they stay, for the reason that `ksm_bridge` counts under that
name (`/sys/kernel/debug/ksm_bridge/<tid>-<fd>/stats`; `<tid>` is the thread that made the VM, which with
cloud-hypervisor is not the VMM's first: `docs/statistics.md`).

What has gone may come back without the guest's using it, and go again because the driver asks the host every 10 s whether to report
all once more (`58-again.py` has seen each of these with QEMU; without the driver's question, with one from before it, memory stays until the guest uses it):

- A migration, given up or not, a dump or a debugger reads all of the memory. Private anonymous memory stays as it is. A shared file (memfd, tmpfs,
  hugetlbfs) gets a page wherever there was none. Where that is much (4 MiB, and a quarter of what was released) the host
  asks for all reports when the driver next asks; otherwise, or to have it at once, write 1 to
  `/sys/kernel/ksm_bridge/<tid>-<fd>/again`. `map_refilled` in `stats` says how much it is.
- After a migration or a restore the destination has memory for all, or for all that was not zero. The driver
  finds out that the host has no ring of it within 10 s and its time-out, and reports all.
- What was kept for userfaultfd (a postcopy migration) or a pin is asked for again when the driver next asks; as long as the reason
  stays, after 1 minute, 2, 4, and so on, up to an hour.

Firecracker after a restore maps its snapshot file private, whatever file system that is in. What is written over such a file is released if the guest's
driver says that nobody relies on the contents: where the guest has `init_on_free=1`, it stays (`skipped_file`, `skipped_kind`).

"""
_TITLES = ("kernel", "VMM", "version", "guest memory", "free pages")


class Row(NamedTuple):
    """One line of the table."""

    kernel: str
    vmm: str
    version: str
    memory: str
    outcome: str

    @property
    def what(self) -> tuple[str, str]:
        """What the outcome is of, whatever the versions."""
        return self.vmm, self.memory


def judged(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
    """How many pages were judged meanwhile, by the bridge's counters, and how."""
    return {
        name: count - before.get(name, 0)
        for name, count in after.items()
        if name == "merged_pages" or name.startswith("skipped_")
    }


def outcome(before: Mapping[str, int], after: Mapping[str, int]) -> str:
    """What became of most of the pages that were judged meanwhile, by the bridge's counters."""
    pages = judged(before, after)
    most = max(pages, key=lambda name: pages[name], default="")
    if not pages.get(most):
        return "not reported"
    return "merged" if most == "merged_pages" else f"kept (`{most}`)"


def read(text: str) -> list[Row]:
    """The lines of a file such as `write` makes."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return [Row(*cells) for cells in lines[2:]]


def write(seen: Sequence[Row], known: Sequence[Row]) -> str:
    """The file with what has been seen now, and what was known of others."""
    fresh = {row.what for row in seen}
    rows = [*seen, *(row for row in known if row.what not in fresh)]
    table = [_TITLES, ("---",) * len(_TITLES), *rows]
    return _HEAD + "".join(f"| {' | '.join(cells)} |\n" for cells in table)


def expected(row: Row, known: Sequence[Row]) -> str:
    """The outcome that is known for what a line is about."""
    return next((other.outcome for other in known if other.what == row.what), "not in the table")
