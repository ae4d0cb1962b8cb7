"""python -m ctclip.phantoms --data-dir D --train 200 --valid 50 --seed 0"""

from __future__ import annotations

import sys

if __name__ == "__main__":  # Ctrl-C during the imports is no traceback
    sys.excepthook = lambda kind, *rest: None if kind is KeyboardInterrupt else sys.__excepthook__(kind, *rest)

from pathlib import Path

from ctclip.cli import OneLineParser, run_cli
from ctclip.config import SYNTHETIC_NOTE


def phantom_parser() -> OneLineParser:
    parser = OneLineParser(description="Write a cohort of synthetic chest CTs. " + SYNTHETIC_NOTE)
    cohort = parser.add_argument_group("cohort")
    cohort.add_argument("--data-dir", type=Path, required=True, help="folder for it; reused if it holds the same one")
    cohort.add_argument("--train", type=int, default=200, help="training volumes, about 1 MB each (default 200)")
    cohort.add_argument("--valid", type=int, default=50, help="validation volumes, other patients (default 50)")
    cohort.add_argument("--seed", type=int, default=0, help="another seed gives other patients (default 0)")
    cohort.add_argument("--spacing", type=float, nargs=3, metavar="MM",
                        help="of voxels along x, y, z: 1.6 1.6 3 shows small findings, at 7 MB and a second each "
                             "(default: drawn, 2.8 to 4.2 in plane and 4 to 7 between slices)")  # fmt: skip
    cohort.add_argument("--workers", type=int, help="processes; changes the speed, not the files (default: all cores)")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = phantom_parser().parse_args(argv)

    def write() -> None:
        from ctclip.phantoms.cohort import write_phantom_cohort  # numpy and pandas: not for --help and wrong flags

        write_phantom_cohort(args.data_dir, args.train, args.valid, args.seed, args.workers, spacing=args.spacing)
        print(f"{args.data_dir}: {args.train} training and {args.valid} validation phantoms\n{SYNTHETIC_NOTE}")

    return run_cli(write, interrupted="the same command continues where this one ended")


if __name__ == "__main__":
    sys.exit(main())
