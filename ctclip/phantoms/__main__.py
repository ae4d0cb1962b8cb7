"""python -m ctclip.phantoms --data-dir D --train 200 --valid 50 --seed 0"""

from __future__ import annotations

import sys

from ctclip.cli import refuse_unused, run_cli
from ctclip.config import SYNTHETIC_NOTE, phantom_parser


def main(argv: list[str] | None = None) -> int:
    parser = phantom_parser()
    args = parser.parse_args(argv)
    if args.data_dir is None and args.montage is None:
        parser.error("found neither --data-dir nor --montage; name a folder for the cohort or a PNG file")
    cohort = "--data-dir", args.data_dir is not None
    uses = dict.fromkeys(("--train", "--valid", "--seed", "--workers"), cohort)

    def write() -> None:
        refuse_unused(args.given, uses)
        if args.data_dir is not None:
            from ctclip.phantoms.cohort import write_phantom_cohort  # numpy and pandas: not for --help and wrong flags

            write_phantom_cohort(args.data_dir, args.train, args.valid, args.seed, args.workers)
            print(f"{args.data_dir}: {args.train} training and {args.valid} validation phantoms")
        if args.montage is not None:
            from ctclip.phantoms.montage import draw_montage  # matplotlib

            draw_montage(args.montage)
            print(f"{args.montage}: the 18 findings")
        print(SYNTHETIC_NOTE)

    return run_cli(write, interrupted="the same command continues where this one ended")


if __name__ == "__main__":
    sys.exit(main())
