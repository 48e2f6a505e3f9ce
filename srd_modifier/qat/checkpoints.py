"""The checkpoints that a Trainer leaves behind."""

import json
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in a Trainer's output directory, None if there is none.

    A Trainer writes its state last: a checkpoint without it, or with a part of it, is one that a kill or a full disk
    has interrupted.
    """
    steps = {
        int(number): path
        for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (number := path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")).isdecimal()
    }
    return next((steps[number] for number in sorted(steps, reverse=True) if _is_whole(steps[number])), None)


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_bytes())
    except (OSError, ValueError):
        return False
    return True
