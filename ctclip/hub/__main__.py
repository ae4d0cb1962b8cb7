"""Weights and model cards.

    python -m ctclip.hub weights models/ctclip_classfine.pt [--slim]
    python -m ctclip.hub card results/RUN [--push USER/NAME]
"""

import sys

from ctclip.config import hub_parser


def main(argv: list[str] | None = None) -> int:
    parser = hub_parser(__doc__)
    args = parser.parse_args(argv)
    if args.command == "weights":
        from ctclip.hub.weights import run

        return run(args)
    if args.print and args.push:
        parser.error("--print goes without --push: it writes and uploads nothing")
    if args.public and not args.push:
        parser.error("--public goes with --push USER/NAME")
    from ctclip.hub.model_card import run

    return run(args)


if __name__ == "__main__":
    sys.exit(main())
