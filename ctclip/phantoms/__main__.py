"""python -m ctclip.phantoms --data-dir D --train 200 --valid 50 --seed 0"""

import sys

from ctclip.config import phantom_parser


def main(argv: list[str] | None = None) -> int:
    parser = phantom_parser()
    args = parser.parse_args(argv)
    if args.data_dir is None and args.montage is None:
        parser.error("found neither --data-dir nor --montage; name a folder for the cohort or a PNG file")
    from ctclip.phantoms.phantom import run  # numpy and pandas: not for --help and wrong flags

    return run(args)


if __name__ == "__main__":
    sys.exit(main())
