"""Make the same outputs with the working tree and with REV, and compare them file by file.

    tools/same_bytes REV                    all outputs, a line each; exit 1 if a byte differs or a run fails
    tools/same_bytes REV --keep DIR         the same; what REV made stays in DIR and is used again next time
    tools/same_bytes REV --only 'faq-9m*'   some of them

Give it the commit that a change starts from, before the change is committed: restructuring must not change a byte of
any output. Tiny models and adapters of every kind, and the small real model that tests use, are made once and given
to both trees; each tree merges them in a process of its own, side by side, REV checked out in a git worktree that is
removed afterwards. Only `merge()`, `convert()` and the command line are used, so that the trees may differ in all else.

Compared is everything that a run writes; versions of streamconv are left aside where they differ. A run that fails
counts as a difference, one that is refused as well, unless its case says so and both trees refuse with the same
words. Where REV has no such method or format yet, the output is listed as new. New cases go to
tools/samebytes/cases.py, their models and adapters to inputs.py beside it.

What `--keep` keeps is found again by REV's commit, by the cases and inputs, by versions of libraries, and by the
processor. An output that is not the same lies below DIR, to be looked at, as DIR/.../now and DIR/.../rev.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tools.samebytes.cases import all_cases, select
from tools.samebytes.judging import judge, table
from tools.samebytes.making import commit_of, key_of, make_all


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0 if all outputs are the same, 1 if not."""
    given = _parse(arguments)
    cases = select(all_cases(), given.only, given.skip)
    if given.list:
        print("\n".join(case.name for case in cases))
        return 0
    if not cases:
        sys.exit("no output has such a name; --list shows them")
    started = time.monotonic()

    def tell(what: str) -> None:
        print(f"[{time.monotonic() - started:3.0f} s] {what}", file=sys.stderr, flush=True)

    commit = commit_of(given.rev)
    with _work_folder(given.keep, commit) as work:
        now, rev = make_all(cases, commit, work, tell)
        rows = [judge(case, work, now, rev) for case in cases]
        seconds = [sum(answer["seconds"] for answer in answers.values()) for answers in (now, rev)]
    bad = [row for row in rows if not row.is_good]
    tell(f"done; merging took {seconds[0]:.0f} s with the working tree, {seconds[1]:.0f} s with REV")
    print(table(rows))
    total = sum(row.nbytes for row in rows if row.verdict != "new")
    new = sum(row.verdict == "new" for row in rows)
    same = len(rows) - len(bad) - new
    print(f"\n{same} of {len(rows) - new} outputs are the same as with {commit[:12]}, {total:,} bytes in all")
    if new:
        print(f"{new} more are new: {commit[:12]} has none of their methods or formats")
    return 1 if bad else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools/same_bytes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rev", metavar="REV", help="commit to compare the working tree with")
    parser.add_argument("--keep", metavar="DIR", type=Path, help="keep what REV makes, and use it again")
    parser.add_argument(
        "--only", metavar="PATTERN", action="append", default=[], help="only outputs of this name; repeatable"
    )
    parser.add_argument(
        "--skip", metavar="PATTERN", action="append", default=[], help="no outputs of this name; repeatable"
    )
    parser.add_argument("--list", action="store_true", help="show the names of outputs, and make none")
    return parser.parse_args(arguments)


@contextlib.contextmanager
def _work_folder(keep: Path | None, commit: str) -> Iterator[Path]:
    if keep is not None:
        folder = keep.resolve() / key_of(commit)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                sys.exit(f"{folder} is in use by another run; wait for it, or give another --keep")
            yield folder
        return
    with tempfile.TemporaryDirectory(prefix="same-bytes-") as made:
        yield Path(made)


if __name__ == "__main__":
    sys.exit(main())
