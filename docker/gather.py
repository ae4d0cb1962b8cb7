"""What the container takes of a saved ensemble, in one folder: its partners' weights, its weights and calibration.

    python docker/gather.py results/NAME
    docker build --target ensemble --build-arg MODEL=results/NAME/container -t ctclip-task2 -f docker/Dockerfile .
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    from ctclip.cli import OneLineParser, run_cli

    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ensemble", metavar="NAME", help="folder of an ensemble, as --save-ensemble wrote it")
    args = parser.parse_args(argv)
    return run_cli(lambda: gather(args.ensemble))


def gather(name: str) -> None:
    from ctclip.errors import UserError
    from ctclip.evaluation.saved_ensemble import copy_ensemble, saved_ensemble

    ensemble = saved_ensemble(name)
    if ensemble is None:
        raise UserError(f"{name}: found no ensemble, expected one of --save-ensemble; a run needs no copy "
                        f"(--build-arg MODEL={name})")
    folder = copy_ensemble(ensemble, Path(name, "container")).folder
    print(f"Wrote {folder}: copies of {ensemble.names} with weights and calibration, for --target ensemble")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    sys.exit(main())
