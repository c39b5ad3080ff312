"""This project: the trainer with the configurations of `step.py`."""

import logging

from cases import CASES, Case, dictionary
from peer import Setting, speed
from step import train
from timing import Clock

from lm_saes.machine import keep_freed_memory


def run(setting: Setting, clock: Clock) -> None:
    keep_freed_memory()
    logging.disable(logging.WARNING)
    options = next(case.trainer for case in CASES if case.act_fn == setting.act_fn)
    case = Case(setting.title, act_fn=setting.act_fn, d_sae=setting.d_sae, n_tokens=setting.n_tokens, k=setting.k,
                trainer=options)  # fmt: skip
    train(case, dictionary(case, clock.batches), clock)


speed(run)
