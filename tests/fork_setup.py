"""ctclip_setup in forked processes, as helpers_fork has it. Arguments: the hub's address, then ctclip_setup's."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import huggingface_hub.constants as constants
import huggingface_hub.file_download  # noqa: F401
from helpers_fork import serve

import ctclip.hub.streaming  # noqa: F401
import ctclip_setup

constants.HF_HUB_OFFLINE, constants.DOWNLOAD_CHUNK_SIZE = False, 1 << 16  # small transfers in blocks, as large ones
os.environ["HF_ENDPOINT"] = sys.argv[1]
ctclip_setup.packages_step = lambda requirements: None
serve(lambda rank: ctclip_setup.main(sys.argv[2:]))
