"""Fine-tuning: the head on a frozen backbone first, then layer by layer into it, with states that a run continues from.

    python ctclip_training.py --mode quick_test
    python ctclip_training.py --mode full_train --data-dir D --cache-dir C
    python ctclip_training.py --mode full_train --data-dir D --plan           what it will cost, before it costs
    python ctclip_training.py --resume                                        after any interruption
    torchrun --nproc-per-node=8 ctclip_training.py --mode full_train --data-dir D
"""

from __future__ import annotations

import sys

from ctclip.config import training_parser


def main(argv: list[str] | None = None) -> int:
    args = training_parser(__doc__).parse_args(argv)
    from ctclip.distributed import is_main_process  # after the flags: torch takes two seconds
    from ctclip.training.loop import guarded, run_training

    def action() -> None:
        folder = run_training(args)
        if folder is not None and is_main_process():
            print(f"Next: python ctclip_evaluation.py --checkpoint {folder}")

    return guarded(action)


if __name__ == "__main__":
    sys.exit(main())
