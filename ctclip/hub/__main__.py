"""Weights and model cards.

    python -m ctclip.hub weights models/ctclip_classfine.pt              the fingerprint, and whether it is as recorded
    python -m ctclip.hub weights models/ctclip_classfine.pt --slim       0.7 GB as safetensors in place of 1.77 GB
    python -m ctclip.hub card results/RUN                                writes results/RUN/README.md, the card
    python -m ctclip.hub card results/RUN --push USER/NAME               uploads weights, card, metrics; private
"""

import sys

if __name__ == "__main__":  # Ctrl-C during the imports is no traceback
    sys.excepthook = lambda kind, *rest: None if kind is KeyboardInterrupt else sys.__excepthook__(kind, *rest)

import argparse
from pathlib import Path

from ctclip.cli import OneLineParser, refuse_unused, run_cli
from ctclip.errors import UserError


def hub_parser() -> OneLineParser:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="weights|card")
    weights = commands.add_parser("weights", help="the fingerprint of a weights file; a slim copy of it")
    weights.add_argument("weights", type=Path, metavar="FILE", help="a CT-CLIP file, .pt or .safetensors")
    weights.add_argument("--slim", action="store_true", help="replace the file by its tensors in use, as .safetensors")
    card = commands.add_parser("card", help="the model card of a run; with --push, the run on the Hugging Face hub")
    card.add_argument("run", metavar="RUN", help="run folder, such as results/RUN, or a copy of one from the hub")
    card.add_argument("--print", action="store_true", help="print the card, write nothing")
    card.add_argument("--push", metavar="USER/NAME", help="upload the weights, the card and the run's files that hold "
                      "no private data; needs a token with write access")
    card.add_argument("--public", action="store_true", help="with --push: everybody may see it (default: you alone)")
    card.add_argument("--cohort", metavar="NAME", help="what the training cohort is called, for the card; CT-RATE's "
                      "terms then bind the weights")
    return parser


def weights_command(args: argparse.Namespace) -> None:
    from ctclip.hub.weights import check_weights

    for line in check_weights(args.weights, args.slim):
        print(line)


def card_command(args: argparse.Namespace) -> None:
    refuse_unused(args.given, {
        "--public": ("--push USER/NAME", bool(args.push)),
        "--print": ("a card that is not pushed", not args.push),
    })
    from ctclip.formatting import size_text
    from ctclip.hub.model_card import model_card
    from ctclip.hub.push import push_run, write_card
    from ctclip.inference.predictor import load_model

    run = Path(args.run)
    if not run.is_dir():
        found = "a file, expected a run folder" if run.is_file() else "no such folder, expected a run"
        raise UserError(f"{run}: found {found}; list results/ for its name")
    if args.push:
        print(f"Uploading {run} to {args.push} ({'public' if args.public else 'private, if it is new'})")
        print(f"Done: {push_run(run, args.push, not args.public, args.cohort)}")
        return
    card = model_card(load_model(run, "cpu"), run, cohort=args.cohort)
    if args.print:
        print(card, end="")
    elif write_card(run, card):
        print(f"Wrote {run / 'README.md'}: {size_text(len(card.encode()))}")
    else:
        raise UserError(f"{run / 'README.md'}: found a card that a person wrote, expected none or a generated one; "
                        "--print shows the new one")


def main(argv: list[str] | None = None) -> int:
    args = hub_parser().parse_args(argv)
    return run_cli(lambda: (weights_command if args.command == "weights" else card_command)(args))


if __name__ == "__main__":
    sys.exit(main())
