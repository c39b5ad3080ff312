"""The parts of a training run around the mathematics: schedules, optimizers, checkpoints, loggers."""
