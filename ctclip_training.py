"""Fine-tuning: the head on a frozen backbone first, then layer by layer into it, with states that a run resumes from.

    python ctclip_training.py --mode quick_test
    python ctclip_training.py --mode full_train --data-dir D --cache-dir C
    python ctclip_training.py --mode full_train --data-dir D --plan           time, memory and disk, measured before
    python ctclip_training.py --resume                                        after any interruption
    python ctclip_training.py --data-dir D --folds 5                          cross-validation; also --seeds 3
    python ctclip_training.py --data-dir D --search 30                        settings of a frozen run, compared
    torchrun --nproc-per-node=8 ctclip_training.py --mode full_train --data-dir D
"""

from __future__ import annotations

import os
import shlex
import sys

if __name__ == "__main__":  # Ctrl-C during the imports is no traceback; `python -I` finds the suite
    sys.excepthook = lambda kind, *rest: None if kind is KeyboardInterrupt else sys.__excepthook__(kind, *rest)
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

try:
    from ctclip.cli import INTERRUPTED, run_cli
    from ctclip.config import RESUME_HINT, training_parser
    from ctclip.paths import script
except ImportError as error:  # uploaded without the package, or with one of another version
    if __name__ == "__main__":
        sys.stderr.write(f"error: {error}, expected the folder ctclip; add ctclip.zip, run python ctclip_setup.py\n")
        sys.exit(2)
    raise


def main(argv: list[str] | None = None) -> int:
    args = training_parser(__doc__).parse_args(argv)

    def action() -> None:
        from ctclip.evaluation.run_folder import is_finished
        from ctclip.training.estimate import print_estimate  # after the flags: torch takes two seconds
        from ctclip.training.folds import run_folds, run_seeds
        from ctclip.training.loop import train
        from ctclip.training.run import run_from_flags
        from ctclip.training.search import run_search
        from ctclip.training.study import chosen_kind, study_from_flags

        if kind := chosen_kind(args):
            studies = {"folds": run_folds, "seeds": run_seeds, "search": run_search}
            studies[kind](study_from_flags(args, kind))
            return
        config, folder, machine = run_from_flags(args)
        if args.plan:
            print_estimate(config, folder, machine)
            return
        finished = folder is not None and is_finished(folder)
        folder = train(config, folder, machine)
        if not finished and os.environ.get("RANK", "0") == "0":  # of torchrun's processes the main one
            print(f"Next: python {script('ctclip_evaluation.py')} --checkpoint {shlex.quote(str(folder))}")

    several = args.folds or args.seeds or args.search
    return run_cli(action, INTERRUPTED if several else RESUME_HINT)


if __name__ == "__main__":
    sys.exit(main())
