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

from ctclip.cli import refuse_unused, run_cli
from ctclip.config import hub_parser
from ctclip.errors import UserError


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
    args = hub_parser(__doc__).parse_args(argv)
    return run_cli(lambda: (weights_command if args.command == "weights" else card_command)(args))


if __name__ == "__main__":
    sys.exit(main())
