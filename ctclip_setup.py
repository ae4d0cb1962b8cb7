"""Sets the suite up: packages, folders, weights, data, one forward pass, and a summary of what works.

    python ctclip_setup.py                    packages and the ClassFine weights
    python ctclip_setup.py --dev              also pytest and ruff
    python ctclip_setup.py --slim             keep 0.7 GB of the weights' 1.77 GB, proven to compute the same
    python ctclip_setup.py --data valid --volumes 100
                                              tables and volumes of CT-RATE
    python ctclip_setup.py --data train --patients 500 --stream-cache
                                              the same as codes of 28 KB each, through a few GB of disk
    python ctclip_setup.py --doctor           what works here, and what to do about the rest
    python ctclip_setup.py --check            look only: installs and downloads nothing

Standard library only at import, so that it runs and explains itself on a bare interpreter. Versions are typed in
requirements.txt alone. It never replaces a torch that meets the floor written there (Colab's, a cluster's), never
prints a token, and without weights still ends with exit code 0: the built-in cohort needs none.
Exit codes: 0 ready, 2 something for you to do (one line says what), 1 the forward pass failed.
"""

from __future__ import annotations

import sys

from ctclip.environment.setup import main

if __name__ == "__main__":
    sys.exit(main())
