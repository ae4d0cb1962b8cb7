"""Every row of "fast and small": what was measured, the goal, pass or FAIL, as one table.

    python tests/benchmarks/all.py [--only encoder loading]

Runs the scripts one after the other, each in a process of its own; nothing else should keep the machine busy. Needs
Linux, 8 GB of memory and 3 GB in the temporary folder. Exit code 1 where a goal is missed or an output is wrong.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from rows import BENCHMARKS, Row, machine

SCRIPTS = (
    "encoder", "preprocessing", "predict_folder", "maps", "loading", "startup", "frozen_epoch", "volume_cache",
    "phantoms",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SCRIPTS, default=SCRIPTS, metavar="NAME", help=", ".join(SCRIPTS))
    args = parser.parse_args()
    rows, broken = [], []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.only:
            print(f"{name} ...", file=sys.stderr, flush=True)
            path = Path(folder, f"{name}.json")
            command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--json", str(path)]
            if subprocess.run(command, stdout=sys.stderr).returncode not in (0, 1) or not path.exists():
                broken.append(name)
                continue
            rows += [Row(**fields) for fields in json.loads(path.read_text())]
    print(f"{machine()}\n")
    table = [
        ("what", "goal", "measured", ""),
        *((r.what, r.bound, f"{r.measured:.3g}{r.unit}", r.verdict) for r in rows),
    ]
    widths = [max(len(line[column]) for line in table) for column in range(3)]
    for what, goal, measured, verdict in table:
        print(f"{what:{widths[0]}}  {goal:{widths[1]}}  {measured:>{widths[2]}}  {verdict}".rstrip())
    for name in broken:
        print(f"{name}.py ended without its rows: see above", file=sys.stderr)
    return 0 if not broken and all(row.passes for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
