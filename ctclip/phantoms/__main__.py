"""python -m ctclip.phantoms --data-dir D --train 200 --valid 50 --seed 0"""

from __future__ import annotations

import sys

if __name__ == "__main__":  # Ctrl-C during the imports is no traceback
    sys.excepthook = lambda kind, *rest: None if kind is KeyboardInterrupt else sys.__excepthook__(kind, *rest)

from ctclip.cli import run_cli
from ctclip.config import SYNTHETIC_NOTE, phantom_parser


def main(argv: list[str] | None = None) -> int:
    args = phantom_parser().parse_args(argv)

    def write() -> None:
        from ctclip.phantoms.cohort import write_phantom_cohort  # numpy and pandas: not for --help and wrong flags

        write_phantom_cohort(args.data_dir, args.train, args.valid, args.seed, args.workers, spacing=args.spacing)
        print(f"{args.data_dir}: {args.train} training and {args.valid} validation phantoms\n{SYNTHETIC_NOTE}")

    return run_cli(write, interrupted="the same command continues where this one ended")


if __name__ == "__main__":
    sys.exit(main())
