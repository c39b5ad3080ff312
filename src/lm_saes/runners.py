"""The commands as functions, under the name that scripts know them by; they live in `lm_saes.runs`."""

from lm_saes.runs.runners import *  # noqa: F403
from lm_saes.runs.runners import evaluate_from_config as evaluate_from_config
from lm_saes.runs.runners import generate_from_config as generate_from_config
from lm_saes.runs.runners import train_from_config as train_from_config
from lm_saes.runs.runners import train_settings_class as train_settings_class
